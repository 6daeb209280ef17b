"""Readable code: an example after every definition that a user imports, and one idea a statement"""
import ast
import json
import re

import pytest
from conftest import ROOT

LIBRARY = sorted(ROOT.glob("nbs/**/[0-9]*.ipynb"))
COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
per_notebook = pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)


def code_cells(path) -> list[str]:
    "Return the sources of a notebook's code cells, with magics and shell lines blanked"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return [re.sub(r"^[%!].*$", "", source, flags=re.M) for source in sources]


def is_exported(source: str) -> bool:
    "Return whether a cell is part of the module"
    return re.match(r"#\| ?exporti?\b", source) is not None


def is_for_users(source: str) -> bool:
    "Return whether a cell's names are in `__all__`; those of `exporti` cells are not"
    return re.match(r"#\| ?export\b", source) is not None


def shown_as(node) -> str:
    "Return the name that a definition is used by; `@app.command('build')` makes it `build`"
    for decorator in node.decorator_list:
        named = isinstance(decorator, ast.Call) and decorator.args and isinstance(decorator.args[0], ast.Constant)
        if named and isinstance(decorator.func, ast.Attribute) and decorator.func.attr == "command":
            return decorator.args[0].value
    return node.name


def public_names(source: str) -> list[str]:
    "Return the names of public functions, classes and patched methods at the top of a cell"
    defined = [node for node in ast.parse(source).body if isinstance(node, DEFINITIONS)]
    return [shown_as(node) for node in defined if not node.name.startswith("_")]


def names_used(source: str) -> set[str]:
    "Return every name and attribute in a cell's code, and the words of its strings, but no comments"
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name): used.add(node.id)
        if isinstance(node, ast.Attribute): used.add(node.attr)
        if isinstance(node, ast.Constant) and isinstance(node.value, str): used |= set(re.findall(r"\w+", node.value))
    return used


def without_example(cells: list[str]) -> list[str]:
    "Return the definitions for users that no later example of the notebook uses"
    missing = []
    for i, source in enumerate(cells):
        if not is_for_users(source): continue
        shown = set()
        for later in cells[i + 1:]:
            if not is_exported(later): shown |= names_used(later)
        missing += [name for name in public_names(source) if name not in shown]
    return missing


def dense_statements(source: str) -> list[str]:
    "Return the statements that hold several ideas, each with its fault and its line"
    found = []
    for node in ast.walk(ast.parse(source)):
        inner = [other for other in ast.walk(node) if other is not node]
        if isinstance(node, COMPREHENSIONS):
            if any(isinstance(other, ast.NamedExpr) for other in inner): found.append((node.lineno, ":= inside"))
            if any(isinstance(other, COMPREHENSIONS) for other in inner): found.append((node.lineno, "nested"))
            if len(node.generators) > 1: found.append((node.lineno, "several loops"))
        if isinstance(node, ast.IfExp):
            if any(isinstance(other, ast.IfExp) for other in inner): found.append((node.lineno, "chained ternary"))
    lines = source.splitlines()
    return [f"{what}: {lines[number - 1].strip()}" for number, what in sorted(found)]


@per_notebook
def test_every_public_definition_has_an_example(path):
    missing = without_example(code_cells(path))
    assert not missing, f"{path.name} defines {', '.join(missing)}: show each in a later cell that is not exported"


@per_notebook
def test_lines_end_before_column_121(path):
    long = [line for source in code_cells(path) for line in source.splitlines() if len(line) > 120]
    assert not long


@per_notebook
def test_one_idea_a_statement(path):
    dense = []
    for source in code_cells(path): dense += dense_statements(source)
    assert not dense, "\n".join([f"{path.name}: name the inner step, or write a loop", *dense])


def test_a_definition_without_example_is_seen():
    "A use in an exported cell, before the definition, or in a comment does not count; `exporti` needs no example"
    export = "#| export\ndef fit(x): pass\n@patch\ndef score(self: Model): pass\ndef _own(): pass"
    assert without_example(["fit(1)", export, "#| export\nfit(2)", "other(1)  # fit"]) == ["fit", "score"]
    assert without_example([export, "fit(1)", "model.score()"]) == []
    assert without_example([export, "run(['zoo', 'fit']).score"]) == []
    assert without_example([export.replace("export", "exporti")]) == []
    assert without_example([export, "#| exporti\nfit(2)"]) == ["fit", "score"]


@pytest.mark.parametrize("source, what", [
    ("[y for x in xs if (y := x)]", ":= inside"),
    ("[[y for y in x] for x in xs]", "nested"),
    ("{y: 1 for x in xs for y in x}", "several loops"),
    ("1 if a else 2 if b else 3", "chained ternary"),
])
def test_a_dense_statement_is_seen(source, what):
    assert dense_statements(f"before = 1\n{source}") == [f"{what}: {source}"]
    assert dense_statements("[x for x in xs]\nif (y := 1): z = 1 if y else 2") == []
