"""The page of results: every result file is on it, everything on it has a file, no number is typed by hand"""
import html
import json
import re

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from lps.claims import PAPER, at_chance, claims, kind_of, reaches, stays_below, verdict
from lps.experiments import caption, in_words, plot_result, result_files, same_networks
from lps.plots import VARIANTS

PAGE = json.loads((ROOT/"nbs/results.ipynb").read_text(encoding="utf-8"))
FILES = result_files(ROOT/"results")
NAMES = r"§[\d.]+|Table \d|Fig\. \(\w\)|eq\. \(\d+\)|ResNet\d+|CIFAR-\d+|ModelSet\d+|100 %|\(\w+\.html\)"  # digits that are no result


def outputs(page) -> list[tuple[str, str]]:
    "What the page shows, in its order: text, tables and pictures"
    shown = []
    for out in (out for c in page["cells"] for out in c.get("outputs", [])):
        data = out.get("data", {})
        kind = next(k for k in ("image/png", "text/markdown", "text/html", "text/plain") if k in data)
        shown.append((kind, html.unescape("".join(data[kind])) if kind != "image/png" else ""))
    return shown


def named(page) -> list[str]:
    "The result files that the page names"
    return [name for kind, text in outputs(page) if kind == "text/markdown" for name in re.findall(r"`results/(.+?\.json)`", text)]


def test_every_result_file_is_shown_once_and_no_other():
    assert sorted(named(PAGE)) == sorted(p.name for p in FILES), "results/ and the page differ: run nbs/results.ipynb from top to bottom"


def test_every_figure_follows_the_file_behind_it():
    order = [name[0] if (name := re.findall(r"`results/(.+?\.json)`", text)) else "figure" for kind, text in outputs(PAGE) if kind == "image/png" or "`results/" in text]
    assert order == [x for name in named(PAGE) for x in (name, "figure")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_what_is_said_of_a_file_is_what_is_in_it(path):
    text, record = "\n".join(text for _, text in outputs(PAGE)), FILES[path]
    stale = [t for t in (caption(record), in_words(path, record), *claims(path, record)["found here"], *claims(path, record).verdict) if t not in text]
    assert not stale, "the page is older than the file: run nbs/results.ipynb from top to bottom"


def test_no_number_is_typed_by_hand():
    for c in PAGE["cells"]:
        text = re.sub(NAMES, "", "".join(c["source"])) if c["cell_type"] == "markdown" else re.sub(r"#{2,}.*", "", "".join(c["source"]))
        assert not re.findall(r"\d" if c["cell_type"] == "markdown" else r"\d+\.\d", text), text


def test_every_record_is_whole():
    for path, record in FILES.items():
        assert {"model_set", "settings", "versions", "machine", "commit", "time"} <= set(record), path.name
        assert not re.search(r'"/(root|home|tmp|Users|var)/', json.dumps(record)), path.name


def test_without_a_file_there_is_no_section(workdir):
    kept = next(iter(FILES))
    folder = workdir.parent/"one_result"
    (folder/"nbs").mkdir(parents=True), (folder/"results").mkdir()
    (folder/"results"/kept.name).write_bytes(kept.read_bytes())
    nb = nbformat.read(ROOT/"nbs/results.ipynb", as_version=4)
    NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder/"nbs")}}).execute()
    text = "\n".join(text for _, text in outputs(nb))
    assert named(nb) == [kept.name] and sum(kind == "image/png" for kind, _ in outputs(nb)) == 1
    assert [kind for kind, p in PAPER.items() if f"### {p['title']}" in text] == [kind_of(kept)]


def made_up(kind, layers=19, tasks=10, splits=3):
    "A record of an experiment that never was"
    rng = np.random.default_rng(0)
    names = [f"layer{i}" for i in range(layers)]
    methods = dict(branches=names, alignment=[f"{v}/{l}" for v in VARIANTS for l in names[1:]], fusion=["best branch, held-out", "learned", "oracle"], triplet=["a", "b"])[kind]
    top = {f"top-{k}": np.minimum(1, rng.uniform(.1, .2, splits)*k).tolist() for k in range(1, tasks + 1)}
    how = dict(name="made up", n_splits=splits, seed=0, epochs=1, n_filters=1, momentum=.9, folded=False, layers=names[1:] if kind == "alignment" else names)
    record = dict(model_set=dict(models=100, tasks=tasks, data=[], recipe=[], val_accuracy=None), settings=how, n_right=1, runs={m: top for m in methods}, time="2026-01-01T", commit="abc", machine=dict(cores=2, cpu="x"))
    if kind == "fusion": record |= dict(fusions=["learned"], best_branch="best branch, held-out", alpha=[[1/layers]*layers]*splits)
    if kind == "triplet": record |= dict(n_right=4, runs={m: {f"rank-{k}": v for k, v in enumerate(top.values(), 1)} for m in methods}, classification=dict(runs={"a: logits": top}))
    return record


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kind, n", [("branches", 3), ("alignment", 2), ("fusion", 1), ("triplet", 0)])
def test_every_kind_has_claims_words_and_a_figure(kind, n, splits):
    record = made_up(kind, splits=splits)
    rows = claims(f"{kind}-made-up.json", record)
    assert len(rows) == n and (splits > 1 or set(rows.verdict) <= {"not decided"}) and "nan" not in rows.to_string() + in_words(f"{kind}-x.json", record)
    assert plot_result(f"{kind}-made-up.json", record) is not None and "layer3" not in caption(record)


def test_a_branch_that_stands_out_is_found():
    record = made_up("branches")
    record["runs"] = {l: {k: [min(1, v + .5*(l == "layer0")) for v in values] for k, values in r.items()} for l, r in record["runs"].items()}
    assert claims("branches-x.json", record).verdict.tolist()[0] == "reproduces"


def test_what_branches_know_of_the_models_they_learned_from_is_said():
    record = made_up("branches")
    record["learned"] = {l: [.25]*3 for l in record["runs"]}
    assert "of the models learned from 25.0" in claims("branches-x.json", record)["found here"].tolist()[-1]
    assert any("learned from" in line.get_label() for line in plot_result("branches-x.json", record).get_lines())


def test_alignment_of_no_worth_is_not_found():
    assert set(claims("alignment-x.json", made_up("alignment")).verdict) == {"does not reproduce"}


def test_verdicts():
    assert [verdict(d) for d in [(3, 4, 5), (-1, 1, 2), (-3, 1, 1), (0, 0, 0), (7,)]] == ["reproduces", "not decided", "does not reproduce", "does not reproduce", "not decided"]
    assert at_chance((10, 10, 10), 10) == "reproduces" and at_chance((12, 12, 12), 10) == "does not reproduce" and at_chance((0, 50, 100), 50) == "not decided"
    assert stays_below((10, 11, 12), 5, 5.4, 2) == "does not reproduce" and stays_below((6, 10, 14), 5, 5.4, 2) == stays_below((3, 4, 5), 5, 5.4, 2) == "reproduces" and stays_below((0, 50, 100), 5, 5.4, 2) == "not decided"
    assert reaches((78, 80, 82), 10, 79.8, 2) == "reproduces" and reaches((90, 90, 90), 80, 79.8, 2) == "does not reproduce" and reaches((40, 66, 100), 50, 80.7, 10) == "not decided"


def test_a_file_of_nothing_known_is_named():
    with pytest.raises(ValueError, match="table9-x.json is of no experiment.*table1, table2"): kind_of("results/table9-x.json")


def test_the_same_networks_under_two_names_are_told_by_their_fingerprint():
    def record(name, **about): return dict(model_set=about, settings=dict(name=name))
    records = [record("build", sha256="a"), record("other", sha256="b"), record("packed", sha256="a"), record("build", sha256="a"), record("old"), record("older")]
    assert same_networks(records) == [("build", "packed")]
