"""Result files: a stale one is not taken, a broken one is one message with file and field"""
import copy
import importlib
import json
import math
from dataclasses import replace

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from lps.study.table1 import table1
from lps.study.page import claims_of
from lps.study.registry import result_files
from lps.core.files import write_json
from lps.models.modelset import load_modelset
from lps.study.records import (
    MEASURED_BY, Record, RunsRecord, Sources, find_record, plain_source, record_marks, runs_fields, source_hash,
)

RECORD = json.loads((ROOT/"results/table1-modelset500-cifar100-epoch80.json").read_text(encoding="utf-8"))


@pytest.fixture
def module(tmp_path, monkeypatch):
    "A module whose source a test can change"
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path/"half_of_it.py"
    path.write_text("def half(x): return x/2\n")
    importlib.invalidate_caches()
    return path


def test_comments_and_docstrings_do_not_make_a_result_stale(module):
    before = source_hash("half_of_it")
    module.write_text('"A module"\n\ndef half(\n    x,  # a number\n):\n    "Half of it"\n    return x / 2\n')
    assert source_hash("half_of_it") == before
    module.write_text("def half(x): return x/3\n")
    assert source_hash("half_of_it") != before


def test_a_function_of_nothing_but_a_docstring_stays_one():
    assert plain_source('def f():\n    "Nothing"') == "def f():\n    pass"


def test_what_shows_a_result_does_not_make_it_stale(module):
    module.write_text("def half(x):\n    if x is None: raise ValueError('none')\n    return x/2\n")
    before = source_hash("half_of_it")
    more = "import math\n__all__ = ['half']\ndef plot(record): pass\nregister_experiment(half)\n"
    module.write_text(more + module.read_text().replace("'none'", "f'{x}'"))
    assert source_hash("half_of_it") == before
    module.write_text(module.read_text().replace("record", "x"))
    assert source_hash("half_of_it") != before


def test_one_definition_of_a_module_is_hashed_alone(module):
    before = source_hash("half_of_it:half")
    module.write_text(module.read_text() + "def third(x): return x/3\n")
    assert source_hash("half_of_it:half") == before != source_hash("half_of_it:half,third")
    for names in ("whole", "half,whole"):
        with pytest.raises(ValueError, match=f"{names} has no such definition"): source_hash(f"half_of_it:{names}")
    for listed in MEASURED_BY:
        name, _, names = listed.partition(":")
        for part in filter(None, names.split(",")): assert source_hash(f"{name}:{part}"), part


def test_which_module_changed_matters_not_their_names(module):
    assert source_hash("half_of_it", "lps.align") != source_hash("lps.align", "half_of_it")
    with pytest.raises(ValueError, match="no_such_module is not a module"): source_hash("no_such_module")


def test_a_result_is_not_taken_after_its_sources_changed(module, tmp_path):
    models = load_modelset("bundled")
    models = models[(models.manifest.task < 8).to_numpy()]
    few = dict(epochs=1, milestones=[1], n_filters=4)

    class Halved(RunsRecord): measured_by = (*MEASURED_BY, "half_of_it")

    runs = table1(models, 2, 2, methods=("fc",), **few)
    record = Halved.make(models, few | dict(name="some"), **runs_fields(runs))
    path = tmp_path/"table1-some.json"
    record.write(path)
    assert find_record(Halved, path, models, few) == record
    assert find_record(RunsRecord, path, models, few) is None  # other sources
    module.write_text("def half(x): return x/3\n")
    assert find_record(Halved, path, models, few) is None
    assert not record.sources.are_current
    assert record_marks(replace(record, commit="abc")) == ["older than its sources"]


def test_a_module_that_is_gone_makes_a_result_stale():
    assert not Sources(["lps.no_such_module"], "0"*16).are_current


def test_a_result_without_a_hash_is_not_taken_but_shown(tmp_path):
    models = load_modelset("bundled")
    path = tmp_path/"table1-bundled.json"
    old = {key: value for key, value in RECORD.items() if key != "sources"}
    write_json(path, old)
    record = Record.read(path)
    assert record.model_set.sha256 == RECORD["model_set"]["sha256"]
    assert find_record(Record, path, models, {}) is None
    replace(record, sources=Sources.of(MEASURED_BY)).write(path)
    assert find_record(Record, path, models, {}) is not None
    assert record_marks(replace(record, commit="abc")) == ["older than the hash of sources"]
    write_json(path, old)
    assert list(result_files(tmp_path)) == [path]


def test_a_result_from_an_uncommitted_tree_is_marked():
    dirty = replace(Record.from_dict(RECORD), commit="abc+changes", sources=Sources.of(["lps.align"]))
    assert record_marks(dirty) == ["measured from an uncommitted tree"]
    for commit in ("abc", None): assert record_marks(replace(dirty, commit=commit)) == []


def test_a_folder_in_place_of_a_result_is_said(tmp_path):
    with pytest.raises(ValueError, match="is a folder: pass the path of a result file"):
        find_record(Record, tmp_path, load_modelset("bundled"), {})


def changed(record, field, value):
    "The record with something else at a dotted name"
    record = copy.deepcopy(record)
    *way, last = field.split(".")
    place = record
    for key in way: place = place[key]
    place[last] = value
    return record


@pytest.mark.parametrize("field, value", [
    ("model_set", None), ("model_set", {}), ("model_set.tasks", "5"), ("model_set.data", 3), ("settings", []),
    ("settings.layers", "conv1"), ("settings.name", 3), ("settings.n_splits", "many"), ("machine", None),
    ("machine.cores", True), ("time", 3), ("commit", 3), ("runs", []), ("runs.lps", []), ("runs.lps.top-1", ["0.5"]),
    ("runs.lps.top-1", []), ("runs.lps.top-1", [.1]), ("runs.lps.top-1", [math.nan]*20), ("versions", 1),
    ("n_right", "1"), ("sources", {"modules": 3, "sha256": ""}),
])
def test_a_broken_field_is_named(tmp_path, field, value):
    path = tmp_path/"table1-x.json"
    path.write_text(json.dumps(changed(RECORD, field, value)))
    name = field.split(".")[-1]
    with pytest.raises(ValueError) as said: result_files(tmp_path)
    message = str(said.value)
    assert message.startswith("table1-x.json") and "\n" not in message
    assert name in message or "runs" in message


@pytest.mark.parametrize("text", ["", "{}", "null", "[]", "3", '"x"', "{", "[" * 10_000, "\x00", '{"model_set": {}}'])
def test_a_file_that_is_no_record_is_one_message(tmp_path, text):
    path = tmp_path/"table1-x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^table1-x\.json"): Record.read(path)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(LEAVES, lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(max_size=5), of, max_size=3))
FIELDS = sorted({*RECORD, "model_set.models", "model_set.tasks", "model_set.val_accuracy", "settings.layers",
                 "settings.epochs", "runs.lps", "runs.lps.top-1", "machine.cpu"})


@given(field=st.sampled_from(FIELDS), value=JSON)
def test_any_value_in_any_field_is_read_or_refused(tmp_path_factory, field, value):
    path = tmp_path_factory.mktemp("hostile")/"table1-x.json"
    path.write_text(json.dumps(changed(RECORD, field, value)))
    try: found = result_files(path.parent)
    except ValueError as e: assert str(e).startswith("table1-x.json")
    else: assert len(found) == 1


def test_claims_of_a_record_without_the_methods_are_refused(tmp_path):
    path = tmp_path/"table1-x.json"
    record = RunsRecord.from_dict(RECORD | dict(runs={"fc": RECORD["runs"]["fc"]}))
    with pytest.raises(ValueError, match="table1-x.json: .*'runs.lps.top-1' is missing"): claims_of(path, record)
