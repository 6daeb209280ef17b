"""The house: modules stand on floors, in reading order, and import only what stands before them"""
import ast
import re

import pytest
import yaml
from conftest import ROOT

FLOORS = {
    "Networks": ["resnet", "order_chain", "plain", "architectures"],
    "Data": ["tasks"],
    "Files": ["files", "store", "modelset", "foreign", "remote", "datasheet"],
    "Training": ["jobs", "batchnorm", "train", "many", "zoo", "copies"],
    "Similarity": [
        "align", "second_order", "methods", "signatures", "chain", "canonical",
        "matching", "equivariant", "experts", "probes", "readout", "fusion", "all_methods",
    ],
    "Measuring": [
        "evaluate", "records", "transfer", "sources", "curves",
        "plots", "across", "claims", "experiments", "leaderboard",
    ],
    "Using": ["intake", "answers", "gather", "search", "sharing", "report", "market_map", "demo", "cli"],
}
ORDER = [module for modules in FLOORS.values() for module in modules]
MODULES = {p.stem: p for p in sorted(ROOT.glob("lps/*.py")) if not p.stem.startswith("_")}


def imports(path) -> list[tuple[str, str]]:
    "Every (module of lps, name) that a module imports, at its top or inside a function"
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(a.name.split(".")[1], "") for a in node.names if a.name.startswith("lps.")]
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level: module = f"lps.{module}"
            if module.startswith("lps."): found += [(module.removeprefix("lps."), a.name) for a in node.names]
    return found


def test_every_module_has_its_place():
    assert sorted(MODULES) == sorted(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_down(module):
    above = ORDER[ORDER.index(module):]
    assert not [f"{other}.{name}" for other, name in imports(MODULES[module]) if other in above]


@pytest.mark.parametrize("module", ORDER)
def test_no_private_name_crosses_a_module(module):
    assert not [f"{other}.{name}" for other, name in imports(MODULES[module]) if name.startswith("_")]


def test_notebooks_are_numbered_in_that_order():
    "03_architectures.ipynb is the third module, and so on"
    numbered = sorted(p.stem for p in ROOT.glob("nbs/[0-9]*.ipynb"))
    assert numbered == [f"{i:02d}_{module}" for i, module in enumerate(ORDER)]


def test_sidebar_shows_the_floors():
    config = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
    sections = [s for s in config["website"]["sidebar"]["contents"] if isinstance(s, dict) and "section" in s]
    shown = {s["section"]: s["contents"] for s in sections}
    for floor, modules in FLOORS.items():
        assert shown[floor] == [f"{ORDER.index(m):02d}_{m}.ipynb" for m in modules]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_pages_name_the_floors_in_order(page):
    text = (ROOT/page).read_text(encoding="utf-8")
    places = [re.search(rf"\b{floor}\b", text, re.I) for floor in FLOORS]
    assert all(places), [f for f, p in zip(FLOORS, places) if not p]


def test_the_import_reader_sees_what_it_should(tmp_path):
    "Relative, absolute and inner imports all count"
    source = "from .align import align_layer\nimport lps.zoo\ndef f():\n    from lps.cli import _show\n"
    (tmp_path/"m.py").write_text(source)
    assert imports(tmp_path/"m.py") == [("align", "align_layer"), ("zoo", ""), ("cli", "_show")]
