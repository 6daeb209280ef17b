"""Networks of several kinds side by side, builds of given tasks, and copies"""
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from lps.nets.architectures import net_from_state, norms_of, recognise, shapes_of, stem_of
from lps.lineage.benchmark import noisy, pruned, quantised
from lps.core.files import save_tensors
from lps.methods.registry import embed_models, fit_method, load_fitted, save_fitted
from lps.models.model import Model
from lps.models.modelset import load_modelset
from lps.order_chain import permute, random_perms
from lps.nets.plain import PlainNet
from lps.nets.resnet import ResNet
from lps.index.index import ModelIndex
from lps.study.architectures import ModelSets, load_sets
from lps.zoo.tasks import load_images, task_images
from lps.zoo.recipe import Recipe, init_model, recipe_fields, recipes
from lps.zoo.train import train_model
from lps.zoo.build import build, plan_build, plan_differences

TINY = replace(recipes["digits"], name="tiny", epochs=1, milestones=(), depth=8, width=4)


def lively(net, seed):
    "The network with other running statistics than 0 and 1"
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data = .5 + torch.rand(m.weight.shape, generator=g)
            m.bias.data = torch.randn(m.bias.shape, generator=g)*.3
            m.running_var = .5 + torch.rand(m.running_var.shape, generator=g)
    return net.eval()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    "Networks of two depths, two widths and without shortcuts, never trained: two tasks of three networks each"
    root, nets = tmp_path_factory.mktemp("kinds"), dict(
        resnet8=lambda: ResNet(8, 4), resnet14=lambda: ResNet(14, 4), wide=lambda: ResNet(8, 8),
        plain=lambda: PlainNet(8, 4), without_norm=lambda: PlainNet(8, 4, norm=False))
    for kind, make in nets.items():
        for task in (0, 1):
            for run in range(3):
                torch.manual_seed(10*task + run)
                meta = dict(task=task, run=run, classes=["a", "bc"[task]], shortcut="conv")
                state = lively(make(), run).state_dict()
                save_tensors(root/kind/f"task{task}_run{run}_{kind}.safetensors", state, meta)
    return load_sets(root, tuple(nets))


@pytest.mark.parametrize("norm, name", [(True, "plain"), (False, "plain-without-norm")])
def test_a_plain_network_is_known_in_any_order_of_its_channels(norm, name):
    net, x = lively(PlainNet(14, 4, 3, norm=norm), 0), torch.randn(2, 3, 12, 12)
    state = net.state_dict()
    kind = recognise(shapes_of(state))
    assert (kind.name, kind.head, stem_of(shapes_of(state))) == (name, "fc", "conv1")
    assert len(kind.branches) == 13 and len(norms_of(shapes_of(state))) == (13 if norm else 0)
    spec = kind.spec
    shuffled = permute(state, spec, random_perms(spec, 1))
    torch.testing.assert_close(net_from_state(shuffled)(x), net(x), rtol=1e-4, atol=1e-5)
    half = net_from_state({key: v.half() if v.is_floating_point() else v for key, v in state.items()})
    assert half.fc.weight.dtype == torch.float32 and not half.training


@pytest.mark.parametrize("change", [
    {"stage2.conv1.weight": (8, 8, 3, 3)}, {"stage4.conv1.weight": (8, 8, 3, 3)}, {"fc.weight": (2,)},
    {"conv1.weight": (0, 3, 3, 3)}, {"conv1.weight": (10**9, 3, 3, 3)},
])
def test_what_only_looks_like_a_plain_network_is_not_known(change):
    assert recognise(shapes_of(PlainNet(8, 4).state_dict()) | change) is None


def test_a_resnet_is_no_plain_network():
    for shortcut in ("conv", "pad_end"):
        assert recognise(shapes_of(ResNet(8, 4, shortcut=shortcut).state_dict())).name == "resnet"


def test_a_recipe_names_its_architecture_and_older_ones_need_not():
    plain = replace(TINY, architecture="plain")
    assert Recipe(**recipe_fields(plain)) == plain and "architecture" not in recipe_fields(TINY)
    assert isinstance(init_model(0, plain), PlainNet)
    torch.manual_seed(3)
    assert torch.equal(init_model(3, TINY).conv1.weight, ResNet(8, 4).conv1.weight)


def test_networks_without_norm_learn_and_go_on_from_given_weights():
    train, test = (task_images(load_images("digits", split), (0, 1)) for split in ("train", "test"))
    recipe = replace(TINY, architecture="plain-without-norm", epochs=4, init="fan_in", lr=.02, width=8)
    net, metrics = train_model(train, test, recipe, seed=1)
    assert metrics["val_accuracy"] > .9
    still = replace(recipe, lr=0., epochs=1, weight_decay=0.)
    again, _ = train_model(train, test, still, seed=5, start_from=net.state_dict())
    assert all(torch.equal(again.state_dict()[name], v) for name, v in net.state_dict().items())


def test_a_build_of_given_pairs(tmp_path):
    images, pairs = (load_images("digits", "train"), load_images("digits", "test")), list(combinations(range(3), 2))
    models = build(tmp_path, images, replace(TINY, architecture="plain"), n_models=1, tasks=pairs, workers=1)
    assert models.manifest[["class_0", "class_1"]].values.tolist() == [["0", "1"], ["0", "2"], ["1", "2"]]
    assert isinstance(models[0].net, PlainNet) and "shortcut" not in models[0].meta
    plans = [plan_build(images[0], TINY, 0, chosen) for chosen in (pairs, None)]
    assert "tasks" in plan_differences(*plans)[0]
    with pytest.raises(ValueError, match="was built with tasks"):
        build(tmp_path, images, replace(TINY, architecture="plain"), n_models=1, workers=1)


@pytest.mark.parametrize("method", ["all-layer-signature", "chain"])
def test_a_gallery_of_one_depth_answers_queries_of_others(kinds, method, tmp_path):
    fitted = fit_method(kinds.sets["resnet8"], method)
    save_fitted(tmp_path/"fitted.safetensors", fitted)
    index = ModelIndex(load_fitted(tmp_path/"fitted.safetensors"), kinds.sets["resnet8"])
    for kind in ("resnet14", "wide", "plain"):
        assert len(index.query(kinds.sets[kind], k=2)) == 12
        one = index.query(kinds.sets[kind][0], k=2)
        assert np.isfinite(one.similarity).all()
        of_set = index.query(kinds.sets[kind], k=2).similarity.iloc[:2]
        np.testing.assert_allclose(one.similarity, of_set, atol=1e-5)


def test_networks_of_damaged_weights_move_step_by_step(tmp_path):
    models = build(tmp_path/"zoo", "digits", replace(TINY, epochs=3), n_tasks=2, n_models=1, workers=1)
    state = models[0].state
    assert all(torch.equal(v, pruned(state, 0)[name]) for name, v in state.items())
    assert len(quantised(state, 2)["fc.weight"].unique()) <= 3
    assert torch.equal(noisy(state, .1, 3)["fc.weight"], noisy(state, .1, 3)["fc.weight"])
    fitted = fit_method(models, "probes")
    z = embed_models(fitted, models[0])
    def cosine(state): return float((embed_models(fitted, Model(state, models[0].meta))*z).sum())
    cosines = [cosine(changed) for changed in (state, quantised(state, 8), noisy(state, .1), noisy(state, .3))]
    assert cosines == sorted(cosines, reverse=True) and cosines[0] > .999 > cosines[2]
    assert cosine(pruned(state, .5)) > cosine(pruned(state, .8))


def test_several_sets_count_as_one(kinds, tmp_path):
    with pytest.raises(ValueError, match="contains no folder of models"): load_sets(tmp_path)
    assert len(kinds) == 30 and kinds.tasks == [0, 1] and len(kinds.hashes) == 30
    assert isinstance(kinds, ModelSets) and "resnet14" in repr(kinds)
    assert load_modelset(kinds.sets["wide"].path).hashes == kinds.hashes[12:18]
