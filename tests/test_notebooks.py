"""Every notebook runs from top to bottom in a fresh kernel: the library's and tutorials cell by cell, the experiments through papermill"""
import json
import runpy
import subprocess
import sys

import nbformat
import papermill as pm
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from nbdev.test import nb_test_cells

NBS = ROOT/"nbs"
LIBRARY = sorted(p.relative_to(NBS).as_posix() for p in [*NBS.glob("*.ipynb"), *NBS.glob("tutorials/*.ipynb")])
EXPERIMENTS = sorted(p.stem for p in NBS.glob("experiments/*.ipynb"))

# the small parameters that each experiment is tested with, by the notebook's name
SMALL = {
    "table1": dict(model_set="digits", n_models=4, zoo_epochs=1, n_splits=2, n_train=2, n_filters=8, epochs=3, workers=1),
    "table2": dict(model_set="digits", n_models=4, zoo_epochs=1, n_splits=2, n_query=1, n_filters=8, epochs=3, workers=1),
    "branches": dict(n_models=4, zoo_epochs=1, n_splits=2, n_train=2, n_filters=8, epochs=3, workers=1),
    "alignment": dict(n_models=4, zoo_epochs=1, n_splits=2, n_train=2, n_filters=8, epochs=3, workers=1),
    "fusion": dict(n_models=4, zoo_epochs=1, n_splits=2, n_train=3, n_held=1, n_filters=8, epochs=3, workers=1),
    "triplet": dict(model_set="digits", n_models=4, zoo_epochs=1, n_splits=2, n_train=2, n_query=1, bs=6, per_task=2, n_filters=8, epochs=3, workers=1),
    "learning_curve": dict(n_tasks="3", n_train="1,2", n_test=1, n_models=4, zoo_epochs=2, keep="1", n_splits=2, n_filters=8, epochs=3, workers=1),
    "transfer": dict(n_models=4, zoo_epochs=1, n_splits=2, n_init=2, n_boot=50, n_filters=8, epochs=3, workers=1),
}


def skipped_flags(config) -> list[str]:
    "The cell flags that are left out here: every one of them is a choice of the caller or the lack of a device"
    return ["notest", *([] if config.getoption("--slow") else ["slow"]), *([] if torch.cuda.is_available() else ["cuda"])]


@pytest.mark.parametrize("name", LIBRARY)
def test_library_notebook(name, workdir, request):
    path = workdir/"nbs"/name
    nb = nbformat.read(path, as_version=4)
    runnable = {c.id for c in nb_test_cells(path, skip_flags=skipped_flags(request.config))}
    nb.cells = [c for c in nb.cells if c.id in runnable]
    NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_has_small_parameters(name):
    "A new experiment is named here before it can pass, and its parameters are those that the notebook declares"
    assert name in SMALL, f"nbs/experiments/{name}.ipynb has no entry in SMALL: add the small parameters it is tested with"
    declared = pm.inspect_notebook(NBS/f"experiments/{name}.ipynb")
    assert declared, f"nbs/experiments/{name}.ipynb has no cell tagged `parameters`"
    assert set(SMALL[name]) <= set(declared), f"{name} declares {sorted(declared)}, SMALL sets {sorted(SMALL[name])}"


@pytest.mark.parametrize("name", sorted(set(EXPERIMENTS) & set(SMALL)))
def test_experiment_runs_small(name, workdir):
    folder = workdir/"nbs/experiments"
    pm.execute_notebook(folder/f"{name}.ipynb", workdir/f"{name}_small.ipynb", SMALL[name], cwd=folder, kernel_name="python3", progress_bar=False)
    written = [json.loads(p.read_text()) for p in (workdir/"results").glob(f"{name}-digits*.json")]
    assert [r["settings"]["n_splits"] for r in written] == [SMALL[name]["n_splits"]]


def test_no_small_parameters_without_a_notebook():
    assert set(SMALL) <= set(EXPERIMENTS)


SCRIPT = runpy.run_path(str(ROOT/"scripts/experiments.py"))


def test_one_command_runs_the_experiments(workdir, tmp_path):
    "A parameter reaches the notebooks that have it; one with the name of an experiment, that one alone"
    small = [f"{k}={v}" for k, v in SMALL["branches"].items()]
    args = ["--results", tmp_path/"results", "--times", tmp_path/"times.json", "--only", "alignment", "branches", "table1", "--set", *small, "alignment.epochs=2"]
    done = subprocess.run([sys.executable, workdir/"scripts/experiments.py", *args], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["table1", "branches", "alignment", "all"]
    assert {p.name: json.loads(p.read_text())["settings"]["epochs"] for p in (tmp_path/"results").iterdir()} == {"table1-digits.json": 3, "branches-digits.json": 3, "alignment-digits.json": 2}
    times = json.loads((tmp_path/"times.json").read_text())
    assert all(t["minutes"] > 0 and t["core_minutes"] > 0 for t in times["times"].values()) and str(tmp_path) not in json.dumps(times)


@pytest.mark.parametrize("args, says", [(["--set", "n_splitz=3"], "n_splitz"), (["--set", "branches.n_boot=3"], "branches.n_boot"), (["--set", "n_splits"], "n_splits"),
                                        (["--model-set", "no/such/folder"], "no/such/folder"), (["--only", "table3"], "table3")])
def test_one_command_refuses_what_it_does_not_know(args, says, capsys):
    with pytest.raises(SystemExit) as stopped: SCRIPT["main"](args)
    assert says in str(stopped.value) + capsys.readouterr().err


def test_one_command_knows_every_experiment():
    assert sorted(SCRIPT["ORDER"]) == EXPERIMENTS
