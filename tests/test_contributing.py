"""The four examples of CONTRIBUTING.md run as printed, and their entries appear everywhere"""
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lps.nets.architectures import ARCHITECTURES, recognise, shapes_of
from lps.cli import main
from lps.zoo.datasheet import datasheet, datasheet_text
from lps.study.table1 import table1
from lps.study.page import overview, show_overview
from lps.study.registry import EXPERIMENTS, result_path
from lps.core.files import save_tensors
from lps.methods.registry import METHODS, embed_models, fit_method, load_fitted
from lps.models.modelset import load_modelset
from lps.order_chain import permute, random_perms
from lps.study.records import RunsRecord, runs_fields, summary
from lps.index.index import ModelIndex
from lps.zoo.tasks import DATASETS
from lps.zoo.recipe import recipes
from lps.zoo.build import build

PAGE = (Path(__file__).parent.parent/"CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = r"^```python\n(.*?)^```$"
EXAMPLES = re.findall(CODE, PAGE, flags=re.M | re.S)
HEADINGS = ("A method", "A kind of network", "A data set", "An experiment")
REGISTRIES = METHODS, ARCHITECTURES, DATASETS, EXPERIMENTS


@pytest.fixture(autouse=True)
def registries():
    "Forget the entries of an example after the test"
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, kept in zip(REGISTRIES, before):
        registry.clear()
        registry.update(kept)


def run_example(heading) -> dict:
    "Run the example under a heading; return its definitions"
    sections = re.split("^### ", PAGE, flags=re.M)
    section, = [section for section in sections if section.split("\n")[0].split(":")[0] == heading]
    code = re.search(CODE, section, flags=re.M | re.S)[1]
    defined = {"__name__": "example"}
    exec(compile(code, f"CONTRIBUTING.md, {heading}", "exec"), defined)
    return defined


def plain(text): return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def test_there_is_one_example_for_each_registry():
    assert len(EXAMPLES) == len(HEADINGS)
    for heading, registry in zip(HEADINGS, REGISTRIES):
        before = set(registry)
        run_example(heading)
        assert len(set(registry) - before) == 1, heading


def test_the_method(tmp_path, capsys):
    run_example("A method")
    assert main(["methods"]) == 0
    assert "lengths" in plain(capsys.readouterr().out)
    out = tmp_path/"out.safetensors"
    assert main(["fit", "bundled", "--method", "lengths", "--out", str(out)]) == 0
    models = load_modelset("bundled")
    index = ModelIndex(load_fitted(out), models)
    assert index.query(models[3], 1, with_self=True).file[1] == models.manifest.file[3]
    few = models[models.manifest.task < 4]
    assert "Lengths of filters" in summary(table1(few, 2, 2, methods=("lengths",), classifier="nearest")).index


def test_the_architecture(tmp_path):
    Glance = run_example("A kind of network")["Glance"]
    for i in range(4):
        torch.manual_seed(i)
        save_tensors(tmp_path/f"m{i}.safetensors", Glance().state_dict(), dict(task=i//2, run=i % 2))
    models, x = load_modelset(tmp_path), torch.randn(2, 3, 9, 9)
    assert models.stem == "retina"
    kind = recognise(shapes_of(models[0].state))
    assert kind.name == "glance" and kind.config == dict(width=6)
    spec = kind.spec
    shuffled = permute(models[0].state, spec, random_perms(spec, 1))
    assert not torch.equal(shuffled["retina.weight"], models[0].state["retina.weight"])
    with torch.no_grad(): torch.testing.assert_close(kind.rebuild(shuffled)(x), models[0].net(x))
    assert models.weights(["retina"], folded=True)["retina"].shape == (4, 6, 3, 3, 3)
    fitted = fit_method(models, "lps", epochs=1, n_filters=4)
    assert fitted.layers == ["retina"] and len(embed_models(fitted, models)) == 4


def test_the_data_set(tmp_path, capsys):
    run_example("A data set")
    assert main(["zoo", "build", "--help"]) == 0
    assert "shades" in plain(capsys.readouterr().out)
    recipe = replace(recipes["digits"], name="tiny", epochs=1, milestones=(), depth=8, width=4)
    models = build(tmp_path/"zoo", images="shades", recipe=recipe, n_tasks=1, n_models=2, workers=1)
    assert models[0].meta["classes"] == ["dark", "light"]
    assert "made up for this page" in datasheet_text(datasheet(models, "Shades"))


def test_the_experiment(tmp_path):
    run_example("An experiment")
    models = load_modelset("bundled")
    models = models[models.manifest.task < 3]
    few = dict(epochs=2, milestones=(1,), n_filters=4)
    how = dict(name="bundled", n_splits=2, seed=0, layers=["conv1"], momentum=.9, folded=False)
    fields = runs_fields(table1(models, 2, 2, methods=("lps",), **few))
    RunsRecord.make(models, how | few, **fields).write(result_path(tmp_path, "hurried", "bundled"))
    grid = overview(tmp_path)
    assert grid.index.tolist() == [("not in the paper", "two epochs are enough", "top-1")]
    assert grid["bundled"].iloc[0].endswith("%")
    assert "two epochs are enough" in show_overview(tmp_path).data
