"Signatures: what leaves a network's outputs as they are leaves its embedding; files that do not fit are refused"
import pytest
import torch
from fastcore.test import expect_fail
from networks import CHANGES, WIDTH, flipped, scaled, shuffled, some_net, write_models

from lps.methods import chain, signatures
from lps.core.files import save_tensors
from lps.methods.registry import (
    embed_models, fit_method, get_method, load_fitted, restore_fitted, save_fitted, score_models,
)
from lps.models.model import Model
from lps.models.modelset import load_modelset
from lps.nets.resnet import ResNet
from lps.index.index import ModelIndex

METHODS = ["stem-signature", "all-layer-signature", "image-statistics", "weights-fusion", "chain"]


@pytest.fixture(scope="module")
def models(tmp_path_factory): return write_models(tmp_path_factory.mktemp("nets"), runs=5)


@pytest.fixture(scope="module")
def fitted(models): return {method: fit_method(models, method) for method in METHODS}


HOLDS = [(method, change) for method in METHODS for change in CHANGES]
HOLDS.remove(("stem-signature", "scaled"))  # a stem alone does not show who else writes to its channels
HOLDS.remove(("weights-fusion", "scaled"))  # the stem's signature is part of it


@pytest.mark.parametrize("change", CHANGES)
def test_the_changes_leave_the_outputs_as_they_are(change):
    net, x = some_net(1, 0), torch.randn(3, 3, 16, 16)
    other = ResNet(8, width=WIDTH).eval()
    other.load_state_dict(CHANGES[change](net))
    torch.testing.assert_close(other(x), net(x), rtol=1e-3, atol=1e-4)
    assert not torch.equal(other.conv1.weight, net.conv1.weight) or change == "scaled"


@pytest.mark.parametrize("method, change", HOLDS)
def test_an_embedding_does_not_see_what_the_outputs_do_not_show(fitted, method, change):
    net, method = some_net(1, 7), fitted[method]
    before = embed_models(method, Model(net.state_dict(), {}))
    after = embed_models(method, Model(CHANGES[change](net), {}))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_the_tests_above_can_fail(models, fitted):
    "The stem's γ does depend on the scale of its stream, and a method that reads filters in order sees any change"
    net, stem = some_net(1, 7), fitted["stem-signature"]
    before, after = [embed_models(stem, Model(s, {})) for s in (net.state_dict(), scaled(net))]
    assert (before - after).abs().max() > 1e-2
    ordered = fit_method(models, "fc", epochs=1, milestones=())
    for change in (shuffled, flipped):
        before, after = [embed_models(ordered, Model(s, {})) for s in (net.state_dict(), change(net))]
        assert (before - after).abs().max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_a_fitted_signature_comes_back_from_its_file(models, fitted, method, tmp_path):
    save_fitted(tmp_path/"fitted.safetensors", fitted[method])
    again = load_fitted(tmp_path/"fitted.safetensors")
    assert (again.method, again.tasks, again.config) == (method, [0, 1, 2], fitted[method].config)
    assert embed_models(again, models).equal(embed_models(fitted[method], models))
    assert score_models(again, models).equal(score_models(fitted[method], models))


@pytest.mark.parametrize("method", METHODS)
def test_an_index_answers_with_its_task(models, fitted, method, tmp_path):
    index = ModelIndex(fitted[method], models)
    index.save(tmp_path/"index.zip")
    for some in (index, ModelIndex.load(tmp_path/"index.zip")):
        assert some.query(models[4]).task.iloc[0] == 0


@pytest.mark.parametrize("method", METHODS)
def test_two_tasks_are_told_apart(models, method):
    two = fit_method(models[:10], method)
    assert (score_models(two, models[:10]).argmax(1) == models.labels[:10]).float().mean() > .9


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_learned_is_refused(models, method):
    with expect_fail(ValueError, "two tasks or more"): fit_method(models[:1], method)
    with expect_fail(ValueError, "two tasks or more"): fit_method(models[:5], method)
    with expect_fail(ValueError, "give two or more of one task"): fit_method(models[[0, 5, 10]], method)
    with expect_fail(ValueError, "leave out folded"): fit_method(models, method, folded=True)
    with expect_fail(ValueError, "leave out layers"): fit_method(models, method, layers=("layer1.0.conv1",))


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_no_numbers_are_refused(models, fitted, method):
    observe = get_method(method).observe
    weights = {name: v.clone() for name, v in models.weights(get_method(method).reads(models)).items()}
    for name in weights: weights[name][2] = float("nan")
    with expect_fail(ValueError, "no finite"): get_method(method).fit(observe(weights), models.labels, 0)
    with expect_fail(ValueError, "no finite embedding for model 2"): embed_models(fitted[method], observe(weights))


def test_a_pruned_filter_counts_for_nothing(fitted):
    state = some_net(0, 0).state_dict()
    state["conv1.weight"][1] = 0
    for method in METHODS: assert embed_models(fitted[method], Model(state, {})).isfinite().all()


def without_statistics(net):
    "Tensors of the stem alone, without its BN"
    return {"conv1.weight": net.state_dict()["conv1.weight"]}


def test_networks_without_norms(tmp_path):
    for task in range(2):
        for run in range(4):
            stem = without_statistics(some_net(task, run))
            save_tensors(tmp_path/f"{task}_{run}.safetensors", stem, dict(task=task, run=run))
    bare = load_modelset(tmp_path)
    assert fit_method(bare, "stem-signature").layers == ["conv1.weight"]
    with expect_fail(ValueError, "use stem-signature"): fit_method(bare, "image-statistics")
    for method in ("all-layer-signature", "chain"):
        with expect_fail(ValueError, "give whole networks"): fit_method(bare, method)
    assert list(fit_method(bare, "weights-fusion").members) == ["stem-signature"]


ODD = [None, 3, "a", [], {}, [1, 1], [0.5, 1], {"stem": -1}, {"stem": 2**70}, {"a": {"b": 1}}, ["x"]]
LDA = [method for method in METHODS if method != "weights-fusion"]


def restored(fitted, tensors=None, missing=None, **changes):
    "A fitted method from its parts, with another configuration or other tensors"
    config = {name: value for name, value in fitted.parts["config"].items() if name != missing} | changes
    return restore_fitted(dict(method=fitted.method, config=config), tensors or fitted.state_dict(), "file")


@pytest.mark.parametrize("method", LDA)
@pytest.mark.parametrize("field", ["tasks", "sizes", "rank"])
def test_a_config_that_does_not_fit_is_refused(fitted, method, field):
    with expect_fail(ValueError, field): restored(fitted[method], missing=field)
    for value in ODD:
        if field == "rank" and value == 3: continue
        with expect_fail(ValueError): restored(fitted[method], **{field: value})


@pytest.mark.parametrize("method", METHODS)
def test_tasks_and_settings_that_do_not_fit_are_refused(fitted, method):
    with expect_fail(ValueError, "field 'tasks'"): restored(fitted[method], tasks=[0, 1, 1])
    with expect_fail(ValueError, "field 'observing'"): restored(fitted[method], observing={"weights": "x"})
    with expect_fail(ValueError, "field 'layers'"): restored(fitted[method], layers=3)


@pytest.mark.parametrize("method", METHODS)
def test_tensors_that_do_not_fit_are_refused(fitted, method):
    state = fitted[method].state_dict()
    for name, v in state.items():
        for bad in (v.half(), v[:-1], v*float("nan")):
            with expect_fail(ValueError): restored(fitted[method], state | {name: bad})
        with expect_fail(ValueError, f"'{name}' is missing"):
            restored(fitted[method], {k: t for k, t in state.items() if k != name})
    with expect_fail(ValueError, "'more' is unexpected"): restored(fitted[method], state | {"more": torch.zeros(1)})


def test_a_depth_of_any_kind_gives_as_many_numbers():
    sizes = set()
    for depth, width in ((8, 4), (14, 6), (20, 4)):
        state = ResNet(depth, width=width).state_dict()
        tensors = {name: v[None] for name, v in state.items() if v.ndim}
        both = signatures.all_layer_signature(tensors)["layers"], chain.chain_signature(tensors)["chain"]
        sizes.add(tuple(v.shape for v in both))
    assert len(sizes) == 1


def test_depth_and_version_of_the_chain_are_settings_that_are_kept(models, tmp_path):
    fitted = fit_method(models, "chain", depth=3, relu="linear")
    save_fitted(tmp_path/"chain.safetensors", fitted)
    again = load_fitted(tmp_path/"chain.safetensors")
    assert again.observing == dict(shortcut="pad_end", depth=3, relu="linear")
    assert embed_models(again, models[2]).shape == (1, 378)
    assert not embed_models(again, models).equal(embed_models(fit_method(models, "chain", depth=3), models))
    with expect_fail(ValueError, "take 0 to 18"): fit_method(models, "chain", depth=19)
    with expect_fail(ValueError, "take one of gaussian, linear"): fit_method(models, "chain", relu="tanh")
