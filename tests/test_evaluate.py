"""Evaluation: fits side by side give the tables of fits one by one, read-outs, putting branches together, finding a
result again"""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lps.study.splits import classification_splits
from lps.study.stats import rank_k
from lps.study.table1 import CLASSIFIERS, classify, table1, top_k
from lps.study.table2 import table2
from lps.methods.combine import FUSIONS, fuse, learn_alpha
from lps.study.records import RunsRecord, find_record, runs_fields, summary
from lps.core.files import save_tensors
from lps.models.modelset import load_modelset
from lps.methods.registry import score_models
from lps.methods.registry import fit_method

FEW = dict(epochs=2, milestones=(1,), n_filters=6)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Four tasks of four models: stems and one inner layer"
    folder, g = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)
    for task in range(4):
        stem = torch.randn(8, 3, 3, 3, generator=g)
        for run in range(4):
            state = {
                "conv1.weight": (stem + torch.randn(8, 3, 3, 3, generator=g))[torch.randperm(8, generator=g)],
                "layer1.0.conv1.weight": torch.randn(8, 8, 3, 3, generator=g),
            }
            save_tensors(folder/f"task{task}_run{run}.safetensors", state, dict(task=task, run=run))
    return load_modelset(folder)


def test_tables_are_those_of_fits_one_by_one(models):
    splits = classification_splits(models.labels, 3, 2)
    by_hand = [rank_k(score_models(net, models[test]), models.labels[test], torch.tensor(net.tasks))
               for i, (train, test) in enumerate(splits) for net in [fit_method(models[train], "lps", seed=i, **FEW)]]
    one_by_one = [table1(models, 2, 3, **FEW), table2(models, 2, 2, 1, **FEW)]
    with ThreadPoolExecutor(2) as ex:
        at_once = [table1(models, 2, 3, executor=ex, **FEW), table2(models, 2, 2, 1, executor=ex, **FEW)]
    assert np.array_equal(one_by_one[0].loc["lps"], by_hand)
    assert all(a.equals(b) for a, b in zip(one_by_one, at_once))


def test_settings_may_differ_in_anything(models):
    splits = classification_splits(models.labels, 3, 2)
    runs = classify(
        models, splits, settings={"stem": {}, "inner, folded": dict(layers=("layer1.0.conv1",), folded=True)}, **FEW
    )
    assert runs.loc["stem"].equals(classify(models, splits, **FEW)) and len(runs) == 4


def test_every_classifier_ranks_every_task(models):
    splits = classification_splits(models.labels, 3, 1)
    for name in CLASSIFIERS: assert classify(models, splits, name, **FEW).iloc[0, -1] == 1
    with pytest.raises(ValueError, match="'vote' is unknown.*scores, nearest, centroid"):
        classify(models, splits, "vote", **FEW)


def test_a_triplet_network_classifies_by_its_neighbours(models):
    splits = classification_splits(models.labels, 3, 2)
    runs = classify(
        models,
        splits,
        classifier="centroid",
        loss="triplet",
        bs=6,
        per_task=3,
        epochs=40,
        milestones=(30,),
        lr=1e-2,
        n_filters=40,
    )
    assert runs["top-1"].mean() > .5


def test_one_split_has_no_deviation(models):
    t = summary(table1(models, 1, 3, methods=("lps",), **FEW))
    assert "±" not in t.to_string() and "nan" not in t.to_string()


@pytest.mark.parametrize("how", FUSIONS)
def test_one_branch_fused_ranks_as_it_does_alone(how):
    p = torch.randn(1, 20, 6).log_softmax(-1)
    assert torch.equal(fuse(p, how).argsort(1), p[0].argsort(1))
    many = torch.cat([p, torch.randn(3, 20, 6).log_softmax(-1)])
    torch.testing.assert_close(fuse(many, how, torch.tensor([1., 0, 0, 0])).argsort(1), p[0].argsort(1))


def test_learned_alpha_is_the_best_on_the_simplex():
    torch.manual_seed(0)
    p, y = (2*torch.randn(4, 60, 5)).log_softmax(-1), torch.arange(60) % 5
    alpha = learn_alpha(p, y)
    likelihood = lambda a: fuse(p, alpha=a).log()[range(60), y].mean().item()
    assert abs(alpha.sum() - 1) < 1e-5 and alpha.min() >= 0
    assert likelihood(alpha) >= max(likelihood(a) for a in torch.distributions.Dirichlet(torch.ones(4)).sample((500,)))


def test_top_k_of_scores(models):
    splits = classification_splits(models.labels, 3, 2)
    right = [torch.nn.functional.one_hot(models.labels[test], 4).float() for _, test in splits]
    runs = top_k(dict(right=right, wrong=[1 - r for r in right]), models, splits)
    assert (runs.loc["right"] == 1).all(axis=None) and (runs.loc["wrong", "top-1"] == 0).all()


def test_a_result_is_found_by_models_and_settings(models, tmp_path):
    path, t = tmp_path/"r.json", table1(models, 2, 3, methods=("lps",), **FEW)
    assert find_record(RunsRecord, path, models, FEW) is None
    record = RunsRecord.make(models, FEW | dict(name="r"), **runs_fields(t))
    record.write(path)
    assert find_record(RunsRecord, path, models, FEW) == record
    for other in (FEW | dict(epochs=3), dict(lr=1)): assert find_record(RunsRecord, path, models, other) is None
    assert find_record(RunsRecord, path, models[:-1], FEW) is None
