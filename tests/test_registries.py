"""A method and a data set that are defined elsewhere appear everywhere"""
import re
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from lps.methods import registry as methods
from lps.zoo import tasks
from lps.cli import main
from lps.zoo.datasheet import datasheet, datasheet_text
from lps.study.table1 import table1
from lps.methods.fitted import Fitted, FittedConfig
from lps.methods.registry import Method, fit_method, load_fitted, register_method, save_fitted
from lps.models.modelset import load_modelset
from lps.study.records import runs_fields, summary
from lps.index.index import ModelIndex
from lps.zoo.tasks import DataSet, ImageSet, register_dataset
from lps.zoo.recipe import recipes
from lps.zoo.build import build


class Strength(Fitted):
    "Compare the sorted norms of the filters, which do not depend on their order"
    def embed(self, weights):
        norms = [weights[layer].flatten(2).norm(dim=2).sort(descending=True).values for layer in self.layers]
        return normalize(torch.cat(norms, 1), dim=1)


def fit_strength(weights, labels, seed): return Strength(FittedConfig(tasks=labels.unique().tolist()))
def reads_stem(models, layers=None, folded=False): return [models.stem]


STRENGTH = Method("strength", "Norms of filters", True, reads_stem, fit_strength, Strength)


@pytest.fixture
def strength(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "strength", None)  # put back after the test
    register_method(STRENGTH)


def plain(text): return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def test_a_method_from_outside_arrives_everywhere(strength, tmp_path, capsys):
    models = load_modelset("bundled")
    fitted = fit_method(models, "strength")
    save_fitted(tmp_path/"fitted.safetensors", fitted)
    again = load_fitted(tmp_path/"fitted.safetensors")
    assert isinstance(again, Strength) and again.tasks == models.tasks
    ModelIndex(fitted, models).save(tmp_path/"index.zip")
    index = ModelIndex.load(tmp_path/"index.zip")
    assert index.fitted.method == "strength" and index.query(models[3], 1, with_self=True).similarity[1] > 0.9999
    assert main(["methods"]) == 0
    assert "strength" in plain(capsys.readouterr().out)
    out = tmp_path/"out.safetensors"
    assert main(["fit", "bundled", "--method", "strength", "--out", str(out)]) == 0
    assert load_fitted(out).layers == ["conv1"]
    few = models[models.manifest.task < 4]
    runs = table1(few, 2, 2, methods=("strength",), classifier="nearest")
    assert "Norms of filters" in summary(runs).index and "Norms of filters" in runs_fields(runs)["summary"]


def light_or_dark(split, **kwargs):
    "Return images of two classes that are easy to classify"
    labels = torch.arange(40) % 2
    noise = torch.randint(100, (40, 3, 8, 8), generator=torch.Generator().manual_seed(len(split)))
    return ImageSet((noise + 150*labels[:, None, None, None]).to(torch.uint8), labels, ["dark", "light"], "lights")


def test_a_data_set_from_outside_arrives_everywhere(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(tasks.DATASETS, "lights", None)
    register_dataset(DataSet("lights", light_or_dark, "made up for a test; do with them what you like"))
    recipe = replace(recipes["digits"], name="tiny", epochs=1, milestones=(), depth=8, width=4)
    models = build(tmp_path/"zoo", images="lights", recipe=recipe, n_tasks=1, n_models=2, workers=1)
    assert len(models) == 2 and models[0].meta["classes"] == ["dark", "light"]
    assert "made up for a test" in datasheet_text(datasheet(models, "Lights"))
    assert main(["zoo", "build", "--help"]) == 0
    assert "lights" in plain(capsys.readouterr().out)
