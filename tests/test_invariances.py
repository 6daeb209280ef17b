"Each invariance that a method of the registry claims is exact; what changes the embedding is not claimed"
import pytest
import torch
from networks import flipped, scaled, shuffled, some_net, write_models

from lps.methods.registry import INVARIANCES, METHODS, embed_models, fit_method, own_settings
from lps.models.model import Model
from lps.nets.resnet import ResNet


def small_fit(models, name):
    "A method, fitted in no time"
    few = dict(n_images=16, steps=2, n_steps=20, epochs=1, milestones=(), n_filters=4)
    return fit_method(models, name, **own_settings(name, few))


def exchanged(net):
    "The last layer with its classes in the other order"
    state = net.state_dict()
    return state | {name: state[name].flip(0) for name in ("fc.weight", "fc.bias")}


CHANGES = dict(order=shuffled, norm=flipped, scales=scaled, classes=exchanged)


@pytest.fixture(scope="module")
def models(tmp_path_factory): return write_models(tmp_path_factory.mktemp("nets"), runs=3)


def moved(fitted, change):
    "How far a change of a network moves its embedding, the longest entry being 1"
    net = some_net(1, 7)
    states = net.state_dict(), change(net)
    a, b = (embed_models(fitted, Model(s, dict(shortcut="conv"))) for s in states)
    return ((a - b).abs().max()/a.abs().max()).item()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_invariances_that_it_claims(models, name):
    fitted = small_fit(models, name)
    for claimed in METHODS[name].invariances: assert moved(fitted, CHANGES[claimed]) < 1e-4, claimed


def test_the_linear_chain_has_those_of_the_chain(models):
    fitted = fit_method(models, "chain", relu="linear")
    for claimed in METHODS["chain"].invariances: assert moved(fitted, CHANGES[claimed]) < 1e-4, claimed


@pytest.mark.parametrize("name, lacking", [("frobenius", "order"), ("lps", "norm"), ("stem-signature", "scales")])
def test_what_is_not_claimed_does_not_hold(models, name, lacking):
    assert lacking not in METHODS[name].invariances
    assert moved(small_fit(models, name), CHANGES[lacking]) > 1e-2


def test_every_change_is_one_and_leaves_what_the_network_answers():
    net, x = some_net(1, 7), torch.randn(3, 3, 16, 16)
    assert set(CHANGES) == set(INVARIANCES)
    for name, change in CHANGES.items():
        other = ResNet(8, width=4).eval()
        other.load_state_dict(change(net))
        answer = other(x).flip(1) if name == "classes" else other(x)
        torch.testing.assert_close(answer, net(x), rtol=1e-3, atol=1e-4)
        assert not all(torch.equal(v, net.state_dict()[k]) for k, v in other.state_dict().items())
