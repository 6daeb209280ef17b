"""The layers: folders of lps/ have one order, and a module imports only from its own layer and those below"""
import ast

import pytest
import yaml
from conftest import ROOT

LAYERS = [
    "core", "order_chain", "nets", "models", "zoo", "align", "second_order",
    "methods", "lineage", "advice", "study", "index", "demo", "cli",
]
TITLES = dict(
    core="Core", nets="Networks", models="Models", zoo="Zoo", methods="Methods", lineage="Lineage",
    advice="Advice", study="Study", index="Index",
)
MODULES = {
    path.relative_to(ROOT/"lps").with_suffix("").as_posix().replace("/", "."): path
    for path in sorted(ROOT.glob("lps/**/*.py")) if not path.stem.startswith("_")
}


def imports(path, package: str) -> list[tuple[str, str]]:
    "Return every (module of lps, name) that a module imports, at its top or inside a function"
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(a.name.removeprefix("lps."), "") for a in node.names if a.name.startswith("lps.")]
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parents = package.split(".")[:len(package.split(".")) - node.level + 1]
                module = ".".join([*parents, module]).rstrip(".")
            if module == "lps": found += [(a.name, "") for a in node.names if a.name in MODULES]
            elif module.startswith("lps."): found += [(module.removeprefix("lps."), a.name) for a in node.names]
    return found


def imports_of(module: str) -> list[tuple[str, str]]:
    "Return the imports of a module of the library from the library"
    return imports(MODULES[module], f"lps.{module}".rpartition(".")[0])


def layer_of(module: str) -> str:
    return module.partition(".")[0]


def level(module: str, levels: dict) -> int:
    "Return the length of the longest chain of imports below a module; raise for a cycle"
    if module not in levels:
        levels[module] = None
        below = {other for other, _ in imports_of(module)} & set(MODULES)
        levels[module] = 1 + max([level(other, levels) for other in sorted(below)], default=0)
    assert levels[module] is not None, f"{module} imports itself through others"
    return levels[module]


def test_every_module_has_its_layer():
    assert {layer_of(module) for module in MODULES} == set(LAYERS)
    assert len([module for module in MODULES if "." not in module]) <= 6


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    above = LAYERS[LAYERS.index(layer_of(module)) + 1:]
    assert not [f"{other}.{name}" for other, name in imports_of(module) if layer_of(other) in above]


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_crosses_a_module(module):
    assert not [f"{other}.{name}" for other, name in imports_of(module) if name.startswith("_")]


def test_no_cycle_and_few_levels():
    levels = {}
    assert max(level(module, levels) for module in MODULES) <= 12, levels


MOST_PUBLIC_NAMES = 200  # of all modules together


def public_names(path) -> list[str]:
    "Return `__all__` of a module"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if is_all: return ast.literal_eval(node.value)
    return []


def test_few_names_are_public():
    "`__all__` holds what a user imports; internal definitions stand in `exporti` cells"
    counts = {name: len(public_names(path)) for name, path in MODULES.items()}
    assert sum(counts.values()) <= MOST_PUBLIC_NAMES, sorted(counts.items(), key=lambda item: -item[1])[:10]


def test_a_notebook_lies_in_its_modules_folder():
    "nbs/nets/00_resnet.ipynb defines nets.resnet"
    written = sorted(path.relative_to(ROOT/"nbs").with_suffix("") for path in ROOT.glob("nbs/**/[0-9]*.ipynb"))
    modules = {(path.parent/path.name[3:]).as_posix().replace("/", ".") for path in written}
    assert modules == set(MODULES)


def test_notebooks_of_a_folder_are_numbered_without_gaps():
    for folder in [ROOT/"nbs", *sorted(path for path in (ROOT/"nbs").iterdir() if path.is_dir())]:
        numbers = sorted(int(path.name[:2]) for path in folder.glob("[0-9]*.ipynb"))
        assert numbers == list(range(len(numbers))), folder


def test_sidebar_shows_the_folders():
    config = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
    sections = [s for s in config["website"]["sidebar"]["contents"] if isinstance(s, dict) and "section" in s]
    shown = {s["section"]: s["contents"] for s in sections}
    for folder, title in TITLES.items():
        notebooks = sorted(path.relative_to(ROOT/"nbs").as_posix() for path in ROOT.glob(f"nbs/{folder}/*.ipynb"))
        assert shown[title] == notebooks


def test_the_import_reader_sees_what_it_should(tmp_path):
    "Relative, absolute and inner imports all count"
    source = "from .align import align_layer\nimport lps.zoo.build\ndef f():\n    from lps.cli import _show\n"
    (tmp_path/"m.py").write_text(source + "    from ..core.files import digest\n")
    found = imports(tmp_path/"m.py", "lps.index")
    assert found == [
        ("index.align", "align_layer"), ("zoo.build", ""), ("cli", "_show"), ("core.files", "digest"),
    ]
