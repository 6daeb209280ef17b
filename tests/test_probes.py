"Probes: what leaves a network's outputs as they are leaves its embedding; what cannot be run or read is refused"
import pytest
import torch
from fastcore.test import expect_fail

from lps.core.files import save_tensors
from lps.methods.registry import embed_models, fit_method, load_fitted, observations, save_fitted, score_models
from lps.models.model import Model
from lps.models.modelset import load_modelset
from lps.order_chain import permute, random_perms
from lps.methods.probes import Probes
from lps.methods.synthetic import noise_images
from lps.nets.architectures import net_from_state
from lps.nets.resnet import SHORTCUTS, ResNet, bn_of, resnet_spec
from lps.index.index import ModelIndex


def some_state(seed=0, shortcut="conv", depth=8, **kwargs):
    "Tensors of a network whose batch normalisation does something"
    torch.manual_seed(seed)
    net = ResNet(depth, 4, shortcut=shortcut, **kwargs)
    for m in net.modules():
        if not isinstance(m, torch.nn.BatchNorm2d): continue
        m.weight.data.uniform_(.5, 1.5)
        m.bias.data.normal_(0, .3)
        m.running_mean.normal_(0, .3)
        m.running_var.uniform_(.5, 2)
    return {name: v.clone() for name, v in net.state_dict().items()}


def model(state, shortcut="conv"): return Model(state, dict(shortcut=shortcut))


def shuffled(state, shortcut):
    "All groups of channels in another order"
    spec = resnet_spec(8, 4, shortcut)
    return permute(state, spec, random_perms(spec, 1))


def folded(state, shortcut):
    "The scales of the batch normalisation in the filters"
    state = dict(state)
    for conv in [name.removesuffix(".weight") for name, v in state.items() if v.ndim == 4]:
        bn = bn_of(conv)
        scale = state[f"{bn}.weight"]/(state[f"{bn}.running_var"] + 1e-5).sqrt()
        state[f"{conv}.weight"] = state[f"{conv}.weight"]*scale[:, None, None, None]
        state[f"{bn}.bias"] = state[f"{bn}.bias"] - state[f"{bn}.running_mean"]*scale
        state[f"{bn}.weight"] = torch.ones_like(scale)
        state[f"{bn}.running_mean"] = torch.zeros_like(scale)
        state[f"{bn}.running_var"] = torch.full_like(scale, 1 - 1e-5)
    return state


def rescaled(state, shortcut):
    "Every channel of every group, inner ones and streams, times a number above 0 that what reads it undoes"
    spec, g, new = resnet_spec(8, 4, shortcut), torch.Generator().manual_seed(2), {}
    scales = {group: .5 + torch.rand(n, generator=g) for group, n in spec.sizes.items()}
    for name, v in state.items():
        axes = [axis and torch.cat([scales[group] for group in axis]) for axis in spec.axes_to_perm[name]]
        vector = v.ndim == 1 and name != "fc.bias" and not name.endswith(("running_mean", "running_var"))
        if vector: v = v*axes[0]
        if v.ndim > 1 and axes[1] is not None: v = v/axes[1].reshape(-1, *(1,)*(v.ndim - 2))
        new[name] = v
    return new


CHANGES = shuffled, folded, rescaled


@pytest.fixture(scope="module", params=SHORTCUTS)
def shortcut(request): return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Three tasks: two networks each, that differ by a little noise"
    folder = tmp_path_factory.mktemp("nets")
    for task in range(3):
        for run in range(2):
            state = some_state(task)
            state["fc.weight"] += .01*run
            save_tensors(folder/f"task{task}_run{run}.safetensors", state, dict(task=task, run=run, shortcut="conv"))
    return load_modelset(folder)


@pytest.fixture(scope="module")
def probes(models): return fit_method(models, "probes", n_images=48)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_what_leaves_the_outputs_leaves_the_embedding(probes, shortcut, change):
    state, x = some_state(7, shortcut), noise_images(8, seed=3)
    new = change(state, shortcut)
    assert not torch.allclose(new["layer1.0.conv2.weight"], state["layer1.0.conv2.weight"], rtol=.1)
    logits = net_from_state(state, shortcut=shortcut)(x)
    found = net_from_state(new, shortcut=shortcut)(x)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4*logits.abs().max())
    a, b = (embed_models(probes, model(s, shortcut)) for s in (state, new))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4*a.abs().max())


def test_exchanged_classes_are_one_task(probes):
    state = some_state(7)
    swapped = state | {name: state[name].flip(0) for name in ("fc.weight", "fc.bias")}
    a, b = (embed_models(probes, model(s)) for s in (state, swapped))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    other = embed_models(probes, model(some_state(8)))
    assert (a @ other.T).item() < .9


def test_networks_of_another_kind_have_embeddings_beside_them(probes):
    "Deeper, or of five classes: as long, and compared by a cosine"
    states = some_state(0, depth=14), some_state(0, n_classes=5)
    z = torch.cat([embed_models(probes, model(s)) for s in states])
    assert z.shape[1] == probes.tensors["centres"].shape[1]
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))


def test_they_come_back_from_a_file(models, probes, tmp_path):
    save_fitted(tmp_path/"probes.safetensors", probes)
    again = load_fitted(tmp_path/"probes.safetensors")
    assert (again.method, again.tasks, again.config) == (probes.method, probes.tasks, probes.config)
    assert torch.equal(embed_models(again, models), embed_models(probes, models))
    assert torch.equal(score_models(again, models), score_models(probes, models))
    assert torch.equal(score_models(probes, models).argmax(1), models.labels)


def test_an_index_finds_the_other_network_of_a_task(models, probes, tmp_path):
    ModelIndex(probes, models[[0, 2, 4]]).save(tmp_path/"index.zip")
    index = ModelIndex.load(tmp_path/"index.zip")
    for place in (1, 3, 5): assert index.query(models[place], k=1).task.tolist() == [place//2]
    deeper = index.query(model(some_state(0, "pad_end", depth=14), "pad_end"), k=3)  # another architecture may ask
    assert sorted(deeper.task) == [0, 1, 2]


@pytest.mark.parametrize("field, value", [
    ("tasks", ["a"]), ("tasks", [0, 1]), ("tasks", None), ("n_images", -1),
    ("n_images", 10**9), ("n_images", 47), ("n_images", "48"), ("n_images", 1.5), ("probe_seed", -1),
    ("probe_seed", 2**70), ("probe_seed", None),
])
def test_a_config_that_does_not_fit_is_refused(probes, field, value):
    with expect_fail(ValueError): Probes.restore(probes.parts["config"] | {field: value}, probes.state_dict(), "probes")
    with expect_fail(ValueError, field):
        config = {name: v for name, v in probes.parts["config"].items() if name != field}
        Probes.restore(config, probes.state_dict(), "probes")


@pytest.mark.parametrize("centres", [torch.zeros(3, 4), torch.zeros(3, 48*49//2, dtype=torch.float64)])
def test_centres_that_do_not_fit_are_refused(probes, centres):
    with expect_fail(ValueError, "centres"): Probes.restore(probes.parts["config"], dict(centres=centres), "probes")


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_network_that_gives_no_numbers_is_refused(probes, scale):
    state = some_state(7)
    broken = model(state | {"fc.bias": state["fc.bias"] + scale})
    with expect_fail(ValueError, "contain NaN or inf"): embed_models(probes, broken)


def test_a_network_that_always_says_the_same_has_no_embedding(probes):
    state = some_state(7)
    with expect_fail(ValueError, "model 0"):
        embed_models(probes, model(state | {"fc.weight": 0*state["fc.weight"]}))


def test_the_bank_is_decided_by_its_seed(models):
    a, b, c = (fit_method(models, "probes", n_images=16, probe_seed=s) for s in (0, 0, 1))
    first, again, other = (fitted.tensors["centres"] for fitted in (a, b, c))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert observations(models, a)["outputs"].shape == (6, 16, 2)
