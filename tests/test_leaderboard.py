"The method that is taken where none is named is the one that result files say is right most often"
import pytest
from conftest import ROOT

from lps.study.leaderboard import leaderboard, measured
from lps.methods.registry import LEADERS, leading_method
from lps.methods.registry import METHODS, method_title
from lps.models.modelset import load_modelset

FOUND = measured(ROOT/"results")


@pytest.mark.parametrize("kind, name", [("whole networks", "foreignzoo"), ("first layers", "modelset500-epoch20")])
def test_the_leader_leads_among_methods_without_a_caveat(kind, name):
    rows = FOUND[(FOUND["set"] == name) & (FOUND.splits >= 20)]
    free = rows[[not METHODS[method].caveat for method in rows.method]]
    stems = "lps", "stem-signature", "weight-matching", "equivariant"
    if kind == "first layers": free = free[free.method.isin(stems)]
    assert free.set_index("method")["top-1"].idxmax() == LEADERS[kind]


def test_a_packed_set_gets_a_method_that_reads_what_it_holds():
    models = load_modelset("bundled")
    assert leading_method(models) == "two-spectra-probes"
    models.stored = {}
    assert leading_method(models) == "stem-signature"


def test_every_measured_method_has_one_row_and_says_what_it_needs():
    board = leaderboard(ROOT/"results")
    assert sorted(board.index) == sorted({method_title(method) for method in FOUND.method})
    assert all(board["", "needs"]) and all(board["", "exact invariances"])
