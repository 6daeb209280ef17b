"The first split of stored results is computed again from the bundled models, digit for digit"
import json
from pathlib import Path

import pytest

from lps.study.table1 import table1
from lps.models.modelset import bundled, load_modelset

RECORD = Path(__file__).resolve().parent.parent/"results/table1-modelset500-cifar100-epoch80.json"


@pytest.mark.parametrize("method", ["fc", "frobenius", "lps"])
def test_table1_of_the_bundled_models_is_what_was_stored(method):
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    settings = dict(record["settings"])
    for name in ("name", "n_splits", "n_train", "seed"): settings.pop(name)
    settings["layers"] = tuple(settings["layers"])
    table = table1(
        load_modelset(bundled()),
        n_splits=1,
        n_train=record["settings"]["n_train"],
        methods=(method,),
        seed=record["settings"]["seed"],
        **settings,
    )
    stored = {k: runs[0] for k, runs in record["runs"][method].items()}
    assert table.loc[method].iloc[0].to_dict() == pytest.approx(stored, abs=1e-7)
