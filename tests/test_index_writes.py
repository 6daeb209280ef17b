"""Nothing in an index is lost, doubled or overwritten: files of users, several writers, changed files, odd metadata"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_market import STEM, fill, network

from lps.core.files import save_tensors
from lps.index.index import ModelIndex


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    fill(folder, tasks=3, runs=3)
    return folder


@pytest.fixture(scope="module")
def built(models, tmp_path_factory):
    "An index, not to be changed"
    path = tmp_path_factory.mktemp("built")/"index"
    ModelIndex.build(models, path, STEM)
    return path


@pytest.fixture
def market(built, tmp_path): return shutil.copytree(built, tmp_path/"market")


def names(path): return sorted(Path(file).name for file in ModelIndex.load(path).manifest.file)


def content(folder): return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["facts.jsonl", "rows.f32", "rejected.json", "method.safetensors", "notes.txt"])
def test_files_of_a_user_are_not_overwritten(models, tmp_path, name):
    "Whatever they are called"
    (tmp_path/name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"holds {name}: choose an empty folder"):
        ModelIndex.build(models, tmp_path, STEM)
    assert content(tmp_path) == {name: b"mine"}


def test_an_index_that_lost_its_header_is_not_built_over(models, market):
    (market/"header.json").unlink()
    before = content(market)
    with pytest.raises(FileExistsError, match="choose an empty folder"): ModelIndex.build(models, market, STEM)
    assert content(market) == before


def test_a_build_that_was_stopped_before_its_header_goes_on(models, built, tmp_path):
    "Of a new index, the method is written first; its name is its own digest"
    method, = built.glob("method-*.safetensors")
    shutil.copy(method, tmp_path/method.name)
    (tmp_path/f".{method.name}.1234.tmp").write_bytes(b"unfinished")
    assert len(ModelIndex.build(models, tmp_path, STEM)) == 9
    (tmp_path/"other").mkdir()
    (tmp_path/"other"/method.name).write_bytes(b"not what its name claims")
    with pytest.raises(FileExistsError, match="choose an empty folder"):
        ModelIndex.build(models, tmp_path/"other", STEM)


def test_two_that_add_the_same_add_it_once(models, market, tmp_path):
    "Both were opened before either wrote"
    save_tensors(tmp_path/"more/new.safetensors", network(1, 7), dict(task=1))
    a, b = ModelIndex.load(market), ModelIndex.load(market)
    a.add(tmp_path/"more")
    b.add(tmp_path/"more")
    assert names(market).count("new.safetensors") == 1 and len(ModelIndex.load(market)) == 10
    ModelIndex.load(market).check()


ADD = "import sys; from lps.index.index import ModelIndex; ModelIndex.load(sys.argv[1]).add(sys.argv[2])"


@pytest.mark.slow
def test_two_processes_that_add_at_once(models, market, tmp_path):
    for i in range(6): save_tensors(tmp_path/f"more/m{i}.safetensors", network(1, 20 + i), dict(task=1))
    command = [sys.executable, "-c", ADD, str(market), str(tmp_path/"more")]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    for process in [subprocess.Popen(command, env=env) for _ in range(2)]: assert process.wait() == 0
    assert len(names(market)) == 15 == len(set(names(market)))
    ModelIndex.load(market).check()


def test_what_another_added_is_not_removed(models, market, tmp_path):
    "An index that was opened before removes what it is told to, and nothing else"
    stale = ModelIndex.load(market)
    save_tensors(tmp_path/"more/new.safetensors", network(1, 7), dict(task=1))
    ModelIndex.load(market).add(tmp_path/"more")
    assert stale.remove(models/"t0_0.safetensors") == 1
    left = names(market)
    assert "new.safetensors" in left and "t0_0.safetensors" not in left and len(left) == 9


def test_two_new_indexes_in_one_folder_do_not_mix(models, tmp_path):
    "The one that comes second is refused, and the first is whole"
    first = ModelIndex.build(models, tmp_path/"market", STEM)
    with pytest.raises(FileExistsError, match="holds an index already"): first.save(tmp_path/"market")
    with pytest.raises(ValueError, match="compares by stem-signature, not by probes"):
        ModelIndex.build(models, tmp_path/"market", "probes")
    ModelIndex.load(tmp_path/"market").check()


def test_a_changed_file_is_replaced_in_one_step(models, built, tmp_path):
    "There is no state in which both rows count, or neither"
    folder = shutil.copytree(models, tmp_path/"models")
    ModelIndex.build(folder, tmp_path/"market", STEM)
    seen = []
    save_tensors(folder/"t0_0.safetensors", network(0, 9), dict(task=0))
    index = ModelIndex.load(tmp_path/"market")
    commit = type(index.rows)._commit

    def watched(self, *args, **changes):
        commit(self, *args, **changes)
        seen.append(names(tmp_path/"market"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(index.rows), "_commit", watched)
        index.add(folder)
    assert len(seen) == 1 and seen[0].count("t0_0.safetensors") == 1 and len(seen[0]) == 9


def test_a_row_that_is_there_twice_is_found(market):
    index = ModelIndex.load(market)
    fact, = index.rows.facts([0])
    index.rows.append(index.rows.rows[:1], index.rows.digests([0]), [0], [fact])
    with pytest.raises(ValueError, match="is in the index twice: remove it and add it again"):
        ModelIndex.load(market).check()


def test_long_metadata_do_not_spoil_an_index(models, market, tmp_path):
    "What is written can be read again; a text of more than a megabyte is a reason to reject a model"
    save_tensors(tmp_path/"more/long.safetensors", network(1, 7), dict(task=1, data="x"*1_100_000))
    index = ModelIndex.load(market)
    assert index.add(tmp_path/"more") == 0
    assert "the limit is 1000000" in index.rejected.reason[0]
    assert len(ModelIndex.load(market).manifest) == 9


def test_a_damaged_row_is_named_and_the_others_are_found(market, models):
    facts = market/"facts.jsonl"
    facts.write_bytes(b"{" + b"\x00"*20 + facts.read_bytes()[21:])
    index = ModelIndex.load(market)
    found = index.query(models/"t1_0.safetensors", 9, with_self=True)
    assert len(found) == 9 and found.file.str.contains("damaged facts").sum() == 1
    with pytest.raises(ValueError, match="is damaged in segment 0"): index.check()


def test_a_path_removes_only_what_it_names(tmp_path, monkeypatch):
    "Not the models of the same name in another folder"
    for i, name in enumerate("ab"):
        for run in range(2): save_tensors(tmp_path/name/f"m{run}.safetensors", network(i, run), dict(task=i))
    index = ModelIndex.build([tmp_path/"a", tmp_path/"b"], tmp_path/"market", STEM)
    monkeypatch.chdir(tmp_path/"b")
    index.add("m0.safetensors")
    assert index.remove("m0.safetensors") == 1
    assert sorted(file.removeprefix(f"{tmp_path}/") for file in index.manifest.file) == [
        "a/m0.safetensors", "a/m1.safetensors", "b/m1.safetensors"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no model m0.safetensors in the index"): index.remove("m0.safetensors")


def test_a_name_of_several_is_refused(tmp_path, monkeypatch):
    for i, name in enumerate("ab"):
        for run in range(2): save_tensors(tmp_path/name/f"m{run}.safetensors", network(i, run), dict(task=i))
    index = ModelIndex.build([tmp_path/"a", tmp_path/"b"], tmp_path/"market", STEM)
    for name in "ab":
        (tmp_path/name/"x.safetensors").write_bytes((tmp_path/name/"m0.safetensors").read_bytes())
        monkeypatch.chdir(tmp_path/name)
        index.add("x.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="2 models are called x.safetensors: give the path of one"):
        index.remove("x.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8")
def test_a_name_that_is_not_utf_8_is_added_once_and_can_be_removed(models, market, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path/"more")+b"/\xff.safetensors")
    (tmp_path/"more").mkdir()
    save_tensors(tmp_path/"more/x.safetensors", network(1, 7), dict(task=1))
    os.rename(tmp_path/"more/x.safetensors", path)
    index = ModelIndex.load(market)
    assert index.add(tmp_path/"more") == 1 and ModelIndex.load(market).add(tmp_path/"more") == 0
    assert ModelIndex.load(market).remove(path) == 1
    broken = os.fsdecode(os.fsencode(tmp_path/"more")+b"/\xfe.safetensors")
    Path(broken).write_bytes(b"broken")
    index.add(tmp_path/"more")
    assert len(index.rejected) == 1 and "\\xfe" in index.rejected.file[0] or "udcfe" in index.rejected.file[0]


@pytest.mark.parametrize("meta", [
    dict(task=1e400), dict(lacks=5), dict(lacks=["fc"], digest="zz"), dict(classes="ab", task=1), dict(task=2**80),
])
def test_one_odd_model_does_not_stop_a_build(models, tmp_path, meta):
    folder = shutil.copytree(models, tmp_path/"models")
    save_tensors(folder/"odd.safetensors", network(1, 7), meta)
    index = ModelIndex.build(folder, tmp_path/"market", STEM)
    assert len(index) in (9, 10) and len(index) + len(index.rejected) == 10
    json.dumps(index.answer(models/"t1_0.safetensors").to_dict())
