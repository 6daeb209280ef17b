"""Learning curves: nested splits, fewer tasks, networks that were stopped early, words that follow the numbers"""
from dataclasses import replace

import numpy as np
import pytest

from made_up import base_record

from lps.study.learning_curve import (
    CurveRecord, curve_summary, curve_table, curve_text, learning_curves, other_epochs, plot_curves, top1,
)
from lps.study.splits import nested_splits
from lps.study.table1 import classify
from lps.models.modelset import load_modelset
from lps.zoo.recipe import recipes
from lps.zoo.build import build

HOW = dict(n_filters=4, epochs=2, milestones=())


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    tiny = replace(recipes["digits"], name="tiny", epochs=2, milestones=(), depth=8, width=4)
    return build(tmp_path_factory.mktemp("zoo"), "digits", tiny, n_models=4, workers=1, progress=False, keep=(1,))


def test_splits_are_nested(zoo):
    small, more_models, more_tasks = (
        nested_splits(zoo.labels, k, n, 1, n_splits=5) for k, n in ((3, 1), (3, 3), (5, 1))
    )
    for (a, b), (c, d), (e, f) in zip(small, more_models, more_tasks):
        assert set(a) < set(c) and set(b) == set(d) and set(a) < set(e) and set(b) < set(f) and not set(c) & set(d)
        assert len(set(zoo.labels[a].tolist())) == 3 and sorted(zoo.labels[b].tolist()) == sorted(
            set(zoo.labels[a].tolist())
        )
    assert len({tuple(b) for _, b in small}) > 1


@pytest.mark.parametrize("k, n, m", [(6, 1, 1), (1, 1, 1), (5, 4, 1)])
def test_too_many_tasks_or_models(zoo, k, n, m):
    with pytest.raises(ValueError, match="use"): nested_splits(zoo.labels, k, n, m)


def test_top1_is_that_of_classify_on_a_set_of_these_tasks(zoo):
    splits = nested_splits(zoo.labels, 5, 3, 1, n_splits=2)
    assert top1(zoo, splits, **HOW) == pytest.approx(classify(zoo, splits, **HOW)["top-1"].tolist(), abs=1e-4)
    (train, test), = nested_splits(zoo.labels, 3, 3, 1, n_splits=1)
    some = np.sort(np.concatenate([train, test]))
    inside = tuple(np.searchsorted(some, i) for i in (train, test))
    assert top1(zoo, [(train, test)], **HOW) == pytest.approx(
        classify(zoo[some], [inside], **HOW)["top-1"].tolist(), abs=1e-4
    )


def test_other_epochs_compares_the_same_models(zoo, tmp_path):
    assert list(other_epochs(zoo)) == [1, 2]
    some = zoo[zoo.manifest.run.to_numpy(copy=True) < 3]
    assert [s.manifest.file.tolist() for s in other_epochs(some).values()] == [some.manifest.file.tolist()]*2
    assert not np.array_equal(other_epochs(zoo)[1].stack("conv1"), zoo.stack("conv1"))
    assert other_epochs(load_modelset(zoo.path/"epochs/001")) == {}


def test_curves_record_and_words(zoo):
    points = learning_curves(zoo, [3, 5], [1, 3], 1, n_splits=2, **HOW)
    assert [(p["curve"], p["x"], p["n_tasks"], p["n_train"]) for p in points] == [
        ("tasks", 3, 3, 3),
        ("tasks", 5, 5, 3),
        ("models", 1, 5, 1),
        ("models", 3, 5, 3),
        ("epochs", 1, 5, 3),
        ("epochs", 2, 5, 3),
    ]
    assert points[1]["top1"] == points[3]["top1"] == points[5]["top1"]
    record = CurveRecord.make(zoo, dict(name="toy", n_splits=2), points=points)
    assert str(zoo.path) not in str(record) and len(plot_curves(record).axes) == 6
    for p, high in zip(record.points, (.5, .9, .3, .9, .2, .9)): p.top1 = [high - .01, high + .01]
    assert curve_table(record).times.tolist() == pytest.approx([1.5, 4.5, 1.5, 4.5, 1, 4.5])
    assert "from 2 epochs of training on" in curve_text(record)
    record.points[5].top1 = [.1, .3]
    assert "at none of the epochs" in curve_text(record)
    assert "epoch" not in curve_text(replace(record, points=record.points[:4]))


def made_up(points, **settings) -> CurveRecord:
    return CurveRecord.from_dict(base_record(**settings) | dict(points=points))


def test_a_readable_epoch_exceeds_chance_by_a_standard_deviation():
    """By two standard errors this record would be above chance: 28 % - 6.7 % > 20 %; by one standard deviation, 10.5
    %, it is not
    """
    shares = [.18]*5 + [.38]*5
    point = dict(curve="epochs", x=4, n_tasks=5, top1=shares, val_accuracy=None)
    record = made_up([point])
    assert np.mean(shares) - 2*np.std(shares, ddof=1)/10**.5 > 1/5 > np.mean(shares) - np.std(shares, ddof=1)
    assert "at none of the epochs" in curve_text(record)
    record.points[0].top1 = [.23]*5 + [.33]*5
    assert "from 4 epochs of training on" in curve_text(record)


GOOD = dict(curve="tasks", x=2, n_tasks=2, top1=[.5, .6], val_accuracy=None)


@pytest.mark.parametrize("change, field", [
    (dict(curve="width"), "curve"), (dict(curve=None), "curve"), (dict(top1=[]), "top1"), (dict(top1="many"), "top1"),
    (dict(top1=[float("nan")]), "top1"),
    (dict(n_tasks=0), "n_tasks"), (dict(n_tasks="5"), "n_tasks"), (dict(x=None), "x"),
])
def test_a_broken_point_is_named(change, field):
    for f in (curve_table, curve_summary, curve_text, plot_curves): f(made_up([GOOD, GOOD]))
    with pytest.raises(ValueError, match=rf"'points\.1\.{field}"): made_up([GOOD, GOOD | change])


@pytest.mark.parametrize("change, field", [(dict(settings={}), "settings.name"), (dict(points=[]), "points")])
def test_a_record_without_its_parts_is_named(change, field):
    with pytest.raises(ValueError, match=f"'{field}'"):
        CurveRecord.from_dict(base_record() | dict(points=[GOOD]) | change)


def test_names_reach_the_text_escaped():
    text = curve_text(made_up([GOOD, GOOD | dict(x=3)], name="<img src=x>\x1b[2J"))
    assert "<img" not in text and "\x1b" not in text and "&lt;img" in text
