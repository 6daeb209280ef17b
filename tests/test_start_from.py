"""Which network to start from: no adviser sees what it may not, ties and intervals are fair"""
import copy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.isotonic import IsotonicRegression

from lps.advice.advisers import ADVISERS, companions, popularity
from lps.advice.expected import expected_accuracy, fit_expected_accuracy
from lps.advice.score import explained_by, linear_cka, read_out, transfer_score
from lps.core.files import write_json
from lps.methods.probes import centred_outputs
from lps.methods.synthetic import noise_images
from lps.models.model import Model
from lps.nets.resnet import ResNet
from lps.study.registry import result_files
from lps.study.start_from import (
    Protocol,
    Target,
    fine_tuned_accuracy,
    labelled_draws,
    plot_start_from,
    relation_of,
    start_from_table,
    start_from_text,
    trial_of,
    worth,
    worth_by_target,
)

FILES = result_files(ROOT/"results", "start_from")


def network(seed, classes=2) -> Model:
    "An untrained network"
    torch.manual_seed(seed)
    state = {name: v.clone() for name, v in ResNet(8, 4).state_dict().items()}
    stats = dict(mean=[.5] * 3, std=[.25] * 3)
    return Model(state, dict(task=seed, shortcut="conv") | stats)


@pytest.fixture(scope="module")
def pair(): return network(0), network(1)


@pytest.fixture
def pairs():
    "Accuracy of twelve sources of six tasks on these tasks, whose own pairs stand out"
    rng, tasks = np.random.default_rng(0), np.repeat(np.arange(6), 2)
    own = tasks[:, None] == np.arange(6)
    return np.where(own, .95, rng.uniform(.5, .9, own.shape)), own, tasks


def test_agreement_of_outputs_is_the_squared_correlation_of_margins():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 30, 2, generator=g), torch.randn(3, 30, 2, generator=g)
    margins = [(z[..., 1] - z[..., 0]).numpy() for z in (a, b)]
    shares = explained_by((torch.randn(30, 4, generator=g), a[0]), b)
    np.testing.assert_allclose(shares.outputs, np.corrcoef(*margins)[0, 2:]**2, atol=1e-5)


def test_score_is_the_mean_of_read_out_and_agreement(pair):
    bank = noise_images(96)
    source, target = (model.features_and_outputs(bank) for model in pair)
    agreement = linear_cka(centred_outputs(source[1][None]), centred_outputs(target[1][None])).item()
    wanted = (read_out(source[0], target[1][None])[0] + agreement)/2
    assert transfer_score(*pair, bank) == pytest.approx(wanted)
    assert explained_by(source, target[1][None]).score[0] == pytest.approx(wanted)


def test_score_knows_no_order_of_classes_and_has_a_direction(pair):
    source, target = pair
    bank, turned = noise_images(96), dict(target.state)
    for name in ("fc.weight", "fc.bias"): turned[name] = 3*target.state[name].flip(0)
    score = transfer_score(source, target, bank)
    assert transfer_score(source, Model(turned, target.meta), bank) == pytest.approx(score, abs=1e-4)
    assert transfer_score(target, source, bank) != pytest.approx(score, abs=1e-3)
    assert transfer_score(source, source, bank) > .99


def test_nothing_is_measured_on_a_labelled_image_or_on_one_the_network_has_seen():
    target = Target(torch.zeros(60, 3, 1, 1, dtype=torch.uint8), torch.arange(60) % 2, torch.arange(60) < 30)
    protocol = Protocol(n_labelled=5, n_draws=3)
    for own in (False, True):
        for labelled, measuring in labelled_draws(target, protocol, own):
            assert np.bincount(target.labels[labelled]).tolist() == [5, 5]
            assert not set(labelled) & set(measuring) and max(labelled) < 30
            assert (max(measuring) < 30) == own
    other = labelled_draws(target, replace(protocol, seed=1))
    assert set(other[0][0]) != set(labelled_draws(target, protocol)[0][0])


def test_the_popular_source_knows_nothing_of_the_target(pairs):
    accuracy, own, _ = pairs
    before = popularity(accuracy, own)
    changed = accuracy.copy()
    changed[:, 2] = 0
    after = popularity(changed, own)
    np.testing.assert_allclose(after[:, 2], before[:, 2])
    assert not np.allclose(after[:, 3], before[:, 3])


def test_the_ceiling_leaves_a_source_out(pairs):
    accuracy, _, tasks = pairs
    changed = accuracy.copy()
    changed[4] = 0
    np.testing.assert_allclose(companions(changed, tasks)[4], accuracy[5])


def test_who_knows_it_all_gains_and_who_knows_nothing_is_drawn_fairly(pairs):
    accuracy, own, _ = pairs
    scores = dict(random=0*accuracy, popular=popularity(accuracy, own), right=accuracy)
    found = worth(scores, accuracy, own, n_boot=200)
    assert found["right"]["regret"] == [0, 0, 0] and found["right"]["first_gain"][1] > 0
    assert found["right"]["rho"][0] == pytest.approx(1) and found["right"]["pairs"][0] == pytest.approx(1)
    assert found["random"]["rho"] == [0, 0, 0] == found["popular"]["rho_gain"]
    means = [accuracy[~own[:, t], t].mean() for t in range(6)]
    np.testing.assert_allclose(worth_by_target(scores["random"], accuracy, own)["first"], means)


def test_own_pairs_never_count(pairs):
    accuracy, own, _ = pairs
    other = np.where(own, 0, accuracy)
    best_own = np.where(own, 9, accuracy)
    a, b = worth_by_target(best_own, accuracy, own), worth_by_target(other, other, own)
    np.testing.assert_allclose(a, b)


def seen_by_hand(tasks, targets, rng):
    "Observations by hand, where outputs of one task are alike"
    probes = {t: torch.tensor(rng.normal(size=(40, 2)), dtype=torch.float32) for t in targets}
    seen = []
    for task in tasks:
        shown = dict(accuracy=.7, ari=.1, logme=0., neighbours=.6)
        measured = [shown | dict(labelled=torch.tensor(rng.normal(size=(10, 4)))) for _ in targets]
        outputs = probes[task] + .1*torch.tensor(rng.normal(size=(40, 2)), dtype=torch.float32)
        seen.append(dict(measured=measured, runs=dict(noise=(outputs, outputs)), seconds=dict(noise=1.)))
    return seen


def test_advice_has_a_table_for_each_adviser_that_has_what_it_needs(pairs):
    tasks = pairs[2]
    trial = trial_of(seen_by_hand(tasks, range(6), np.random.default_rng(0)), tasks, list(range(6)))
    assert list(trial.scores) == [name for name in ADVISERS if name not in ("crops", "photographs", "fitted")]
    score = trial.scores["score"]
    assert score[trial.own].min() > score[~trial.own].max()
    assert trial.scores["cka"][[0, 2], [0, 1]] == pytest.approx(1)


def test_training_every_layer_leaves_the_source_as_it_was(pair):
    source = pair[0]
    before = copy.deepcopy(source.state)
    g, y = torch.Generator().manual_seed(0), torch.arange(80) % 2
    images = (100*torch.rand(80, 3, 8, 8, generator=g) + 120*y[:, None, None, None]).to(torch.uint8)
    target = Target(images, y, torch.ones(80, dtype=torch.bool))
    draw = labelled_draws(target, Protocol(n_labelled=20))[0]
    assert fine_tuned_accuracy(source, target, draw, epochs=10) > .8
    assert all(torch.equal(v, before[name]) for name, v in source.state.items())


def test_interval_holds_what_it_says_on_targets_it_has_not_seen():
    rng = np.random.default_rng(1)
    groups, scores = np.repeat(np.arange(40), 25), rng.uniform(0, 1, 1000)
    accuracy = .5 + .3*scores + .04*rng.standard_normal(40)[groups]
    relation = fit_expected_accuracy(scores[groups < 20], accuracy[groups < 20], groups[groups < 20], level=.9)
    curve = relation.predict(scores[groups >= 20])
    held = ((accuracy[groups >= 20] >= curve.low) & (accuracy[groups >= 20] <= curve.high)).mean()
    assert .8 < held <= 1 and relation.held == pytest.approx(held, abs=.1)
    whole = IsotonicRegression(out_of_bounds="clip").fit(scores[groups < 20], accuracy[groups < 20])
    assert np.abs(curve.expected - whole.predict(scores[groups >= 20])).max() < .05
    assert relation.predict([-5, 5]).expected.tolist() == [relation.expected[0], relation.expected[-1]]


def test_a_relation_of_another_kind_is_refused(tmp_path):
    relation = fit_expected_accuracy(np.arange(9)/9, np.arange(9)/9, np.arange(9) % 3)
    write_json(tmp_path/"good.json", asdict(relation))
    assert expected_accuracy(tmp_path/"good.json") == relation
    write_json(tmp_path/"bad.json", asdict(relation) | dict(below="wide"))
    with pytest.raises(ValueError, match="below"): expected_accuracy(tmp_path/"bad.json")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_result_file_agrees_with_its_pairs(path):
    record = FILES[path]
    accuracy, score = np.array(record.accuracy), np.array(record.score)
    own = np.array(record.tasks["sources"])[:, None] == record.tasks["targets"]
    again = worth_by_target(score, accuracy, own).mean()
    for measure in ("rho", "tau", "regret", "rel"):
        assert again[measure] == pytest.approx(record.worth["score"][measure][0], abs=.02)
    np.testing.assert_allclose(np.where(own, -1, accuracy).max(0), record.first["best"], atol=1e-3)
    assert f"{100*np.mean(record.first['score']):.1f} %" in start_from_text(record)
    assert len(start_from_table(record)) == len(record.worth) and len(plot_start_from(record).axes) == 2


def test_the_relation_in_the_package_is_that_of_its_result_file():
    relation = expected_accuracy()
    record = next(r for r in FILES.values() if relation.measured.startswith(f"{r.name}: "))
    assert relation == relation_of(record)
    curve = relation.predict([0, .5])
    assert (curve.low < curve.expected).all() and (curve.expected < curve.high).all()
