"""Transfer between tasks: known cases, no task seen by what compares it, one process or two, intervals that cover"""
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal, spearmanr

import lps.study.transfer
from lps.advice.score import cluster_ari, linear_cka, log_me
from lps.models.model import Model
from lps.nets.resnet import ResNet
from lps.study.records import fingerprint
from lps.study.transfer import (
    OTHER_HALF,
    TransferRecord,
    by_task,
    finding,
    halves_agreement,
    plot_transfer,
    rank_agreement,
    shared_superclass,
    task_similarity,
    task_targets,
    transfer,
    transfer_fields,
    transfer_table,
    transfer_text,
    unseen_folds,
    unseen_similarity,
    weight_similarity,
)
from lps.zoo.build import build
from lps.zoo.tasks import CIFAR100_SUPERCLASSES, ImageSet, channel_stats, load_images
from lps.zoo.recipe import recipes


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    tiny = replace(recipes["digits"], name="tiny", epochs=1, milestones=(), depth=8, width=4)
    return build(tmp_path_factory.mktemp("zoo"), "digits", tiny, n_models=2, workers=1, progress=False)


@pytest.fixture(scope="module")
def targets(zoo): return task_targets(zoo, load_images("digits", "test"))


def frame(values): return pd.DataFrame(values, pd.Index(range(len(values)), name="source"))


def test_cka_by_the_formula_of_kornblith():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 5, generator=g).double(), torch.randn(20, 3, generator=g).double()
    xc, yc, h = x - x.mean(0), y - y.mean(0), torch.eye(20).double() - 1/20
    by_features = (yc.T @ xc).norm()**2/((xc.T @ xc).norm()*(yc.T @ yc).norm())
    hsic = lambda k, l: (k @ h @ l @ h).trace()
    by_kernels = hsic(x @ x.T, y @ y.T)/(hsic(x @ x.T, x @ x.T)*hsic(y @ y.T, y @ y.T)).sqrt()
    assert linear_cka(x[None], y[None]).item() == pytest.approx(by_features.item()) == pytest.approx(by_kernels.item())


def test_cka_of_what_is_equal_and_of_what_is_orthogonal():
    x = torch.tensor([[1., 0], [-1, 0], [0, 0], [0, 0]])
    y = torch.tensor([[0., 0], [0, 0], [1, 0], [-1, 0]])
    assert linear_cka(x[None], 3*x[None] + 5).item() == pytest.approx(1)
    assert linear_cka(x[None], y[None]).item() == pytest.approx(0)
    assert linear_cka(torch.stack([x, y]), torch.stack([x, y, x + y])).shape == (2, 3)


@pytest.mark.parametrize("n, d", [(40, 6), (12, 30)])
def test_log_me_is_the_largest_gaussian_evidence(n, d):
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(n, d)), rng.permutation(np.arange(n) % 2)
    z[:, 0] += y
    def evidence(c):
        def loss(log): return -multivariate_normal(cov=np.exp(log[0])*z @ z.T + np.exp(log[1])*np.eye(n)).logpdf(y == c)
        return -min(minimize(loss, start, method="Nelder-Mead").fun for start in ([-2, -1], [0, -2]))
    assert log_me(torch.tensor(z), torch.tensor(y)) == pytest.approx(np.mean([evidence(0), evidence(1)])/n, abs=2e-3)


def test_log_me_prefers_features_that_tell_the_classes_apart():
    z, y = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
    assert log_me(z + 2*y[:, None], y) > log_me(z, y)
    assert np.isfinite(log_me(torch.zeros(60, 8), y))


def test_ari_of_clear_and_of_no_clusters():
    g, y = torch.Generator().manual_seed(0), torch.arange(100) % 2
    z = torch.randn(100, 4, generator=g)
    assert cluster_ari(z + 20*y[:, None], y) == 1
    assert cluster_ari(z + 20*y[:, None], 1 - y) == 1
    assert abs(cluster_ari(z, y)) < .1
    assert cluster_ari(z, y, seed=3) == cluster_ari(z, y, seed=3)


def test_features_are_normalised_as_the_model_was_trained(zoo):
    x, model = load_images("digits", "test").images[:5], zoo[0]
    other = Model(model.state, {k: v for k, v in model.meta.items() if k not in ("mean", "std")})
    own = model.meta["mean"], model.meta["std"]
    torch.testing.assert_close(model.features(x, stats=([0.], [9.])), other.features(x, own))
    torch.testing.assert_close(model.features(x, bs=2), model.features(x))
    assert not torch.allclose(other.features(x, own), other.features(x, ([0.], [1.])))
    assert model.features(x).dtype == torch.float32
    for found, there in zip(channel_stats(load_images("digits")), own):
        torch.testing.assert_close(found, torch.tensor(there))


def test_float16_weights_give_float32_features():
    torch.manual_seed(0)
    half = {k: v.half() if v.ndim == 4 else v for k, v in ResNet(8, 4).state_dict().items()}
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    z = Model(half, dict(shortcut="conv")).features(images, ([.5]*3, [.3]*3))
    assert z.dtype == torch.float32 and z.shape == (3, 16)


def test_targets_by_other_names(zoo):
    held_out = load_images("digits", "test")
    letters = ImageSet(held_out.images, held_out.labels, list("abcdefghij"), "letters")
    renamed = task_targets(zoo, letters, dict(zip("0123456789", "abcdefghij")))
    for t, (x, y) in task_targets(zoo, held_out).items():
        assert torch.equal(renamed[t][0], x) and torch.equal(renamed[t][1], y)
    with pytest.raises(ValueError, match="names="): task_targets(zoo, letters)


def test_two_processes_give_what_one_gives(zoo, targets, processes):
    one, two = transfer(zoo, targets, n_init=2), transfer(zoo, targets, n_init=2, executor=processes)
    for k in one: pd.testing.assert_frame_equal(one[k], two[k])
    assert one["ari"].shape == (10, 5) and by_task(one["ari"]).shape == (5, 5)
    t, i = zoo.tasks[1], 0
    assert one["ari"].iloc[i][t] == cluster_ari(zoo[i].features(targets[t][0]), targets[t][1], n_init=2)
    z = torch.stack([m.features(targets[t][0]) for m in (zoo[0], zoo[2], zoo[3])])
    assert one["cka"].iloc[i][t] == pytest.approx(linear_cka(z[:1], z[1:]).mean().item(), abs=1e-6)


@pytest.mark.parametrize("n, groups", [(5, 10), (20, 10), (7, 3), (50, 10)])
def test_every_pair_of_tasks_is_held_out_together(n, groups):
    folds = unseen_folds(range(n), groups)
    assert len(folds) == min(n, groups)*(min(n, groups) - 1)//2
    assert all(any({a, b} <= set(f) for f in folds) for a, b in combinations(range(n), 2))
    assert max(map(len, folds)) <= n - 2


@pytest.mark.parametrize("n, groups", [(3, 10), (10, 2), (10, 1)])
def test_too_few_tasks_left_to_learn_from(n, groups):
    with pytest.raises(ValueError, match="remain for the fit"): unseen_folds(range(n), groups)


def test_no_network_compares_what_it_has_seen(zoo, monkeypatch):
    seen, compared, embed = [], [], lps.study.transfer.embed_models
    def spy(net, models): seen.append(set(net.tasks)); compared.append(set(models.tasks)); return embed(net, models)
    monkeypatch.setattr(lps.study.transfer, "embed_models", spy)
    table = unseen_similarity(zoo, epochs=1, n_filters=4, n_splits=2)
    assert len(seen) == 20 and not any(s & c for s, c in zip(seen, compared))
    assert all(s | c == set(zoo.tasks) for s, c in zip(seen, compared))
    assert (
        list(table.index) == list(table.columns) == zoo.tasks
        and table.notna().all(axis=None)
        and np.allclose(table, table.T)
    )
    pd.testing.assert_frame_equal(table, unseen_similarity(zoo, epochs=1, n_filters=4, n_splits=2))


def test_similarity_of_tasks_is_the_mean_over_pairs_of_models():
    z, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 2, 2, 5])
    cosines = torch.cosine_similarity(z[:, None], z[None], dim=-1)
    table = task_similarity(z, labels)
    assert table.loc[0, 2] == pytest.approx(cosines[:3, 3:5].mean().item(), abs=1e-6) and list(table.index) == [0, 2, 5]


def test_weights_of_all_convolutions_and_nothing_else(zoo):
    state = zoo[0].state
    assert [l for l in zoo.layers if zoo.shapes[f"{l}.weight"][2:]] == [
        k.removesuffix(".weight") for k, v in state.items() if v.ndim == 4
    ]
    assert not np.allclose(weight_similarity(zoo), weight_similarity(zoo, ("conv1",)))


def test_rho_is_scipys_and_its_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    ari = frame(rng.normal(size=(15, 15)))
    p = {
        "same": 3 * ari + 1,
        "reverse": -ari,
        "noisy": ari + rng.normal(size=(15, 15)),
        "nothing": frame(np.ones((15, 15))),
    }
    table, off = rank_agreement(ari, p, n_boot=100), ~np.eye(15, dtype=bool)
    assert table.rho["noisy"] == pytest.approx(spearmanr(ari.values[off], p["noisy"].values[off]).statistic)
    within = [spearmanr(ari.values[off[:, t], t], p["noisy"].values[off[:, t], t]).statistic for t in range(15)]
    assert table.rho_within["noisy"] == pytest.approx(np.mean(within))
    values = ["rho", "low", "high", "rho_within", "low_within", "high_within"]
    assert table.loc["same", values].tolist() == pytest.approx([1] * 6) and table.loc[
        "reverse", values
    ].tolist() == pytest.approx([-1] * 6)
    assert table.p["same"] == table.p["reverse"] == pytest.approx(1/101)
    assert table.low["noisy"] < table.rho["noisy"] < table.high["noisy"] and table.loc["nothing"].isna().all()
    pd.testing.assert_frame_equal(table, rank_agreement(ari, p, n_boot=100))


def test_easy_targets_alone_are_no_agreement_within_targets():
    "A predictor that knows how easy each target is, and nothing of sources"
    rng = np.random.default_rng(0)
    easy = rng.normal(size=20)
    ari, p = frame(easy + .3*rng.normal(size=(20, 20))), frame(easy + .3*rng.normal(size=(20, 20)))
    r = rank_agreement(ari, {"p": p}, n_boot=100).loc["p"].to_dict()
    assert finding(r) == "above chance" and finding(r, "_within") == "not distinguishable from chance"


def test_a_bootstrap_over_tasks_is_wider_than_one_over_pairs():
    "Each task has its own level, so the pairs of a task go together"
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 12))
    ari, p, off = a[:, None] + a, b[:, None] + b, ~np.eye(12, dtype=bool)
    r = rank_agreement(frame(ari), {"p": p}, n_boot=300).loc["p"]
    pairs = [spearmanr(*np.stack([ari[off], p[off]])[:, rng.integers(132, size=132)]).statistic for _ in range(300)]
    assert r.high - r.low > 1.3*np.subtract(*np.quantile(pairs, (.975, .025)))


def test_p_is_even_where_nothing_is_to_be_found():
    rng = np.random.default_rng(0)
    ps = [
        rank_agreement(
            frame(a[:, None] + rng.normal(size=(8, 8))), {"p": b + rng.normal(size=(8, 8))}, n_boot=30, seed=i
        ).p.item()
        for i, (a, b) in enumerate(rng.normal(size=(30, 2, 8)))
    ]
    assert .3 < np.mean(ps) < .7 and np.mean(np.array(ps) < .1) < .25


def test_superclasses():
    assert len(CIFAR100_SUPERCLASSES) == 100 and set(pd.Series(CIFAR100_SUPERCLASSES).value_counts()) == {5}
    classes = dict(task=[0, 1, 2], class_0=["apple", "pear", "bee"], class_1=["rose", "orange", "poppy"])
    class Set: manifest = pd.DataFrame(classes)
    table = shared_superclass(Set, CIFAR100_SUPERCLASSES)
    assert table.loc[0].tolist() == [1, .5, 1/3] and np.allclose(table, table.T)
    with pytest.raises(ValueError, match="'bee'"):
        shared_superclass(Set, {k: v for k, v in CIFAR100_SUPERCLASSES.items() if k != "bee"})


def record_of(zoo, ari, predictors):
    "A record of a toy"
    return TransferRecord.make(zoo, dict(name="toy"), **transfer_fields(zoo, ari, predictors, n_boot=50))


def test_record_table_figure_and_words_agree(zoo, tmp_path):
    rng = np.random.default_rng(0)
    ari = pd.DataFrame(rng.random((10, 5)), pd.Index(zoo.labels.tolist(), name="source"), zoo.tasks)
    predictors = dict(lps=by_task(ari) + .01, stem=-by_task(ari), convs=frame(rng.random((5, 5))))
    record = record_of(zoo, ari, predictors)
    assert str(tmp_path.parent) not in str(record) and record.model_set.sha256 == fingerprint(zoo)
    assert record.rho["lps"]["rho"] == 1 and record.rho["stem"]["rho"] == -1
    text = transfer_text(record)
    assert "**predicts** transfer" in text and "above chance: LPS" in text and "below chance: raw stem" in text
    assert transfer_table(record).iloc[0, 0] == "1.00 [1.00, 1.00]"
    assert len([ax for ax in plot_transfer(record).axes if ax.collections]) == 3
    assert "does **not** predict" in transfer_text(record_of(zoo, ari, dict(lps=-by_task(ari))))
    assert halves_agreement(ari, n_boot=10).shape == (1, 8)


TRANSFERRED = dict(
    model_set=dict(models=2, tasks=2, data=[], recipe=[]),
    settings=dict(name="toy"),
    versions={},
    machine=dict(cores=1, cpu="any"),
    time="2026-01-01",
    tasks=[0, 1],
    classes=[["a", "b"], ["c", "d"]],
    ari=[[.1, .2], [.3, .4]],
    predictors=dict(lps=[[1., 2.], [3., None]]),
    rho={k: dict(rho=.5, low=.1, high=.9, p=.01) for k in ("lps", OTHER_HALF)},
)


@pytest.mark.parametrize("change, field", [
    (dict(settings={}), "settings.name"), (dict(ari=None), "ari"), (dict(ari=[[1.]]*2), "ari"), (dict(ari=[]), "ari"),
    (dict(rho={}), "rho.lps.rho"),
    (dict(rho=dict(lps=dict(rho="high"))), "rho.lps.rho"), (dict(predictors=[1]), "predictors"),
    (dict(predictors=dict(lps=[[1.]])), "predictors.lps"),
])
def test_a_broken_record_names_its_field(change, field):
    record = TransferRecord.from_dict(TRANSFERRED)
    transfer_text(record), transfer_table(record), plot_transfer(record)
    with pytest.raises(ValueError, match=f"'{field}"): TransferRecord.from_dict(TRANSFERRED | change)


def test_names_are_shown_escaped():
    evil = "<b>\x1b[2J$x$"
    record = TransferRecord.from_dict(TRANSFERRED | dict(
        settings=dict(name=evil),
        predictors={evil: [[1., 2.], [3., 4.]]},
        rho=TRANSFERRED["rho"] | {evil: dict(rho=.5, low=.1, high=.9)},
    ))
    text = transfer_text(record)
    assert "<b>" not in text and "\x1b" not in text and "\x1b" not in transfer_table(record).to_string()
    fig = plot_transfer(record)
    fig.canvas.draw()
    assert "\x1b" not in fig.get_suptitle() + fig.axes[0].get_title()
