"Fitted methods: what cannot be learned, embedded or read is refused; everything else comes back the same"
import copy
import subprocess
import sys

import pytest
import torch
from fastcore.test import expect_fail
from hypothesis import given, strategies as st

from lps.core.files import save_tensors
from lps.methods.registry import (
    BUILT_IN, METHODS, embed_models, fit_method, fit_observed, get_method, known_settings, load_fitted, save_fitted,
    score_models, why_not,
)
from lps.models.model import Model
from lps.nets.resnet import ResNet
from lps.second_order import fit

SHAPE = 6, 4, 3, 3


def some_models(seed=0):
    "Weights by layer and labels of eight made-up models of two tasks"
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(8, *SHAPE, generator=g)
    labels = torch.tensor([0, 1]*4)
    return {"first": weights + labels[:, None, None, None, None]}, labels


def fitted_by(method, **settings):
    "A method fitted on the made-up models, for two epochs"
    weights, labels = some_models()
    return fit_observed(method, weights, labels, layers=["first"], stem="first", epochs=2, n_filters=3, **settings)


OF_WEIGHTS = [name for name, method in METHODS.items() if method.observe is None]  # the others have tests of their own


@pytest.mark.parametrize("method", OF_WEIGHTS)
def test_a_fitted_method_comes_back_from_its_file(method, tmp_path):
    net, (weights, _) = fitted_by(method), some_models(1)
    save_fitted(tmp_path/"net.safetensors", net)
    again = load_fitted(tmp_path/"net.safetensors")
    assert (again.method, again.tasks, again.config) == (net.method, net.tasks, net.config)
    assert embed_models(again, weights).equal(embed_models(net, weights))
    assert score_models(again, weights).equal(score_models(net, weights))


@pytest.mark.parametrize("method", OF_WEIGHTS)
@pytest.mark.parametrize("scale", [1e38, float("inf"), float("nan")])
def test_weights_that_overflow_have_no_embedding(method, scale):
    net, (weights, _) = fitted_by(method), some_models()
    broken = weights["first"].clone()
    broken[2] *= scale
    with expect_fail(ValueError, "no finite embedding for model 2"): embed_models(net, {"first": broken})


@pytest.mark.parametrize("setting, words", [
    (dict(epochs=-1), "epochs is -1"),
    (dict(epochs=0), "epochs is 0"),
    (dict(bs=0), "bs is 0"),
    (dict(per_task=0), "per_task is 0"),
    (dict(lr=float("nan")), "lr is nan"),
])
def test_a_recipe_that_cannot_work_is_refused(setting, words):
    weights, labels = some_models()
    with expect_fail(ValueError, words): fit(weights, labels=labels, **setting)


def test_nothing_to_learn_from_is_refused():
    weights, labels = some_models()
    with expect_fail(ValueError, "one layer or more"): fit({}, labels=labels)
    with expect_fail(ValueError, "no labels"): fit(weights)
    with expect_fail(ValueError, "two tasks or more"): fit(weights, labels=0*labels)
    with expect_fail(ValueError, "one label a model"): fit(weights, labels=labels[:3])
    with expect_fail(ValueError, "two tasks or more"): fit({"first": weights["first"][:0]}, labels=labels[:0])


def test_an_unknown_method_is_named_with_those_known():
    weights, labels = some_models()
    with expect_fail(ValueError, "lps"): get_method("lsp")
    with expect_fail(ValueError): fit(weights, labels=labels, method="lsp")
    with expect_fail(ValueError, "lps"): fit_method(None, "lsp")


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_setting_is_named_with_those_known(method):
    "Before any model is read"
    with expect_fail(ValueError, f"has no setting 'epoch': its settings are {', '.join(known_settings(method))}"):
        fit_method(None, method, epoch=3)


def test_a_method_is_found_without_importing_the_others():
    code = "import sys; from lps.methods.registry import METHODS, get_method; list(METHODS); get_method('lps');"
    code += "print(sorted(m for m in sys.modules if m.startswith('lps.methods.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['lps.methods.fitted', 'lps.methods.paper', 'lps.methods.registry']\n"
    assert set(METHODS) >= {name for names in BUILT_IN.values() for name in names}


odd_values = st.one_of(
    st.none(), st.booleans(), st.integers(-2**70, 2**70), st.floats(), st.text(max_size=4), st.just([]), st.just({}),
    st.just([-1]), st.just([[1]]), st.just({"first": [1, 2]}), st.just({"first": [2**40]*4}), st.just([0, 0]),
)


@pytest.fixture(scope="module")
def net():
    return fitted_by("lps")


@given(data=st.data())
def test_wrong_types_in_a_net_file_are_a_value_error(net, tmp_path, data):
    config = copy.deepcopy(net.parts["config"])
    config[data.draw(st.sampled_from(sorted(config)))] = data.draw(odd_values)
    path = tmp_path/"net.safetensors"
    save_tensors(path, net.state_dict(), dict(second_order=config))
    try: load_fitted(path)
    except (ValueError, OSError): pass


@pytest.fixture(scope="module")
def saved(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("nets")/"net.safetensors"
    save_fitted(path, net)
    return path.read_bytes()


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_gives_another_network(net, saved, tmp_path, place, bit):
    data = bytearray(saved)
    data[int(place*len(data))] ^= 1 << bit
    path = tmp_path/"net.safetensors"
    path.write_bytes(data)
    try: again = load_fitted(path)
    except (ValueError, OSError): return
    assert again.config == net.config
    assert all(tensor.equal(net.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_whole_network_can_be_compared_by_every_method_but_read_out():
    model = Model(ResNet(depth=8, width=4).state_dict())
    assert list(why_not(model)) == ["read-out"]
