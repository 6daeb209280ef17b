"Read-out: a direction, held-out images, and what does not change it"
import numpy as np
import pytest
import torch
from fastcore.test import expect_fail
from test_probes import CHANGES, model, some_state

from lps.methods.synthetic import noise_images
from lps.advice.advisers import photograph_crops
from lps.advice.score import read_out, transfer_score

BANK = noise_images(60)


@pytest.mark.parametrize("shortcut", ["conv", "pad_end"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_leaves_the_outputs_leaves_the_read_out(change, shortcut):
    source, target = some_state(1, shortcut), some_state(2, shortcut)
    answers = [model(s, shortcut).features_and_outputs(BANK) for s in (source, target)]
    changed = [model(change(s, shortcut), shortcut).features_and_outputs(BANK) for s in (source, target)]
    r2 = read_out(answers[0][0], answers[1][1][None])
    np.testing.assert_allclose(read_out(changed[0][0], changed[1][1][None]), r2, rtol=1e-2, atol=1e-3)
    assert not np.allclose(read_out(answers[1][0], answers[0][1][None]), r2, atol=.02)  # it has a direction


def test_nothing_is_read_from_noise():
    "More features than images fit anything; held-out images show that"
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(60, 200, generator=g), torch.randn(1, 60, 2, generator=g)
    assert abs(read_out(z, y)[0]) < .2


def test_targets_do_not_change_one_another():
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(60, 8, generator=g), torch.randn(3, 60, 2, generator=g)
    y = z[:, :2] + torch.tensor([0, 1, 10])[:, None, None]*noise  # each needs another ridge
    np.testing.assert_allclose(read_out(z, y), np.concatenate([read_out(z, one[None]) for one in y]))


def test_photographs_need_to_be_normalised():
    net, crops = model(some_state()), photograph_crops(20)
    with expect_fail(ValueError, "stats="): net.features(crops)
    stats = [.5]*3, [.25]*3
    told = net.outputs(crops, stats)
    net.meta |= dict(mean=stats[0], std=stats[1])
    assert torch.equal(net.outputs(crops, ([0]*3, [1]*3)), told)  # its own come first
    assert torch.equal(net.outputs(crops, bs=7).argmax(1), told.argmax(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_gives_no_numbers_is_refused(value):
    state = some_state()
    with expect_fail(ValueError, "NaN or inf"):
        model(state | {"bn1.bias": state["bn1.bias"] + value}).outputs(BANK)


def test_a_network_explains_itself_best():
    networks = [model(some_state(seed)) for seed in range(3)]
    table = np.array([[transfer_score(source, target, BANK) for target in networks] for source in networks[:2]])
    assert table[[0, 1], [0, 1]].min() > .99 and table[:, 2].max() < .99
