"Lineage from weights alone: every derivation is recognised, in both orders, and independent models are not related"
import math

import pytest
import torch

from lps.lineage.benchmark import DERIVATIONS, pruned, renamed, reordered, rescaled
from lps.lineage.compare import Aligner, balanced, compare, layers_of
from lps.models.model import Model
from lps.nets.plain import PlainNet
from lps.nets.resnet import ResNet

ARROWS = {"": "", "a → b": "b → a", "b → a": "a → b"}


def network(seed, make=lambda: ResNet(8, width=16)):
    torch.manual_seed(seed)
    model = Model(make().state_dict())
    for v in model.state.values():
        if v.ndim == 1 and v.is_floating_point(): v.uniform_(.5, 1.5)
    return model


@pytest.mark.parametrize("name", DERIVATIONS)
def test_derivations_are_recognised_in_both_orders(name):
    a, other = network(0), network(1)
    b = Model(DERIVATIONS[name].make(a, other, 3))
    found = compare(a, b)
    assert found.verdict == DERIVATIONS[name].verdict
    assert DERIVATIONS[name].how in (*found.how, "")
    back = compare(b, a)
    assert (back.verdict, back.how, back.direction) == (found.verdict, found.how, ARROWS[found.direction])


def test_derivations_are_recognised_under_other_names_order_and_scales():
    a = network(0)
    disguised = rescaled(reordered(pruned(a.state, .5), a.architecture.spec), a.architecture)
    names = sorted(disguised, key=lambda name: name[::-1])
    found = compare(a, Model(renamed({name: disguised[name] for name in names})))
    assert found.verdict == "derived" and found.how == ["pruned"] and found.direction == "a → b"


@pytest.mark.parametrize("make", [
    lambda: ResNet(8, width=16), lambda: PlainNet(8, 16), lambda: PlainNet(8, 16, norm=False),
])
def test_independent_networks_are_independent(make):
    models = [network(seed, make) for seed in range(5)]
    for i, a in enumerate(models):
        for b in models[:i]:
            found = compare(a, b)
            assert found.verdict == "independent" and found.log10_p > -3 and not len(found.layers)


def test_a_plain_network_is_recognised():
    a = network(0, lambda: PlainNet(8, 16))
    b = Model(reordered(a.state, a.architecture.spec))
    assert compare(a, b).verdict == "same network, reordered or rescaled"


def test_dropped_layers_are_named():
    a = network(0, lambda: ResNet(14, width=16))
    b = {name: v for name, v in a.state.items() if not name.startswith("layer2.1.")}
    found = compare(a, Model(b))
    assert (found.verdict, found.how, found.direction) == ("derived", ["layers removed"], "a → b")


def test_broken_weights_do_not_relate_models():
    a = network(0)
    zeros = Model({name: torch.zeros_like(v) for name, v in a.state.items()})
    assert compare(a, zeros).verdict == "independent"
    assert balanced(torch.zeros(3, 4, 9)).equal(torch.zeros(3, 4, 9))
    assert compare(Model({"a": torch.ones(3)}), Model({"b": torch.zeros(3)})).verdict == "independent"


def test_evidence_cannot_exceed_the_number_of_maps():
    "A layer of n rows has n! maps, so one layer of two rows is never significant"
    state = {"fc.weight": torch.randn(2, 64, generator=torch.Generator().manual_seed(0))}
    assert Aligner(layers_of(state), layers_of(state)).run().log_p >= -math.log(2)


def test_counters_of_batch_normalisation_give_a_direction_only_if_both_models_have_them():
    a = network(0)
    b = Model(DERIVATIONS["noise-10"].make(a, None, 0))
    counts = [model.state["bn1.num_batches_tracked"] for model in (a, b)]
    for n_a, n_b, direction in ((5, 9, "a → b"), (9, 5, "b → a"), (0, 9, ""), (5, 5, "")):
        for count, n in zip(counts, (n_a, n_b)): count.fill_(n)
        assert compare(a, b).direction == direction
