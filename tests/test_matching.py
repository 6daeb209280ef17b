"Canonical weights, matching, networks on sets of filters and their product: invariances, files, errors"
from functools import partial

import pytest
import torch
from fastcore.test import expect_fail
from networks import CHANGES, WIDTH, scaled, some_net, write_models

from lps.methods.matching import match, matchable
from lps.methods.registry import (embed_models, fit_method, load_fitted, restore_fitted, save_fitted,
                                  score_models)
from lps.models.model import Model
from lps.models.modelset import load_modelset
from lps.order_chain import permute, random_perms
from lps.nets.resnet import resnet_spec
from lps.index.index import ModelIndex

OF_STEM = ["canonical-lps", "weight-matching", "equivariant", "experts"]
METHODS = [*OF_STEM, "all-layer-equivariant"]
QUICK = {
    "canonical-lps": dict(epochs=30, milestones=(), n_filters=8, lr=.01),
    "equivariant": dict(hidden=16),
    "all-layer-equivariant": dict(hidden=8, n_steps=20),
}
BRANCHES = ("conv1", "layer1.0.conv2", "layer2.0.conv1")


@pytest.fixture(scope="module")
def models(tmp_path_factory): return write_models(tmp_path_factory.mktemp("nets"), runs=5)


@pytest.fixture(scope="module")
def fitted(models):
    found = {method: fit_method(models, method, **QUICK.get(method, {})) for method in METHODS}
    found["branches"] = fit_method(models, "canonical-lps", layers=BRANCHES, shortcut="conv", **QUICK["canonical-lps"])
    return found


HOLDS = [(method, change) for method in OF_STEM for change in ("shuffled", "flipped")]
OPTIONAL = "layers", "folded", "observing"  # fields of every configuration that have a default
WHOLE = "branches", "all-layer-equivariant"  # of a whole network, the streams' scales are fixed too
HOLDS += [(method, change) for method in WHOLE for change in CHANGES]


@pytest.mark.parametrize("method, change", HOLDS)
def test_embeddings_are_invariant_to_changes_that_keep_the_outputs(fitted, method, change):
    net = some_net(1, 7)
    before = embed_models(fitted[method], Model(net.state_dict(), {}))
    after = embed_models(fitted[method], Model(CHANGES[change](net), {}))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_the_test_above_can_fail(fitted):
    "A stem alone does not have the other layers that write to its channels"
    net = some_net(1, 7)
    for method in OF_STEM:
        before, after = [embed_models(fitted[method], Model(s, {})) for s in (net.state_dict(), scaled(net))]
        assert (before - after).abs().max() > 1e-3


def one_network(state): return {n: v[0] for n, v in matchable({n: v[None] for n, v in state.items()}, "conv").items()}


def test_matching_finds_any_order_through_any_scale():
    net, spec = some_net(0, 1), resnet_spec(8, WIDTH)
    shuffle = random_perms(spec, 5)
    one, other = one_network(net.state_dict()), one_network(permute(scaled(net), spec, shuffle))
    perms, cosine = match(one, other, spec)
    assert cosine == pytest.approx(1, abs=1e-5)
    for group, perm in perms.items(): assert shuffle[group][perm].tolist() == list(range(len(perm)))
    assert match(one, one_network(some_net(2, 3).state_dict()), spec)[1] < .9


@pytest.mark.parametrize("method", [*METHODS, "branches"])
def test_a_fitted_method_is_the_same_after_saving(models, fitted, method, tmp_path):
    save_fitted(tmp_path/"fitted.safetensors", fitted[method])
    again = load_fitted(tmp_path/"fitted.safetensors")
    assert (again.method, again.tasks, again.config) == (fitted[method].method, [0, 1, 2], fitted[method].config)
    assert embed_models(again, models).equal(embed_models(fitted[method], models))
    assert score_models(again, models).equal(score_models(fitted[method], models))
    index = ModelIndex(again, models)
    index.save(tmp_path/"index.zip")
    assert ModelIndex.load(tmp_path/"index.zip").query(models[4]).similarity.is_monotonic_decreasing


@pytest.mark.parametrize("method", METHODS)
def test_models_that_cannot_be_fitted_are_refused(models, method):
    with expect_fail(ValueError, "two tasks"): fit_method(models[:5], method)
    with expect_fail(ValueError, "leave out folded"): fit_method(models, method, folded=True)


@pytest.mark.parametrize("method", METHODS)
def test_parts_that_do_not_fit_are_refused(fitted, method):
    parts, state = fitted[method].parts, fitted[method].state_dict()
    config = parts["config"]
    for field in config:
        rest = {name: value for name, value in config.items() if name != field}
        if field not in OPTIONAL:
            with expect_fail(ValueError, field): restore_fitted(parts | dict(config=rest), state, "file")
        for odd in (None, 3.5, "a", {"x": 1}, [[1]]):
            if field == "observing" and odd == {"x": 1}: continue
            with expect_fail(ValueError): restore_fitted(parts | dict(config=config | {field: odd}), state, "file")
    refuse = partial(restore_fitted, parts, where="file")
    for name, v in state.items():
        for bad in (v.half(), v[:-1] if v.ndim else v[None]):
            with expect_fail(ValueError): refuse(state | {name: bad})
        with expect_fail(ValueError): refuse({k: t for k, t in state.items() if k != name})
    with expect_fail(ValueError): refuse(state | {"more": torch.zeros(1)})


def test_weights_of_members_are_learned_from_held_out_models(models):
    "A task of two models leaves none to hold out, so all members have equal weights"
    even = fit_method(models[[0, 1, 2, 5, 6]], "experts")
    assert even.tensors["weights"].tolist() == [1, 1, 1]
    learned = fit_method(models, "experts")
    assert (learned.tensors["weights"] >= 0).all() and learned.tensors["shares"].sum() == pytest.approx(1)
    bundled = load_modelset("bundled")[:20]
    bundled.stored = {}
    stems = fit_method(bundled, "experts")
    assert list(stems.members) == ["stem-signature", "weight-matching"]
