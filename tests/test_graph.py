"""Approximate search: what it finds is compared exactly, what it may load was built here, and what fails says why"""
import shutil
import sys

import numpy as np
import pytest
import torch
from test_store import WIDTH, batch, unit

import lps.index.store as store
from lps.cli import main
from lps.core.files import save_tensors
from lps.nets.resnet import ResNet
from lps.index.index import ModelIndex
from lps.index.share import save_pretrained
from lps.index.store import Rows, Store, create_store

pytest.importorskip("usearch")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LPS_HOME", str(tmp_path/"home"))
    return tmp_path/"home"


@pytest.fixture
def kept(tmp_path):
    made = create_store(tmp_path/"kept", WIDTH)
    made.append(*batch(0, 200))
    return made


def same(a, b): return np.array_equal(a[1], b[1]) and np.allclose(a[0], b[0], atol=1e-6)


def test_it_is_exact_where_all_rows_are_looked_at(kept):
    kept.build_graph()
    asked = unit(20, 5)
    for k in (1, 10, 200, 300): assert same(Store(kept.path).search_graph(asked, k), kept.search(asked, k))


def test_most_of_the_nearest_of_many_are_found(tmp_path):
    made = create_store(tmp_path/"many", WIDTH)
    made.append(*batch(0, 5000))
    made.build_graph()
    asked = unit(50, 3)
    found, wanted = made.search_graph(asked, 10), made.search(asked, 10)
    shared = [len(set(a) & set(b)) for a, b in zip(found[1], wanted[1])]
    assert np.mean(shared) > 9.5
    assert np.allclose(found[0], np.take_along_axis(asked @ made.rows.T, found[1], 1), atol=1e-6)


def test_what_came_later_is_found_and_what_was_removed_is_not(kept):
    built = kept.build_graph()
    kept.append(*batch(200, 30))
    asked = unit(20, 5)
    assert kept.known_graph() == (built, 200)
    assert same(kept.search_graph(asked, 5), kept.search(asked, 5))
    kept.remove([*kept.search(asked, 1)[1].ravel(), 210])
    assert same(kept.search_graph(asked, 5), kept.search(asked, 5))
    newer = kept.build_graph()
    assert newer != built and not built.exists() and kept.known_graph() == (newer, 230)
    assert same(kept.search_graph(asked, 5), kept.search(asked, 5))


def test_where_nearly_all_are_removed_the_rest_is_found(kept, monkeypatch):
    monkeypatch.setattr(store, "EXPANSION", 20)
    kept.build_graph()
    kept.remove(range(190))
    asked = unit(3, 5)
    assert same(kept.search_graph(asked, 8), kept.search(asked, 8))


def test_a_graph_of_other_rows_is_not_taken(kept, tmp_path, home):
    "Not that of another index, nor one that lies in the index's folder, nor that of another user"
    built = kept.build_graph()
    other = create_store(tmp_path/"other", WIDTH)
    other.append(*batch(7, 200))
    shutil.copy(built, other.path/built.name)
    with pytest.raises(ValueError, match="has no graph that was built here: build_graph.. makes one"):
        other.search_graph(unit(1), 3)
    shutil.copytree(kept.path, tmp_path/"copy")
    assert Store(tmp_path/"copy").known_graph() == (built, 200)
    shutil.move(home, tmp_path/"elsewhere")
    assert Store(kept.path).known_graph() == (None, 0)


def test_a_damaged_graph_is_one_error(kept):
    file = kept.build_graph()
    whole = file.read_bytes()
    for data in (b"", b"no graph", whole[:100], whole[:-100]):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="is damaged: .*: remove it"): Store(kept.path).search_graph(unit(1), 3)
    few = create_store(kept.path.parent/"few", WIDTH)
    few.append(*batch(0, 5))
    shutil.copy(few.build_graph(), file)
    with pytest.raises(ValueError, match="has 5 rows of 8 numbers, expected 200 of 8"): Store(kept.path).graph()


def test_a_changed_byte_of_a_graph_is_found(kept):
    "Its code does not check what it maps: 120 changed files, of which some made it crash before there was a digest"
    file = kept.build_graph()
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for start in (0, 64):  # the first bytes are counts and sizes
        for place in rng.integers(start, 64 if start == 0 else len(whole), 60):
            data = bytearray(whole)
            data[place] ^= rng.integers(1, 256)
            file.write_bytes(data)
            with pytest.raises(ValueError, match="is damaged: its digest does not match"): Store(kept.path).graph()
            with pytest.raises(ValueError, match="is damaged"): Store(kept.path).search_graph(unit(1), 3)


def test_a_build_that_fails_leaves_the_old_graph(kept, monkeypatch):
    built = kept.build_graph()
    kept.append(*batch(200, 30))
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(store.os, "replace", full)
    with pytest.raises(OSError, match="No space"): kept.build_graph()
    assert list(built.parent.iterdir()) == [built] and kept.known_graph() == (built, 200)


def test_a_missing_package_is_named(kept, monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    missing = r"usearch is not installed: pip install 'learnable-parameter-similarity\[approximate\]'"
    with pytest.raises(ImportError, match=missing):
        kept.build_graph()
    assert len(kept.search(unit(1), 3)[1][0]) == 3


def test_rows_in_memory_have_no_graph():
    for call in (Rows(WIDTH).build_graph, lambda: Rows(WIDTH).search(unit(1), 3, approximate=True)):
        with pytest.raises(ValueError, match="is searched exactly: save it to a folder"): call()


@pytest.fixture
def market(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        torch.manual_seed(i)
        state = ResNet(depth=8, width=4).state_dict()
        save_tensors(tmp_path/f"models/m{i}.safetensors", state, dict(task=i//3, run=i % 3))
    return ModelIndex.build(tmp_path/"models", tmp_path/"market", "stem-signature")


def test_commands(market, capsys, monkeypatch):
    ask = ["query", "market", "models/m1.safetensors", "--no-expected"]
    assert main([*ask, "--approximate"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "lps index graph on the command line" in error
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    assert main(["index", "graph", "market"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install 'learnable-parameter-similarity[approximate]'" in error


def test_answers_are_the_same_and_say_how_they_were_found(market, capsys, tmp_path):
    assert main(["index", "graph", "market"]) == 0
    assert "a graph of 6 models" in capsys.readouterr().err
    exact, graph = market.answer("models/m1.safetensors"), market.answer("models/m1.safetensors", approximate=True)
    assert exact.table.equals(graph.table) and exact.reads != graph.reads and "graph" in graph.reads
    in_memory = ModelIndex.build(tmp_path/"models", method="stem-signature")
    with pytest.raises(ValueError, match="is searched exactly: save it to a folder"):
        in_memory.query("models/m1.safetensors", approximate=True)
    save_pretrained(market, tmp_path/"shared")
    assert not list((tmp_path/"shared").rglob("*.usearch")) and not list((tmp_path/"market").rglob("*.usearch"))
