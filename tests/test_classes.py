"Class descriptors: a permuted network has the same, permuted classes permute the matching; synthetic images"
import pytest
import torch
from fastcore.test import expect_fail
from networks import CHANGES, some_net

from lps.methods.classes import class_descriptors, match_classes, name_classes
from lps.methods.synthetic import KINDS, dead_leaves, synthetic_images
from lps.models.model import Model
from lps.nets.resnet import ResNet

FEW = dict(n_images=64, size=16)


def network(seed, n_classes=6, **kwargs):
    "An untrained network with six classes, and names for them"
    torch.manual_seed(seed)
    net = ResNet(8, 4, n_classes=n_classes, **kwargs).eval()
    return Model(net.state_dict(), dict(shortcut="conv", classes=[f"class {i}" for i in range(n_classes)]))


@pytest.mark.parametrize("change", CHANGES)
def test_descriptors_are_invariant_to_changes_that_keep_the_outputs(change):
    net = some_net(1, 7)
    images = synthetic_images(64, size=16)
    states = net.state_dict(), CHANGES[change](net)
    before, after = (class_descriptors(Model(state, dict(shortcut="conv")).outputs(images)) for state in states)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_permuted_classes_permute_the_matching():
    model = network(0)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    state = model.state | {name: model.state[name][order] for name in ("fc.weight", "fc.bias")}
    other = Model(state, model.meta | dict(classes=[model.meta["classes"][i] for i in order]))
    found = match_classes(model, other, **FEW)
    assert (found.a == found.b).all() and len(found) == 6
    assert found.cosine.min() > .999


def test_networks_with_another_number_of_classes_and_channels_are_matched():
    found = match_classes(network(0), network(1, n_classes=4, in_channels=1), **FEW)
    assert len(found) == 4 and found.a.is_unique and found.b.is_unique
    assert found.score.is_monotonic_decreasing


def test_unrelated_networks_have_lower_scores_than_copies():
    model = network(0)
    assert match_classes(model, network(1), **FEW).cosine.mean() < match_classes(model, model, **FEW).cosine.mean() - .3


def test_a_network_names_its_own_classes():
    named = name_classes(network(0), [network(1), network(0)], k=2, **FEW)
    best = named.groupby("class", sort=False).first()
    assert (best.name == best.index).all() and (best.model == 1).all()
    assert len(named) == 12


def test_one_logit_is_two_opposite_classes():
    logits = torch.randn(30, 1, generator=torch.Generator().manual_seed(0))
    one = class_descriptors(logits)
    two = class_descriptors(torch.cat([-logits, logits], 1))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(one[0], -one[1])


@pytest.mark.parametrize("logits, words", [
    (torch.zeros(3), "give \\(n, K\\)"),
    (torch.zeros(1, 3), "two images or more"),
    (torch.full((4, 3), torch.nan), "NaN or inf"),
    (torch.ones(4, 3), "the same logits"),
])
def test_logits_that_have_no_descriptor_are_refused(logits, words):
    with expect_fail(ValueError, regex=words): class_descriptors(logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size, channels", [(8, 1), (33, 3), (16, 4)])
def test_synthetic_images_are_decided_by_their_seed_and_normalised(kind, size, channels):
    a, b, c = (synthetic_images(6, seed, size, channels, (kind,)) for seed in (0, 0, 1))
    assert a.shape == (6, channels, size, size) and torch.equal(a, b) and not torch.equal(a, c)
    torch.testing.assert_close(a.mean((0, 2, 3)), torch.zeros(channels), atol=1e-4, rtol=0)
    torch.testing.assert_close(a.std((0, 2, 3), unbiased=False), torch.ones(channels), atol=1e-4, rtol=0)


def test_leaves_hide_each_other():
    "Neighbouring pixels mostly belong to one leaf, so small differences are common and large ones occur"
    images = dead_leaves(8, size=32, texture=.01)
    steps = (images[..., 1:] - images[..., :-1]).abs()
    assert steps.median() < .1 < 1 < steps.max()
