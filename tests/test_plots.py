"""Figures: the order of methods, names that are shown as they are, records that lack what a figure needs"""
import warnings
from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

from lps.methods.registry import METHODS, Method, method_title, register_method
from lps.study.figures import plot_embedding, plot_rank_k, plot_similarity
from made_up import base_record

from lps.study.alignment import ALIGNMENTS, AlignmentRecord, alignment_table, plot_alignment
from lps.study.branches import BranchRecord, plot_branches
from lps.study.fusion import FusionRecord, plot_fusion
from lps.study.table1 import TableRecord, plot_unseen
from lps.study.triplet import TripletRecord, plot_triplet

EVIL = ["a\x1b[31mred\x07", "US$ / CAN$", "$\\frac{", "two\nlines", "<b>bold</b>", "x"*300]


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def record(methods, measure="top", layers=("conv1", "layer1"), name="toy", **parts):
    "A record of two splits"
    runs = {method: {f"{measure}-{k}": [.4, .6] for k in range(1, 21)} for method in methods}
    return base_record(20, name=name, n_splits=2, layers=list(layers)) | dict(n_right=1, runs=runs) | parts


def unseen(n_tasks=3, n_models=4):
    z = torch.randn(n_tasks*n_models, 6, generator=torch.Generator().manual_seed(0))
    tasks = [i//n_models for i in range(n_tasks*n_models)]
    return dict(tasks=tasks, names={str(t): f"task {t}" for t in range(n_tasks)}, embedding=z.tolist())


FUSED = dict(fusions=["mean"], best_branch="mean", chosen=[], oracle=[])
KNOWN = dict(classification=dict(runs={"triplet": {"top-1": [.4, .6]}}))
BOTH = [f"{variant}/{layer}" for variant in ALIGNMENTS for layer in ("conv1", "layer1")]
RECORDS = {
    plot_branches: (BranchRecord, record(["conv1", "layer1"])),
    plot_alignment: (AlignmentRecord, record(BOTH)),
    plot_fusion: (FusionRecord, record(["oracle: best branch", "mean"], alpha=[[.5, .5], [.4, .6]], **FUSED)),
    plot_triplet: (TripletRecord, record(["triplet"], "rank", **KNOWN)),
    plot_unseen: (TableRecord, record(["lps"], unseen=unseen())),
}


def texts_of(figure): return [t.get_text() for t in figure.findobj(Text)]


@pytest.mark.parametrize("draw", RECORDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("field", ["settings", "settings.name", "model_set", "model_set.tasks", "runs"])
def test_a_missing_part_is_named(draw, field):
    kind, whole = RECORDS[draw]
    draw(kind.from_dict(whole))
    broken, (*folders, last) = deepcopy(whole), field.split(".")
    part = broken
    for name in folders: part = part[name]
    del part[last]
    with pytest.raises(ValueError, match=f"field '{field}'"): kind.from_dict(broken)
    part[last] = 3j.imag if last == "name" else None
    with pytest.raises(ValueError, match=f"field '{field}"): kind.from_dict(broken)


@pytest.mark.parametrize("draw, field", [
    (plot_fusion, "alpha"), (plot_fusion, "chosen"), (plot_triplet, "classification"),
])
def test_a_missing_field_of_an_experiment_is_named(draw, field):
    kind, whole = RECORDS[draw]
    broken = {name: part for name, part in whole.items() if name != field}
    with pytest.raises(ValueError, match=f"field '{field}"): kind.from_dict(broken)


@pytest.mark.parametrize("draw", [plot_branches, plot_alignment, alignment_table])
def test_a_missing_run_is_named(draw):
    with pytest.raises(ValueError, match="runs"): draw(TableRecord.from_dict(record(["something else"])))


def test_embeddings_that_are_not_finite_are_refused():
    z, labels = torch.randn(6, 4), torch.arange(6)//3
    z[2, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or inf in 1 of 6"): plot_embedding(z, labels)
    with pytest.raises(ValueError, match="NaN or inf"): plot_similarity(z @ z.T, labels)
    broken = unseen()
    broken["embedding"][1] = broken["embedding"][1][:2]
    for wrong, found in ((broken, "different lengths"), (unseen() | dict(tasks=[0, 1]), "12 rows for 2 tasks")):
        with pytest.raises(ValueError, match=found): TableRecord.from_dict(record(["lps"], unseen=wrong))


def test_names_are_shown_as_they_are():
    "No control character reaches a figure, no name is read as a formula, no glyph is missing"
    z = torch.randn(4*len(EVIL), 5, generator=torch.Generator().manual_seed(0))
    labels, sim = torch.arange(len(z))//4, torch.corrcoef(z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in EVIL:
            evil = record([name], layers=[name], name=name, alpha=[[1.], [1.]], **FUSED)
            branches, fusion = BranchRecord.from_dict(evil), FusionRecord.from_dict(evil)
            axes = [plot_similarity(sim, labels, EVIL, name), plot_embedding(z, labels, EVIL, name),
                    plot_rank_k({name: np.arange(5)/5}, {name: np.arange(5)/5}, name), plot_branches(branches)]
            for figure in [*(ax.figure for ax in axes), plot_fusion(fusion)]:
                figure.canvas.draw()
                shown = "".join(texts_of(figure))
                assert "\x1b" not in shown and "\x07" not in shown
                assert r"\x1b[31m" in shown or name != EVIL[0]
            plt.close("all")


def test_methods_come_in_the_order_of_the_registry():
    "What is under test comes first, baselines after it; a new method is drawn under its title"
    runs = {
        name: pd.DataFrame({"rank-1": [0.1, 0.2], "rank-2": [0.3, 0.4]})
        for name in ("odd", "frobenius", "mine", "lps", "fc")
    }
    runs = pd.concat(runs, names=["method", "split"])
    lps = METHODS["lps"]
    register_method(Method("mine", "My own", False, lps.reads, lps.fit, lps.fitted))
    try: labels = [line.get_label() for line in plot_rank_k(runs).lines]
    finally: del METHODS["mine"]
    assert labels == [method_title("lps"), "My own", method_title("fc"), method_title("frobenius"), "odd"]
