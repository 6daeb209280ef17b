"""A kind of network defined out here is recognised, folded, shuffled and compared; made-up shapes are never built"""
import time

import pytest
import torch
from torch import nn

from lps.nets.architectures import (ARCHITECTURES, Architecture, branch_layers, convolutions, net_from_state, norms_of,
                               recognise, register_architecture, shapes_of, stem_of)
from lps.core.files import save_tensors
from lps.methods.registry import embed_models, fit_method
from lps.models.modelset import load_modelset
from lps.order_chain import PermutationSpec, permute, random_perms
from lps.nets.resnet import MAX_DEPTH, SHORTCUTS, ResNet, resnet_config


class Plain(nn.Module):
    "Two convolutions with norms and a head; by the alphabet, the layer that reads the image comes last"
    def __init__(self, width=6, deep=5):
        super().__init__()
        self.retina, self.retina_norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.cortex, self.cortex_norm = nn.Conv2d(width, deep, 3, padding=1, bias=False), nn.BatchNorm2d(deep)
        self.answer = nn.Linear(deep, 2)

    def forward(self, x):
        x = self.cortex_norm(self.cortex(self.retina_norm(self.retina(x)).relu())).relu()
        return self.answer(x.mean((2, 3)))


def plain_config(shapes, **hints):
    if "retina.weight" not in shapes or "cortex.weight" not in shapes: return None
    return dict(width=shapes["retina.weight"][0], deep=shapes["cortex.weight"][0])


def plain_spec(width, deep):
    groups, axes = {"retina": width, "cortex": deep}, {
        "answer.weight": (None, ("cortex",)),
        "answer.bias": (None,),
    }
    for layer, read in (("retina", None), ("cortex", ("retina",))):
        axes[f"{layer}.weight"] = ((layer,), read)
        for vector in ("weight", "bias", "running_mean", "running_var"): axes[f"{layer}_norm.{vector}"] = ((layer,),)
        axes[f"{layer}_norm.num_batches_tracked"] = ()
    return PermutationSpec(groups, axes)


def plain_architecture(width, deep):
    return Architecture(
        name="plain",
        config=dict(width=width, deep=deep),
        network=Plain,
        stem="retina",
        head="answer",
        branches=["retina", "cortex"],
        norms={layer: f"{layer}_norm" for layer in ("retina", "cortex")},
        spec=plain_spec(width, deep),
    )


@pytest.fixture
def plain(monkeypatch):
    "The registry with one more entry, which goes with the test"
    monkeypatch.setitem(ARCHITECTURES, "plain", None)
    register_architecture("plain", plain_config, plain_architecture)
    return plain_architecture


def plain_model(seed):
    "A network in evaluation mode whose norms do something"
    torch.manual_seed(seed)
    net = Plain().eval()
    for norm in (net.retina_norm, net.cortex_norm):
        norm.weight.data.uniform_(.5, 1.5)
        norm.running_mean.normal_(0, .3)
        norm.running_var.uniform_(.5, 2)
    return net


@pytest.fixture
def folder(tmp_path):
    for i in range(8):
        save_tensors(tmp_path/f"m{i}.safetensors", plain_model(i).state_dict(), dict(task=i//4, run=i % 4))
    return tmp_path


def test_it_is_recognised_by_its_tensors(plain):
    shapes = shapes_of(Plain(7, 4).state_dict())
    assert recognise(shapes) == plain(width=7, deep=4)
    assert stem_of(shapes) == "retina" and branch_layers(shapes) == ["retina", "cortex"]
    assert norms_of(shapes) == {"retina": "retina_norm", "cortex": "cortex_norm"}
    assert recognise(shapes_of(ResNet(8, 4).state_dict())).name == "resnet"


@torch.no_grad()
def test_its_own_specification_leaves_the_logits_equal(plain):
    net, x = plain_model(0), torch.randn(4, 3, 9, 9)
    spec = recognise(shapes_of(net.state_dict())).spec
    shuffled = permute(net.state_dict(), spec, random_perms(spec, 3))
    assert not torch.equal(shuffled["cortex.weight"], net.cortex.weight)
    torch.testing.assert_close(net_from_state(shuffled)(x), net(x))


@torch.no_grad()
def test_a_model_set_knows_it(plain, folder):
    models, x = load_modelset(folder), torch.randn(2, 3, 9, 9)
    assert models.stem == "retina"
    torch.testing.assert_close(models[5].net(x), plain_model(5)(x))
    net = plain_model(3)
    scale = net.cortex_norm.weight/(net.cortex_norm.running_var + net.cortex_norm.eps).sqrt()
    torch.testing.assert_close(
        models.weights(["cortex"], folded=True)["cortex"][3], net.cortex.weight * scale[:, None, None, None]
    )


def test_similarities_keep_its_image_channels_and_match_the_others(plain, folder):
    models = load_modelset(folder)
    fitted = fit_method(models, "lps", layers=["retina", "cortex"], epochs=2, n_filters=4)
    before, spec = embed_models(fitted, models), models.architecture.spec
    for i in range(8):
        state = permute(models[i].state, spec, random_perms(spec, i))
        save_tensors(folder/f"m{i}.safetensors", state, dict(task=i//4, run=i % 4), replace=True)
    torch.testing.assert_close(embed_models(fitted, load_modelset(folder)), before, rtol=1e-4, atol=1e-5)
    assert fitted.config.stem == "retina"


def test_without_an_entry_the_stem_is_the_layer_that_reads_an_image(tmp_path):
    "A file's tensors come in any order: here the layer named last reads the image"
    state = plain_model(0).state_dict()
    save_tensors(tmp_path/"m.safetensors", {name: state[name] for name in reversed(state)}, dict(task=0))
    models = load_modelset(tmp_path)
    assert recognise(models.shapes) is None and convolutions(models.shapes)[0] == "cortex"
    assert models.stem == "retina" == stem_of(models.shapes)
    with pytest.raises(ValueError, match="no known architecture"): models[0].net


@pytest.mark.parametrize("shapes, stem", [
    ({"a.weight": (8, 16, 3, 3), "b.weight": (16, 3, 7, 7)}, "b"),
    ({"a.weight": (8, 16, 3, 3), "b.weight": (16, 1, 5, 5)}, "b"),
    ({"depthwise.weight": (8, 1, 3, 3), "first.weight": (8, 3, 3, 3)}, "first"),
    ({"a.weight": (8, 5, 3, 3), "b.weight": (8, 8, 3, 3)}, "a"),
    ({"fc.weight": (2, 64)}, None), ({}, None)])
def test_stem_of_networks_that_nobody_registered(shapes, stem): assert stem_of(shapes) == stem


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("depth", [8, 14, 20, 32])
def test_norms_and_branches_of_a_resnet_are_all_its_modules(depth, shortcut):
    net = ResNet(depth, 4, shortcut=shortcut)
    shapes, convs = shapes_of(net.state_dict()), {name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(norms_of(shapes)) == convs == set(convolutions(shapes))
    assert all(isinstance(net.get_submodule(norm), nn.BatchNorm2d) for norm in norms_of(shapes).values())
    assert set(branch_layers(shapes)) == {name for name in convs if "downsample" not in name}


def made_up(n): return {f"layer1.{i}.x": (1,) for i in range(n)} | {"conv1.weight": (16, 3, 3, 3), "fc.weight": (2, 64)}


@pytest.mark.parametrize("shapes", [
    made_up(200), made_up(3000), made_up(10**5),
    {"conv1.weight": (10**12, 3, 3, 3), "fc.weight": (2, 4*10**12), "layer1.0.x": ()},
    {"conv1.weight": (2**62, 3, 3, 3), "fc.weight": (2**62, 5), "layer1.0.x": ()},
    {"conv1.weight": (0, 3, 3, 3), "fc.weight": (2, 0), "layer1.0.x": ()},
    {"conv1.weight": (), "fc.weight": ()}, {"conv1.weight": (4, 3), "fc.weight": (2, 16)}])
@pytest.mark.filterwarnings("error")
def test_made_up_shapes_are_of_no_known_kind(shapes):
    assert recognise(shapes) is None
    with pytest.raises(ValueError, match="not the state of a CIFAR ResNet"): resnet_config(shapes)


def test_the_deepest_network_is_laid_out_in_seconds():
    "Time is bounded generously: the blocks of a stage are laid out once, not 200 times"
    with torch.device("meta"): shapes = shapes_of(ResNet(MAX_DEPTH, 2).state_dict())
    start = time.perf_counter()
    for _ in range(5): assert recognise(shapes).config["depth"] == MAX_DEPTH
    assert len(norms_of(shapes)) == MAX_DEPTH + 1 and time.perf_counter() - start < 5


def state_with(**changes):
    return ResNet(8, 4).state_dict() | {name.replace("__", "."): v for name, v in changes.items()}


@pytest.mark.parametrize("state, words", [
    ([1, 2], "a list is no state dict"), ({}, "no known architecture"), ({0: torch.zeros(1)}, "0 is no name"),
    ({"conv1.weight": [1.]}, "'conv1.weight' is of type list"), ({"conv1.weight": None}, "of type NoneType"),
    (state_with(fc__bias=torch.zeros(2, device="meta")), "'fc.bias' is on meta"),
    (state_with(fc__bias=torch.zeros(2).to_sparse()), "to_dense"),
    (state_with(fc__bias=torch.zeros(2, dtype=torch.int8)), "is torch.int8"),
    (state_with(fc__bias=torch.zeros(2, dtype=torch.complex64)), "is torch.complex64"),
    (state_with(fc__bias=torch.zeros(2, dtype=torch.bool)), "is torch.bool"),
    (state_with(fc__bias=torch.zeros(1).expand(2)), "claims 2 values and holds fewer"),
    ({"conv1.weight": torch.zeros(1).expand(10**6, 10**3, 3, 3)}, "claims 9000000000 values"),
    ({"\x1b[31m.weight": torch.zeros(1)}, r"\x1b[31m.weight:")])
def test_what_is_no_state_is_refused_with_the_cure(state, words):
    with pytest.raises(ValueError) as e: net_from_state(state)
    assert words in str(e.value) and "\x1b" not in str(e.value)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_and_other_precisions_are_taken(dtype):
    model, x = ResNet(8, 4).eval(), torch.randn(2, 3, 9, 9)
    assert torch.equal(net_from_state(dict(model.named_parameters()) | dict(model.named_buffers()))(x), model(x))
    again = net_from_state(
        {name: v.to(dtype) if v.is_floating_point() else v for name, v in model.state_dict().items()}
    )
    assert again.fc.weight.dtype == torch.float32
    torch.testing.assert_close(again(x), model(x), rtol=.05, atol=.05)
