"""An experiment and a method from outside arrive wherever such are known, with nothing in lps/ touched"""
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace

import nbformat
import pytest
import torch
import yaml
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook

import IPython.display
import matplotlib.pyplot
from lps.study.table1 import table1
from lps.study.page import claims_table, overview, show_overview, show_results
from lps.study.registry import EXPERIMENTS, kind_of, register_experiment, result_files, result_path
from lps.study.sets import open_models
from lps.core.files import save_tensors
from lps.methods.registry import METHODS, Method
from lps.models.modelset import load_modelset
from lps.study.records import RunsRecord, runs_fields
from lps.methods.fitted import Fitted, FittedConfig

SCRIPT = runpy.run_path(str(ROOT/"scripts/experiments.py"))
HOW = dict(name="toys", n_splits=2, seed=0, layers=["conv1"], momentum=.9, folded=False)
FEW = dict(epochs=2, milestones=(1,), n_filters=6)

# an experiment from outside, whole: does LPS need more than two epochs?
OUTSIDE = """
from pathlib import Path

from lps.study.records import RunsRecord
from lps.study.registry import Claim, Experiment, register_experiment
from lps.study.stats import mean_sd, verdict
from lps.study.table1 import plot_table, runs_table

def claims(record):
    top1 = record.percent('lps')
    above = verdict(top1 - record.chance)
    return [Claim('two epochs are enough', 'no number', mean_sd(top1), above, f'{top1.mean():.0f} %', 'top-1')]

hurried = register_experiment(Experiment(
    kind='hurried',
    title='Two epochs',
    where='elsewhere',
    record=RunsRecord,
    plot=plot_table,
    table=runs_table,
    claims=claims,
    words=lambda record: 'It was quick.',
    small=dict(n_splits=2),
    notebook=Path(__file__).with_name('hurried.ipynb'),
))
"""
PARAMETERS = "model_set = 'bundled'\nn_splits = 3\nresults = 'results'"
RUN = """
import outside_of_lps
from lps.study.table1 import table1
from lps.study.registry import result_path
from lps.study.sets import open_models
from lps.study.records import RunsRecord, runs_fields

models = open_models(model_set)[:30]
how = dict(n_splits=n_splits, seed=0, epochs=2, n_filters=6, momentum=.9, folded=False)
table = table1(models, n_splits, 2, methods=('lps',), milestones=(1,), epochs=2, n_filters=6)
settings = dict(name=model_set, layers=['conv1'], **how)
RunsRecord.make(models, settings, **runs_fields(table)).write(result_path(results, 'hurried', model_set))
"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    "Four tasks of six stems: each task's filters, noisy and shuffled"
    folder, g = tmp_path_factory.mktemp("toys"), torch.Generator().manual_seed(0)
    for task in range(4):
        filters = torch.randn(6, 3, 3, 3, generator=g)
        for run in range(6):
            noisy = filters + .3*torch.randn(6, 3, 3, 3, generator=g)
            state = {"conv1.weight": noisy[torch.randperm(6, generator=g)]}
            save_tensors(folder/f"{task}_{run}.safetensors", state, dict(task=task, run=run))
    return load_modelset(folder)


def measured(models, runs) -> RunsRecord:
    "A record of runs with few epochs"
    return RunsRecord.make(models, HOW | FEW, **runs_fields(runs))


@pytest.fixture
def registries():
    "What a test registers is forgotten after it"
    before, methods = dict(EXPERIMENTS), dict(METHODS)
    yield
    for registry, kept in ((EXPERIMENTS, before), (METHODS, methods)):
        registry.clear()
        registry.update(kept)


@pytest.fixture
def shown(monkeypatch):
    "What is displayed, instead of displaying it"
    things = []
    monkeypatch.setattr(IPython.display, "display", lambda *objects: things.extend(objects))
    monkeypatch.setattr(matplotlib.pyplot, "show", lambda: things.append("figure"))
    return things


@pytest.fixture
def outside(tmp_path):
    "A folder with a module that registers an experiment, and its notebook"
    (tmp_path/"outside_of_lps.py").write_text(OUTSIDE)
    cells = [new_code_cell(PARAMETERS, metadata=dict(tags=["parameters"])), new_code_cell(RUN)]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path/"hurried.ipynb")
    return tmp_path


def text_of(things) -> str:
    "Displayed things as text"
    texts = []
    for thing in things:
        if hasattr(thing, "to_html"): texts.append(thing.to_html())
        else: texts.append(getattr(thing, "data", str(thing)))
    return "\n".join(texts)


def test_an_experiment_from_outside_arrives_on_the_page(toys, registries, shown, outside):
    runpy.run_path(str(outside/"outside_of_lps.py"))
    record = measured(toys, table1(toys, n_splits=2, n_train=4, methods=("lps",), **FEW))
    record.write(result_path(outside/"results", "hurried", "toys"))
    grid = overview(outside/"results")
    assert grid.index.tolist() == [("elsewhere", "two epochs are enough", "top-1")]
    assert grid["toys"].iloc[0][0] in "✓?✗" and grid["toys"].iloc[0][2:].endswith("%")
    assert "two epochs are enough" in show_overview(outside/"results").data
    show_results("hurried", outside/"results")
    said = text_of(shown)
    assert "`results/hurried-toys.json`" in said and "two epochs are enough" in said
    assert "It was quick." in said and "figure" in shown


def test_an_experiment_from_outside_arrives_in_the_runner(outside, warm_kernels):
    command = [sys.executable, ROOT/"scripts/experiments.py", "--load", "outside_of_lps", "--only", "hurried"]
    command += ["--uncommitted", "--model-set", "bundled", "--results", outside/"results"]
    command += ["--set", "hurried.n_splits=2"]
    path = os.pathsep.join([str(outside), os.environ.get("PYTHONPATH", str(ROOT))])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=path))
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["hurried", "all"]
    record = json.loads((outside/"results/hurried-bundled.json").read_text())
    assert record["settings"]["n_splits"] == 2 and len(record["runs"]["lps"]["top-1"]) == 2


class Middle(Fitted):
    "A fitted method from outside: the sorted mean of each filter's middle"
    def embed(self, weights):
        middle = torch.cat([w[..., 1, 1].mean(2).sort(1).values for w in weights.values()], 1)
        return torch.nn.functional.normalize(middle, dim=1)

    def scores(self, weights): return self.embed(weights) @ self.tensors["centres"].T


def test_a_method_from_outside_arrives_in_records_and_verdicts(toys, registries):
    def fit_middle(weights, labels, seed):
        fitted = Middle(FittedConfig(tasks=labels.unique().tolist()))
        z = fitted.embed(weights)
        fitted.tensors["centres"] = torch.stack([z[labels == task].mean(0) for task in fitted.tasks])
        return fitted

    METHODS["middle"] = Method(
        name="middle",
        title="Middles of filters",
        baseline=False,
        reads=lambda models, layers=None, folded=False: ("conv1",),
        fit=fit_middle,
        fitted=Middle,
    )
    runs = table1(toys, n_splits=2, n_train=4, **FEW)
    record = measured(toys, runs)
    assert list(record.runs) == ["fc", "frobenius", "lps", "middle"] and "Middles of filters" in record.summary
    found = claims_table("table1-toys.json", record)["found here"]
    assert "Middles of filters" not in found[0] and "Middles of filters" in found[1]


def test_a_baseline_from_outside_is_one_to_beat(toys, registries):
    METHODS["oracle"] = replace(METHODS["lps"], name="oracle", title="LPS again", baseline=True)
    record = measured(toys, table1(toys, n_splits=2, n_train=4, **FEW))
    assert "LPS again" in claims_table("table1-toys.json", record)["found here"][0]


def test_a_kind_can_be_registered_once(registries):
    taken = "'table1' is taken by Task classification"
    with pytest.raises(ValueError, match=taken): register_experiment(replace(EXPERIMENTS["table1"], title="Another"))


def test_digits_are_built_small(tmp_path):
    models = open_models("digits", tmp_path, n_models=1, zoo_epochs=1, workers=1)
    assert len(models) == len(models.tasks) == 5
    assert models.manifest.recipe.unique().tolist() == ["digits, 1 epochs"]


def test_order_of_pages_is_that_of_the_registry():
    kinds = [kind_of(path) for path in result_files(ROOT/"results")]
    assert kinds == sorted(kinds, key=list(EXPERIMENTS).index)
    assert list(EXPERIMENTS).index("branches") < list(EXPERIMENTS).index("alignment")


def test_every_experiment_starts_with_claim_and_figure():
    "The parameters and the set-up come after, and are folded"
    for kind in EXPERIMENTS:
        cells = nbformat.read(ROOT/f"nbs/experiments/{kind}.ipynb", as_version=4).cells
        sources = [cell.source for cell in cells]
        assert sources[1].startswith("**Claim**"), kind
        figure = sources.index(f'#| code-fold: true\nshow_results("{kind}")')
        assert figure < next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", [])), kind
        for cell in cells:
            if cell.cell_type == "code": assert cell.source.startswith("#| code-fold: true\n"), kind


def test_what_would_fail_in_the_end_is_said_at_the_start(tmp_path):
    results, file = tmp_path/"results", tmp_path/"file"
    (results/"table1-bundled.json").mkdir(parents=True)
    file.write_text("")
    with pytest.raises(ValueError, match="table1-bundled.json is a folder"): result_path(results, "table1", "bundled")
    with pytest.raises(ValueError, match="is a file: pass a folder"): result_path(file, "table1", "bundled")
    with pytest.raises(SystemExit, match="is a file"): SCRIPT["main"](["--results", file, "--uncommitted"])
    with pytest.raises(SystemExit, match="is a folder"): SCRIPT["main"](["--times", tmp_path, "--uncommitted"])


def test_an_uncommitted_tree_is_refused(monkeypatch):
    monkeypatch.setitem(SCRIPT["check"].__globals__, "provenance", lambda: dict(commit="0123456789ab+changes"))
    with pytest.raises(SystemExit, match="commit before you measure, or pass --uncommitted"): SCRIPT["main"]([])


def test_a_setting_of_one_experiment_wins():
    settings = [SCRIPT["read_setting"](text) for text in ("branches.epochs=2", "epochs=3", "folded=True")]
    values = {kind: SCRIPT["parameters"](kind, dict(images="digits"), settings) for kind in ("branches", "transfer")}
    assert values["branches"] == dict(epochs=2, folded=True)
    assert values["transfer"] == dict(images="digits", epochs=3, folded=True)


def test_sidebar_and_notebooks_are_those_of_the_registry():
    config = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
    sections = [s for s in config["website"]["sidebar"]["contents"] if isinstance(s, dict) and "section" in s]
    listed = next(s["contents"] for s in sections if s["section"] == "Experiments")
    assert sorted(listed) == [f"experiments/{kind}.ipynb" for kind in sorted(EXPERIMENTS)]
    assert sorted(path.stem for path in ROOT.glob("nbs/experiments/*.ipynb")) == sorted(EXPERIMENTS)
