"""Every notebook runs from top to bottom in a fresh kernel: library and tutorials by cells, experiments by papermill"""
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

from lps.study.registry import EXPERIMENTS

NBS = ROOT/"nbs"
APART = {"experiments", ".ipynb_checkpoints"}
LIBRARY = sorted(p.relative_to(NBS).as_posix() for p in NBS.glob("**/*.ipynb") if not APART & set(p.parts))
WRITTEN = sorted(p.stem for p in NBS.glob("experiments/*.ipynb"))
pytestmark = pytest.mark.usefixtures("warm_kernels")


def skipped_flags(config) -> list[str]:
    "Return the cell flags that are skipped, by choice of the caller or for lack of a device"
    flags = ["notest"]
    if not config.getoption("--slow"): flags.append("slow")
    if not torch.cuda.is_available(): flags.append("cuda")
    return flags


@pytest.mark.parametrize("name", LIBRARY)
def test_library_notebook(name, workdir, request):
    path = workdir/"nbs"/name
    nb = nbformat.read(path, as_version=4)
    runnable = {c.id for c in nb_test_cells(path, skip_flags=skipped_flags(request.config))}
    nb.cells = [c for c in nb.cells if c.id in runnable]
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(nb, timeout=600, kernel_name="python3", resources=where).execute()


def test_every_experiment_has_its_notebook():
    assert sorted(EXPERIMENTS) == WRITTEN


@pytest.mark.parametrize("kind", EXPERIMENTS)
def test_experiment_declares_its_small_parameters(kind):
    declared = pm.inspect_notebook(NBS/f"experiments/{kind}.ipynb")
    assert declared, f"nbs/experiments/{kind}.ipynb has no cell tagged `parameters`"
    assert set(EXPERIMENTS[kind].small) <= set(declared)


@pytest.mark.parametrize("folder", [["classes", "sources", "two_class"]])
def test_small_experiments_of_one_folder_train_the_same_networks(folder):
    "Their networks are trained once, by the experiment that runs first, and in any order"
    trained = {kind: EXPERIMENTS[kind].small["zoo_epochs"] for kind in folder}
    assert len(set(trained.values())) == 1, trained


@pytest.mark.parametrize("kind", EXPERIMENTS)
def test_experiment_runs_small(kind, workdir):
    folder, small = workdir/"nbs/experiments", EXPERIMENTS[kind].small
    pm.execute_notebook(
        input_path=folder/f"{kind}.ipynb",
        output_path=workdir/f"{kind}_small.ipynb",
        parameters=small | dict(results="../../small"),  # library notebooks read those in ../../results
        cwd=folder,
        kernel_name="python3",
        progress_bar=False,
    )
    written = [json.loads(p.read_text()) for p in (workdir/"small").glob(f"{kind}-digits*.json")]
    repeats = "n_splits" if "n_splits" in small else "n_draws"
    assert [r["settings"][repeats] for r in written] == [small[repeats]]


SCRIPT = runpy.run_path(str(ROOT/"scripts/experiments.py"))


def test_one_command_runs_the_experiments(workdir, tmp_path, monkeypatch):
    "A parameter is passed to all notebooks that declare it, or to the one experiment that it names"
    monkeypatch.delenv("JUPYTER_PATH", raising=False)  # it measures its own processes, not forks of a server
    small = [f"{k}={v}" for k, v in EXPERIMENTS["branches"].small.items()]
    command = [sys.executable, workdir/"scripts/experiments.py", "--uncommitted", "--results", tmp_path/"results"]
    command += ["--times", tmp_path/"times.json", "--only", "branches", "table1"]
    command += ["--set", *small, "branches.epochs=2"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["table1", "branches", "all"]
    records = {p.name: json.loads(p.read_text()) for p in (tmp_path/"results").iterdir()}
    epochs = {name: record["settings"]["epochs"] for name, record in records.items()}
    assert epochs == {"table1-digits.json": 3, "branches-digits.json": 2}
    times = json.loads((tmp_path/"times.json").read_text())
    assert str(tmp_path) not in json.dumps(times)
    for took in times["times"].values(): assert took["minutes"] > 0 and took["core_minutes"] > 0


@pytest.mark.parametrize("args, message", [
    (["--set", "n_splitz=3"], "n_splitz"),
    (["--set", "branches.n_boot=3"], "branches.n_boot"),
    (["--set", "n_splits"], "n_splits"),
    (["--model-set", "no/such/folder"], "no/such/folder"),
    (["--only", "table3"], "table3"),
])
def test_one_command_refuses_unknown_arguments(args, message, capsys):
    with pytest.raises(SystemExit) as stopped: SCRIPT["main"](args)
    assert message in str(stopped.value) + capsys.readouterr().err
