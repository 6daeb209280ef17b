"""The page of results: every result file is on it, everything on it has a file, no number is typed by hand"""
import html
import json
import re

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from lps.study.stats import at_chance, reaches, stays_below, verdict
from lps.study.records import Record, record_text
from lps.study.page import caption, claims_of, claims_table, outcomes_text, overview, same_networks
from lps.study.registry import EXPERIMENTS, kind_of, result_files
from made_up import base_record

from lps.study.alignment import ALIGNMENTS

PAGE = json.loads((ROOT/"nbs/results.ipynb").read_text(encoding="utf-8"))
FILES = result_files(ROOT/"results")
KINDS = ("image/png", "text/markdown", "text/html", "text/plain")
LINK = r"\([\w/]+\.html[#\w-]*\)"
NAMES = rf"§[\d.]+|Table \d|Fig\. \(\w\)|eq\. \(\d+\)|ResNet\d+|CIFAR-\d+|ModelSet\d+|100 %|{LINK}"  # no results


def outputs(page) -> list[tuple[str, str]]:
    "What the page shows, in its order: text, tables and pictures"
    shown = []
    for cell in page["cells"]:
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            kind = next(k for k in KINDS if k in data)
            shown.append((kind, html.unescape("".join(data[kind])) if kind != "image/png" else ""))
    return shown


def all_text(page) -> str: return "\n".join(text for _, text in outputs(page))


def named(page) -> list[str]:
    "The result files that the page names"
    return re.findall(r'<th scope="row">results/(.+?\.json)</th>', all_text(page))


def test_every_result_file_is_shown_once_and_no_other():
    stale = "results/ and the page differ: run nbs/results.ipynb from top to bottom"
    assert sorted(named(PAGE)) == sorted(p.name for p in FILES), stale


def test_every_experiment_has_one_section_with_one_captioned_figure_and_its_files():
    sections = re.split(r"^### ", all_text(PAGE), flags=re.M)[1:]
    kinds = list(dict.fromkeys(map(kind_of, FILES)))
    assert len(sections) == len(kinds)
    for kind, section in zip(kinds, sections):
        experiment = EXPERIMENTS[kind]
        assert section.startswith(f"{experiment.title}\n"), kind
        figure, = re.findall(r'<figure class="result"><img alt="(.+?)" src=".+?"><figcaption>(.+?)<br>', section)
        assert figure[0].startswith(experiment.title) and figure[1] == experiment.see, kind
        assert f'<a href="experiments/{kind}.html">' in section
        files = re.findall(r'<th scope="row">results/(.+?\.json)</th>', section)
        assert sorted(files) == sorted(p.name for p in FILES if kind_of(p) == kind)


def test_sections_have_one_open_table_of_at_most_seven_columns():
    for section in re.split(r"^### ", all_text(PAGE), flags=re.M)[1:]:
        opened = re.sub(r"<details>.*?</details>", "", section, flags=re.S)
        assert opened.count("<table") == 1 and section.count("<details>") == 1, section[:40]
        for table in re.findall(r"<thead>.*?</thead>", section): assert table.count("<th ") <= 7, section[:40]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_what_is_said_of_a_file_is_what_is_in_it(path):
    record, kind = FILES[path], kind_of(path)
    claims = claims_table(path, record)
    assert record_text(record) in all_text(PAGE), "the page is older than the file: run nbs/results.ipynb"
    page = all_text(json.loads((ROOT/f"nbs/experiments/{kind}.ipynb").read_text(encoding="utf-8")))
    stale = [t for t in [text_of(path, record), *claims["found here"], *claims.verdict] if t not in page]
    assert not stale, f"the page is older than the file: run nbs/experiments/{kind}.ipynb from top to bottom"


def text_of(path, record) -> str:
    "What a page says of a result beside the claims"
    words = EXPERIMENTS[kind_of(path)].words
    return words(record) if words else ""


def test_page_opens_with_the_grid_of_all_claims():
    (kind, lines), (grid_kind, text) = outputs(PAGE)[:2]
    assert (kind, lines) == ("text/markdown", outcomes_text(ROOT/"results"))
    assert grid_kind == "text/html"
    grid = overview(ROOT/"results")
    assert text.count("<tr>") == 1 + len(grid) and grid.columns[0] == "paper"
    for name in grid:
        for cell in grid[name]:
            for entry in cell.splitlines():
                for part in entry.split(", ", 1): assert part in text


def test_grid_has_every_claim_once():
    claims = sum(len(claims_of(path, record)) for path, record in FILES.items())
    cells = overview(ROOT/"results").drop(columns="paper").to_numpy().ravel()
    assert sum(len(cell.splitlines()) for cell in cells) == claims


def test_no_number_is_typed_by_hand():
    for c in PAGE["cells"]:
        source, markdown = "".join(c["source"]), c["cell_type"] == "markdown"
        text = re.sub(NAMES if markdown else r"#{2,}.*", "", source)
        assert not re.findall(r"\d" if markdown else r"\d+\.\d", text), text


def test_code_on_the_page_is_hidden():
    for c in PAGE["cells"]:
        if c["cell_type"] == "code": assert re.match(r"#\| (hide|echo: false)\n", "".join(c["source"]))


def test_every_record_is_whole():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert {"model_set", "settings", "versions", "machine", "commit", "time"} <= set(json.loads(text)), path.name
        assert not re.search(r'"/(root|home|tmp|Users|var)/', text), path.name


def test_without_a_file_there_is_no_section(workdir, tmp_path, monkeypatch):
    monkeypatch.delenv("JUPYTER_PATH", raising=False)  # a kernel of its own, which draws into the notebook
    kept = next(iter(FILES))
    folder = tmp_path/"one_result"
    (folder/"nbs").mkdir(parents=True)
    (folder/"results").mkdir()
    (folder/"results"/kept.name).write_bytes(kept.read_bytes())
    nb = nbformat.read(ROOT/"nbs/results.ipynb", as_version=4)
    where = {"metadata": {"path": str(folder/"nbs")}}
    NotebookClient(nb, timeout=600, kernel_name="python3", resources=where).execute()
    text = all_text(nb)
    assert named(nb) == [kept.name] and text.count("<figure ") == 1
    assert [e.kind for e in EXPERIMENTS.values() if f"### {e.title}" in text] == [kind_of(kept)]


METHODS_OF = dict(fusion=["best branch, held-out", "learned", "oracle"], triplet=["a", "b"])


def made_up(kind, layers=19, tasks=10, splits=3):
    "A record of an experiment that never was"
    rng = np.random.default_rng(0)
    names = [f"layer{i}" for i in range(layers)]
    methods = METHODS_OF.get(kind, names)
    if kind == "alignment":
        methods = []
        for variant in ALIGNMENTS: methods += [f"{variant}/{l}" for l in names[1:]]
    top = {f"top-{k}": np.minimum(1, rng.uniform(.1, .2, splits)*k).tolist() for k in range(1, tasks + 1)}
    how = dict(n_splits=splits, seed=0, epochs=1, n_filters=1, momentum=.9, folded=False)
    record = base_record(tasks, **how, layers=names[1:] if kind == "alignment" else names)
    record |= dict(n_right=1, runs={m: top for m in methods})
    if kind == "fusion":
        record |= dict(fusions=["learned"], best_branch="best branch, held-out", alpha=[[1/layers]*layers]*splits)
        record |= dict(chosen=names[:splits], oracle=names[:splits])
    if kind == "triplet":
        rank = {f"rank-{k}": v for k, v in enumerate(top.values(), 1)}
        record |= dict(n_right=4, runs={m: rank for m in methods}, classification=dict(runs={"a: logits": top}))
    return EXPERIMENTS[kind].record.from_dict(record)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kind, n", [("branches", 3), ("alignment", 2), ("fusion", 1), ("triplet", 0)])
def test_every_kind_has_claims_words_and_a_figure(kind, n, splits):
    record = made_up(kind, splits=splits)
    rows = claims_table(f"{kind}-made-up.json", record)
    assert len(rows) == n and (splits > 1 or set(rows.verdict) <= {"not decided"})
    assert "nan" not in rows.to_string() + text_of(f"{kind}-x.json", record)
    assert EXPERIMENTS[kind].plot(record) is not None and "layer3" not in caption(record)


def test_a_branch_that_stands_out_is_found():
    record = made_up("branches")
    first = record.runs["layer0"]
    record.runs["layer0"] = {k: np.minimum(1, np.add(values, .5)).tolist() for k, values in first.items()}
    assert claims_table("branches-x.json", record).verdict.tolist()[0] == "reproduces"


def test_top1_of_the_training_models_is_shown():
    record = made_up("branches")
    record.learned = {l: [.25]*3 for l in record.runs}
    assert "of the training models 25.0" in claims_table("branches-x.json", record)["found here"].tolist()[-1]
    lines = EXPERIMENTS["branches"].plot(record).get_lines()
    assert any("training models" in line.get_label() for line in lines)


def test_alignment_of_no_worth_is_not_found():
    assert set(claims_table("alignment-x.json", made_up("alignment")).verdict) == {"does not reproduce"}


@pytest.mark.parametrize("difference, says", [
    ((3, 4, 5), "reproduces"),
    ((-1, 1, 2), "not decided"),
    ((-3, 1, 1), "does not reproduce"),
    ((0, 0, 0), "does not reproduce"),
    ((7,), "not decided"),
])
def test_a_difference_counts_beyond_its_spread(difference, says):
    assert verdict(difference) == says


def test_values_at_chance():
    assert at_chance((10, 10, 10), 10) == "reproduces"
    assert at_chance((12, 12, 12), 10) == "does not reproduce"
    assert at_chance((0, 50, 100), 50) == at_chance((10,), 10) == "not decided"


def test_low_values_stay_as_low_as_the_papers():
    assert stays_below((10, 11, 12), 5, 5.4, 2) == "does not reproduce"
    assert stays_below((6, 10, 14), 5, 5.4, 2) == stays_below((3, 4, 5), 5, 5.4, 2) == "reproduces"
    assert stays_below((0, 50, 100), 5, 5.4, 2) == "not decided"


def test_high_values_reach_the_papers():
    assert reaches((78, 80, 82), 10, 79.8, 2) == "reproduces"
    assert reaches((90, 90, 90), 80, 79.8, 2) == "does not reproduce"
    assert reaches((40, 66, 100), 50, 80.7, 10) == "not decided"


def test_a_file_of_nothing_known_is_named():
    wanted = r"'table9' is not a known experiment: name files `<experiment>-<set>.json`.*table1, table2"
    with pytest.raises(ValueError, match=wanted): kind_of("results/table9-x.json")


def test_the_same_networks_under_two_names_are_told_by_their_fingerprint():
    def record(name, sha256=None):
        fields = base_record(name=name)
        return Record.from_dict(fields | dict(model_set=fields["model_set"] | dict(sha256=sha256)))
    records = [record("build", "a"), record("other", "b"), record("packed", "a")]
    records += [record("build", "a"), record("old"), record("older")]
    assert same_networks(records) == [("build", "packed")]
