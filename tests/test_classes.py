"Class descriptors: a permuted network has the same, permuted classes permute the matching; synthetic images"
import numpy as np
import pytest
import torch
from fastcore.test import expect_fail
from networks import CHANGES, some_net

from lps.methods.classes import (
    ClassDescriptors, Calibration, class_descriptors, class_scores, gallery_for, describe_classes, fit_class_vectors,
    FLOOR, WEIGHT, Gallery, describe_pair, load_class_descriptors, match_classes, name_classes, name_pair,
    number_interval, packed_classes, packed_networks, pair_scores, prototypes, relate_classes, with_agreement,
)
from lps.core.files import save_tensors
from lps.methods.synthetic import KINDS, dead_leaves, kinds_of, synthetic_images
from lps.models.model import Model
from lps.nets.resnet import ResNet
from lps.study.classes import Described, all_pairs
from lps.study.two_class import Decoded, among_tasks, decoding_figures

FEW = dict(n_images=64, size=16)


def network(seed, n_classes=6, **kwargs):
    "An untrained network with six classes, and names for them"
    torch.manual_seed(seed)
    net = ResNet(8, 4, n_classes=n_classes, **kwargs).eval()
    return Model(net.state_dict(), dict(shortcut="conv", classes=[f"class {i}" for i in range(n_classes)]))


def trained(seed, n_classes=6):
    "A network with outputs that vary and other than initial norms"
    model = network(seed, n_classes)
    for name, v in model.state.items():
        if name.endswith("running_mean"): v += .1
    outputs = Model(dict(model.state), model.meta).outputs(synthetic_images(64, size=16))
    model.state["fc.bias"] = model.state["fc.bias"] - outputs.mean(0)
    return model


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
    named = name_classes(network(0), network(0), k=2, **FEW)
    best = named.groupby("class", sort=False).first()
    assert (best.name == best.index).all() and len(named) == 12
    assert named.probability.isna().all()  # none were measured for images of 16 pixels


def test_kinds_of_images_have_equal_weight_if_there_are_enough():
    kinds = kinds_of(128)
    logits = torch.randn(128, 2, generator=torch.Generator().manual_seed(0))*(1 + 100*(kinds == 5)[:, None])
    rows = class_descriptors(logits, kinds=kinds)
    lengths = torch.stack([rows[0, kinds == kind].norm() for kind in range(6)])
    torch.testing.assert_close(lengths, torch.full((6,), 6**-.5))
    assert class_descriptors(logits)[0, kinds == 5].norm() > .9  # whitened together, the last kind decides


def test_shuffled_images_are_at_chance():
    known = load_class_descriptors("imagenet-1k")
    own = known.rows[:200]
    order = torch.randperm(own.shape[1], generator=torch.Generator().manual_seed(0))
    right = torch.arange(200)
    assert (class_scores(own, own).argmax(1) == right).all()
    assert (class_scores(own, own[:, order]).argmax(1) == right).float().mean() < .05


def test_independent_logits_are_not_centred_over_classes():
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    shifted = logits + torch.randn(40, 1, generator=torch.Generator().manual_seed(1))
    together = [class_descriptors(z) for z in (logits, shifted)]
    alone = [class_descriptors(z, multilabel=True) for z in (logits, shifted)]
    torch.testing.assert_close(*together)
    assert not torch.allclose(*alone, atol=.1)


def described(names, vectors, noise=.1, seed=0):
    "Descriptors of a made-up network that shows some classes"
    z = vectors[:, [int(name) for name in names]]
    z = z - z.mean(1, keepdim=True) + noise*torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    return ClassDescriptors((z - z.mean(0)).half(), list(names), dict(n_images=len(z)))


def made_up(noise=.1):
    "Five networks with four of eight classes, and the vectors of these"
    vectors = torch.randn(64, 8, generator=torch.Generator().manual_seed(9))
    tasks = "0123", "2345", "4567", "0167", "1357"
    return [described(names, vectors, noise, i) for i, names in enumerate(tasks)], vectors


def test_class_vectors_follow_from_contrasts():
    networks, vectors = made_up()
    fitted, reliability = fit_class_vectors(networks, ridge=1e-3)
    truth = vectors - vectors.mean(1, keepdim=True)
    cosines = torch.nn.functional.cosine_similarity(fitted.logits.float().T, (truth - truth.mean(0)).T)
    assert fitted.names == list("01234567") and cosines.min() > .95
    assert np.nanmin(reliability) > .8
    noisy = fit_class_vectors(made_up(noise=5.)[0])[1]
    assert np.nanmean(noisy) < np.nanmean(reliability) - .3


def test_two_class_networks_are_decoded_with_their_order():
    networks, vectors = made_up()
    fitted, _ = fit_class_vectors(networks, ridge=1e-3)
    for first, second in ("03", "30", "26"):
        two = described(first + second, vectors, seed=7)
        found = name_pair(two, fitted).iloc[0]
        assert (found["first"], found["second"]) == (first, second)


def test_the_number_of_shared_classes_has_an_interval():
    assert number_interval(np.zeros(4)) == (0, 0) and number_interval(np.ones(4)) == (4, 4)
    low, high = number_interval(np.full(100, .3))
    assert 19 <= low <= 23 and 37 <= high <= 41


def test_probabilities_of_a_row_add_up_with_none_of_these():
    scores = torch.tensor([[1.5, 0., -.2], [-.5, -.4, -.6]])
    likely = Calibration(10., -2.)(scores)
    torch.testing.assert_close(likely.sum(1), torch.ones(2, dtype=torch.double))
    assert likely[0].argmax() == 0 and likely[1].argmax() == 3


def test_bundled_descriptors_name_themselves():
    known = load_class_descriptors("imagenet-1k")
    assert len(known) == 1000 and known.names[1] == "goldfish" and known.logits.dtype == torch.float16
    some = ClassDescriptors(known.logits[:, 200:300], known.names[200:300], known.images)
    named = name_classes(some, known)
    assert (named.name == named["class"]).mean() > .9 and named.probability.between(0, 1).all()
    assert gallery_for(known, some) is None


def test_a_network_of_the_set_shares_all_classes_with_itself():
    known = load_class_descriptors("cifar100")
    ten = known.names[:10]
    some = ClassDescriptors(known.logits[:, :10], ten, known.images)
    same = relate_classes(some, some)
    other = relate_classes(some, ClassDescriptors(known.logits[:, 20:30], known.names[20:30], known.images))
    assert same["shared"] > 9 and other["shared"] < 2 and other["low"] <= other["shared"] <= other["high"] + 1
    assert same["similarity"] > other["similarity"]


def test_descriptors_of_other_images_are_refused():
    with expect_fail(ValueError, regex="use the same images for both"):
        match_classes(describe_classes(network(0), 64, size=16), "imagenet-1k")


def test_descriptors_decide_the_images_of_the_other_network():
    known = describe_classes(network(0), kinds="mixed", **FEW)
    own, other = describe_pair(network(1), known)
    assert other is known and own.images == known.images == dict(FEW, seed=0, kinds="mixed")
    assert describe_classes(network(0), **FEW).images["kinds"] == "smooth objects"
    assert describe_classes(network(0, n_classes=50), **FEW).images["kinds"] == "mixed"
    with expect_fail(ValueError, regex="choose from mixed, smooth objects"):
        describe_classes(network(0), kinds="rough", **FEW)


def test_probabilities_are_appended_for_smooth_images():
    about = describe_classes(network(0), **FEW)
    assert about.rows.shape == (6, 128) and about.graded.shape == (6, 64)
    torch.testing.assert_close(about.rows[:, :64].norm(dim=1), torch.full((6,), .5**.5))
    doubled = ClassDescriptors(2*about.logits, about.names, about.images)
    torch.testing.assert_close(doubled.rows, about.rows)


def test_prototypes_are_means_that_outlive_the_file(tmp_path):
    networks, _ = made_up()
    fitted, _ = fit_class_vectors(networks)
    of_three = [row for n in networks for name, row in zip(n.names, n.rows) if name == "3"]
    mean = torch.nn.functional.normalize(torch.stack(of_three).mean(0), dim=0)
    torch.testing.assert_close(prototypes(networks, fitted.names)[3], mean)
    fitted.save(tmp_path/"fitted.safetensors")
    torch.testing.assert_close(load_class_descriptors(tmp_path/"fitted.safetensors").rows, fitted.rows)
    assert len(of_three) == 3


def test_photographs_can_be_used(tmp_path):
    from PIL import Image
    rng = np.random.default_rng(0)
    for i in range(12): Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path/f"{i}.png")
    about = describe_classes(network(0), folder=tmp_path)
    assert about.rows.shape == (6, 12) and about.kinds is None
    assert (match_classes(about, network(0), folder=tmp_path).eval("a == b")).all()


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


@pytest.mark.parametrize("form", ["module", "state dict", "file"])
def test_models_in_any_form_are_matched(form, tmp_path):
    model = network(0)
    net = ResNet(8, 4, n_classes=6).eval()
    net.load_state_dict(model.state)
    save_tensors(tmp_path/"model.safetensors", model.state, model.meta)
    forms = {"module": net, "state dict": model.state, "file": tmp_path/"model.safetensors"}
    found = match_classes(forms[form], network(1), **FEW)
    expected = match_classes(model, network(1), **FEW)
    np.testing.assert_allclose(found.score, expected.score, atol=.02)
    assert len(name_classes(forms[form], model, **FEW)) == 6


@pytest.mark.parametrize("source", [3, None, [torch.zeros(2)]])
def test_what_is_no_model_is_refused(source):
    with expect_fail(TypeError, regex="give a file, a folder"): match_classes(network(0), source, **FEW)


def test_several_labels_for_one_image_are_named():
    named = name_classes(trained(0, n_classes=4), "cifar100", multilabel=True)
    assert len(named) == 4 and named.probability.between(0, 1).all()
    rows = describe_classes(network(0), multilabel=True, **FEW).rows
    assert rows.shape == (6, 128)
    assert not torch.allclose(rows, describe_classes(network(0), **FEW).rows, atol=.05)


def test_agreement_is_the_probability_of_the_same_known_class():
    scores = torch.zeros(2, 2)
    sure = torch.eye(3, dtype=torch.double)[:2]
    found = with_agreement(scores, sure, sure)
    expected = WEIGHT*torch.tensor([[1 + FLOOR, FLOOR], [FLOOR, 1 + FLOOR]]).log()
    torch.testing.assert_close(found, expected)


def gallery_networks():
    "Made-up networks for the experiment: five tasks, the first one twice"
    networks, vectors = made_up(noise=1.)
    networks.append(described("0123", vectors, 1., seed=11))
    kinds = ["a"]*5 + ["b"]
    return [Described(kind, about, about.rows) for kind, about in zip(kinds, networks)]


@pytest.mark.parametrize("pair", [(0, 1), (2, 5)])
def test_pairs_are_scored_as_with_a_gallery_of_networks_of_other_tasks(pair):
    networks = gallery_networks()
    a, b = (networks[i] for i in pair)
    rest = [other for other in networks if set(other.names) not in (set(a.names), set(b.names))]
    names = sorted(set().union(*(other.names for other in rest)))
    gallery = Gallery(torch.cat([other.rows for other in rest]), prototypes(rest, names), {})
    found, = (p.scores for p in all_pairs(networks) if (p.i, p.j) == pair)
    torch.testing.assert_close(found, pair_scores(a.about, b.about, gallery), atol=1e-4, rtol=1e-4)
    assert len(rest) == 3  # not the second network of the first task


def test_ways_to_score_pairs_differ():
    networks = gallery_networks()
    found = {way: all_pairs(networks, way=way)[0].scores for way in ("known", "unknown", "alone", "plain")}
    assert len({tuple(scores.flatten().tolist()) for scores in found.values()}) == 4
    a, b = networks[:2]
    torch.testing.assert_close(found["plain"], a.rows @ b.rows.T)
    with expect_fail(ValueError, regex="choose from known, unknown, alone, plain"): all_pairs(networks, way="guessed")


def test_descriptors_of_images_that_are_no_longer_used_are_refused(tmp_path):
    about = described("0123", made_up()[1])
    ClassDescriptors(about.logits, about.names, dict(n_images=64, kinds="rough")).save(tmp_path/"old.safetensors")
    with expect_fail(ValueError, regex="no longer used"): load_class_descriptors(tmp_path/"old.safetensors")


@pytest.mark.parametrize("name", packed_classes())
def test_packed_classes_name_their_own_networks(name):
    networks = packed_networks(packed_classes()[name])
    known = load_class_descriptors(name)
    assert known.images == load_class_descriptors("cifar100").images
    for network in networks[:5]:
        best = name_pair(network, name).iloc[0]
        assert [best["first"], best["second"]] == network.names


def test_descriptors_of_modelset500_are_those_of_the_repository():
    "The package has a copy of what `scripts/pack_zoo.py` wrote last"
    packed = packed_classes()
    assert packed["modelset500"].read_bytes() == packed["modelset500-cifar100-epoch80"].read_bytes()


@pytest.mark.parametrize("meta, why", [
    (dict(images=None), "images"), (dict(names=["a", "b", "c"]), "expected \\(16, 3\\)"), (dict(names=5), "names"),
    (dict(images=dict(n_images=10**9, seed=0, size=32)), "n_images"), (dict(images=dict(n_images=16, size=2)), "size"),
    (dict(images=dict(n_images=16, seed=0, size=32, kinds="rough")), "no longer used"), (dict(multilabel="q"), "multi"),
])
def test_what_a_file_says_of_its_descriptors_is_checked(tmp_path, meta, why):
    "Also descriptors by network, which only files that come with lps have, are not read from others"
    about = dict(names=["a", "b"], images=dict(n_images=16, seed=0, size=32), multilabel=False, members=[1])
    save_tensors(tmp_path/"sound.safetensors", dict(logits=torch.randn(16, 2)), about)
    assert load_class_descriptors(tmp_path/"sound.safetensors").prototypes is None
    save_tensors(tmp_path/"odd.safetensors", dict(logits=torch.randn(16, 2)), about | meta)
    with pytest.raises(ValueError, match=why): load_class_descriptors(tmp_path/"odd.safetensors")


def test_no_folder_that_a_file_names_is_read(tmp_path):
    about = dict(names=["a", "b"], images=dict(folder=str(tmp_path), n_images=16), multilabel=False)
    save_tensors(tmp_path/"photographs.safetensors", dict(logits=torch.randn(16, 2)), about)
    with pytest.raises(ValueError, match="give that folder too"):
        match_classes(tmp_path/"photographs.safetensors", some_net(0, 0))


def test_descriptors_are_not_described_again():
    with pytest.raises(ValueError, match="give a model"): describe_classes("cifar100")


def test_an_untrained_network_gets_no_probabilities(tmp_path, caplog):
    usual = describe_classes(trained(0))
    assert usual.untrained == "" and not caplog.records
    assert match_classes(usual, trained(1)).probability.notna().all()
    fresh = describe_classes(network(0))
    assert "batch normalisation" in fresh.untrained and "seems untrained" in caplog.text
    fresh.save(tmp_path/"fresh.safetensors")
    again = load_class_descriptors(tmp_path/"fresh.safetensors")
    assert again.untrained == fresh.untrained
    for a, b in ((again, usual), (usual, again)):
        assert match_classes(a, b).probability.isna().all() and np.isnan(relate_classes(a, b)["shared"])
    named = name_classes(again, "cifar100")
    assert named.probability.isna().all() and named.none.isna().all()


def test_images_are_counted_over_both_networks():
    counts = []
    describe_pair(trained(0), trained(1), progress=lambda *n: counts.append(n), n_images=96, size=8)
    assert counts == [(64, 192), (96, 192), (160, 192), (192, 192)]
    counts.clear()
    describe_pair(trained(0), "cifar100", progress=lambda *n: counts.append(n))
    assert counts[-1] == (768, 768)


def test_descriptors_in_bfloat16_are_close():
    exact, rounded = (describe_classes(trained(0), 96, precision=p) for p in ("float32", "bfloat16"))
    assert not torch.equal(exact.logits, rounded.logits)
    assert (exact.rows*rounded.rows).sum(1).min() > .99


def test_ordered_pairs_are_ranked_among_the_tasks_of_the_set():
    cosines = torch.zeros(4, 4).fill_diagonal_(-torch.inf)
    cosines[0, 2] = 1.  # no task of this set
    cosines[0, 1] = .5
    decoded = [Decoded(cosines, list("abcd"), right) for right in ((0, 1), (3, 2))]
    assert [one.rank for one in decoded] == [1, 2]
    assert [one.rank for one in among_tasks(decoded)] == [0, 1]
    assert decoding_figures(decoded, 10)["pairs"] == 12 and decoding_figures(among_tasks(decoded), 10)["pairs"] == 4
