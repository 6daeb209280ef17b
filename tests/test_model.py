"""One model: its layers by their role, and its features, whatever the head is called"""
import pytest
import torch
from torch import nn

from lps.core.files import save_tensors
from lps.index.index import ModelIndex
from lps.methods.registry import fit_method
from lps.models.inspect import inspect_model
from lps.models.model import Model
from lps.models.modelset import load_modelset
from lps.nets.architectures import ARCHITECTURES, Architecture, register_architecture
from lps.nets.resnet import ResNet
from lps.advice.score import log_me
from lps.study.transfer import task_targets, transfer
from lps.zoo.tasks import ImageSet

STATS = dict(mean=[.5]*3, std=[.25]*3)


class Glance(nn.Module):
    "One convolution; the head is called answer, and another linear layer is called fc"
    def __init__(self, width=6):
        super().__init__()
        self.retina, self.norm = nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width)
        self.fc, self.answer = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x): return self.answer(self.fc(self.norm(self.retina(x)).relu().mean((2, 3))).relu())


def glance(width):
    return Architecture("glance", dict(width=width), Glance, "retina", "answer", ["retina"], {"retina": "norm"})


def glance_config(shapes, **hints):
    return dict(width=shapes["retina.weight"][0]) if "retina.weight" in shapes else None


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "glance", None)
    register_architecture("glance", glance_config, glance)


@pytest.fixture
def images(): return torch.randint(256, (40, 3, 12, 12), dtype=torch.uint8)


def network(seed):
    torch.manual_seed(seed)
    return Glance()


def test_features_are_the_input_of_the_head(registered, images):
    model = Model(network(0).state_dict(), STATS)
    z = model.features(images)
    assert z.shape == (40, 6) and (z >= 0).all()  # ReLU stands before the head, so neither logits nor those of fc
    torch.testing.assert_close(z @ model.state["answer.weight"].T + model.state["answer.bias"], model.outputs(images))


def test_a_set_has_what_its_models_have(registered, images, tmp_path):
    for i in range(4):
        meta = dict(task=i//2, run=i % 2, classes=["a", "b"]) | STATS
        save_tensors(tmp_path/f"m{i}.safetensors", network(i).state_dict(), meta)
    models = load_modelset(tmp_path)
    for name in ("architecture", "channels", "stem", "norms", "branches", "shapes"):
        assert getattr(models, name) == getattr(models[3], name), name
    assert models.architecture.head == "answer" and models.digests[3] == models[3].digest
    assert torch.equal(models.features(images)[3], models[3].features(images))
    assert torch.equal(models.outputs(images)[3], models[3].outputs(images))


def test_transfer_is_measured_on_features_and_not_on_logits(registered, images, tmp_path):
    for i in range(4):
        meta = dict(task=i//2, run=i % 2, classes=[["a", "b"], ["c", "d"]][i//2]) | STATS
        save_tensors(tmp_path/f"m{i}.safetensors", network(i).state_dict(), meta)
    held_out = ImageSet(images, torch.arange(4).repeat(10), list("abcd"), "made up")
    models = load_modelset(tmp_path)
    seen = transfer(models, task_targets(models, held_out))
    own = images[held_out.labels < 2], held_out.labels[held_out.labels < 2]
    assert seen["logme"].iloc[0, 0] == pytest.approx(log_me(models[0].features(own[0]), own[1]))


def test_a_model_that_was_given_its_architecture_is_not_recognised():
    state = network(0).state_dict()
    assert Model(state).architecture is None and Model(state, {}, glance(6)).architecture == glance(6)
    with pytest.raises(ValueError, match="no known architecture"): Model(state).net


def test_a_changed_network_leaves_the_model_alone(images):
    model = Model(ResNet(8, 4).state_dict(), dict(shortcut="conv") | STATS)
    before = model.outputs(images)
    with torch.no_grad(): model.net.fc.weight.zero_()
    model.net.fc = nn.Identity()
    assert torch.equal(model.outputs(images), before)


@pytest.mark.parametrize("meta, kind", [({}, "pad_end"), (dict(shortcut="pad_both"), "pad_both")])
def test_metadata_name_what_shapes_do_not(meta, kind):
    assert Model(ResNet(8, 4, shortcut="pad_end").state_dict(), meta).architecture.config["shortcut"] == kind


@pytest.mark.parametrize("state, stem, channels", [
    (ResNet(8, 4, in_channels=1).state_dict(), "conv1", 1),
    ({"a.weight": torch.zeros(8, 4, 3, 3)}, "a", 4),
    ({"fc.weight": torch.zeros(2, 8)}, None, 3),
])
def test_channels_are_those_of_the_stem(state, stem, channels):
    model = Model(state)
    assert (model.stem, model.channels) == (stem, channels)


def test_a_model_in_a_few_words():
    meta = dict(task=3, classes=["<b>cat</b>", "dog"], val_accuracy=.9)
    model = Model(ResNet(8, 4, n_classes=2).state_dict(), meta)
    assert "architecture: resnet" in repr(model) and "task: 3" in repr(model) and "val accuracy: 0.900" in repr(model)
    assert "&lt;b&gt;cat" in model._repr_html_() and "<b>cat" not in model._repr_html_()
    many = Model(model.state, dict(classes=list("abcdef")))
    assert "classes: a / b / c / d / … (6)" in repr(many)


def test_sets_indexes_and_inspections_in_html(tmp_path):
    for i in range(4): save_tensors(tmp_path/f"m{i}.safetensors", network(i).state_dict(), dict(task=i % 2, run=i//2))
    models = load_modelset(tmp_path)
    index = ModelIndex(fit_method(models, "stem-signature"), models)
    for shown in (models, index):
        assert shown._repr_html_().startswith(f"<p>{shown!r}</p>") and "m3.safetensors" in shown._repr_html_()
    inspection = inspect_model(tmp_path/"m0.safetensors")
    assert "source: m0.safetensors" in repr(inspection).splitlines() and "m0.safetensors" in inspection._repr_html_()


class Fixed(Glance):
    "A network that takes images of one size only"
    def forward(self, x):
        assert x.shape[2:] == (16, 16), f"height {x.shape[2]} is not 16"
        return super().forward(x)


def test_images_of_a_wrong_size_are_named():
    fixed = Architecture("fixed", dict(width=6), Fixed, "retina", "answer", ["retina"], {"retina": "norm"})
    model = Model(network(0).state_dict(), STATS, fixed)
    assert model.outputs(torch.zeros(2, 3, 16, 16)).shape == (2, 2)
    with pytest.raises(ValueError, match=r"images of 3 × 32 × 32 \(height 32 is not 16\): name its input"):
        model.outputs(torch.zeros(2, 3, 32, 32))


def test_a_model_without_filters_is_named():
    with pytest.raises(ValueError, match="no layer 'conv1': the models have no layer with filters"):
        Model({"weight": torch.zeros(2, 3)}).weights(["conv1"])
