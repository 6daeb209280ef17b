"""`import lps`: every name that it offers can be imported, is listed for completion, and costs nothing until used"""
import ast
import importlib
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import lps
from lps.nets.resnet import ResNet


def stub_imports() -> dict[str, str]:
    "Return the name → module of every import in the type stub"
    tree = ast.parse((ROOT/"lps/__init__.pyi").read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom): continue
        for alias in node.names:
            assert alias.asname == alias.name, f"write `{alias.name} as {alias.name}`, so that the stub exports it"
            found[alias.name] = node.module
    return found


@pytest.mark.parametrize("name", sorted(stub_imports()))
def test_name_is_the_one_of_its_module(name):
    module = importlib.import_module(f"lps.{stub_imports()[name]}")
    assert getattr(lps, name) is getattr(module, name)


def test_dir_and_stub_list_the_same_names():
    assert set(lps.__all__) == set(stub_imports())
    assert dir(lps) == sorted([*lps.__all__, "__version__"])
    assert 20 <= len(lps.__all__) <= 35


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'zzz'"): lps.zzz
    assert not hasattr(lps, "__wrapped__")


def modules_after(statement: str) -> set[str]:
    "Return the modules that a fresh interpreter has loaded after a statement"
    code = f"{statement}; import sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_lps_loads_nothing_else():
    added = modules_after("import lps") - modules_after("import importlib, warnings")
    assert added == {"lps"}


def test_type_information_is_shipped():
    setup = (ROOT/"setup.py").read_text(encoding="utf-8")
    for name in ("py.typed", "__init__.pyi"):
        assert (ROOT/"lps"/name).exists() and f'"{name}"' in setup


QUERY = """
import sys, torch
from lps.cli import main
from lps.nets.resnet import ResNet
torch.save(ResNet(20, 16).state_dict(), "model.pt")
assert main(["query", "bundled", "model.pt"]) == 0
print(*sys.modules, file=sys.stderr)
"""
NOT_NEEDED = {"fastai", "torchvision", "sklearn", "scipy", "numba", "matplotlib", "plotly", "jinja2", "torch._dynamo"}


def test_a_query_loads_no_package_that_it_does_not_need(tmp_path):
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", QUERY], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.splitlines()[-1].split())
    assert not NOT_NEEDED & loaded, "`python benchmarks/startup.py --imports` shows what imports them"


PROCESSES = """
import sys
def note(event, args):
    if event == "subprocess.Popen" and "pickles" in repr(args): print("torch" in sys.modules, file=sys.stderr)
sys.addaudithook(note)
from lps.cli import main
assert main(["query", "bundled", "model.pt"]) == 0
"""


def test_a_query_starts_the_reading_process_once_and_before_pytorch_is_imported(tmp_path):
    torch.save(ResNet(20, 16).state_dict(), tmp_path/"model.pt")
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", PROCESSES], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line in ("True", "False")] == ["False"]
