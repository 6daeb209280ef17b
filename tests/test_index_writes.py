"""Nothing in an index is lost, doubled or overwritten: files of users, several writers, changed files, odd metadata"""
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT
from test_market import STEM, fill, network

import lps.index.store as store
from lps.cli import main
from lps.core.files import save_tensors
from lps.index.index import BuildSettings, ModelIndex
from lps.methods.registry import fit_method, save_fitted
from lps.models.modelset import load_modelset
from lps.models.read import Reading


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


class Stopped(BaseException): "Stands for a kill"


def test_a_build_that_is_stopped_at_any_file_of_a_new_index_goes_on(models, tmp_path, monkeypatch):
    "What it left is known by the digests in its plan, and replaced"
    write = store.write_atomic
    for n in itertools.count():
        written = []

        def counted(path, data):
            write(path, data)
            if len(written) == n: raise Stopped(path)
            written.append(path)

        folder = tmp_path/str(n)
        with monkeypatch.context() as patch:
            patch.setattr(store, "write_atomic", counted)
            try: ModelIndex.build(models, folder, STEM)
            except Stopped: pass
        stopped_before_header = not (folder/"header.json").exists()
        assert len(ModelIndex.build(models, folder, STEM)) == 9
        if not stopped_before_header: break
    assert n == 8
    ModelIndex.load(folder).check()


def test_what_only_looks_like_a_left_over_is_not_replaced(models, tmp_path):
    for name, data in (("rows.f32", b""), (".lps-index.plan", b"mine"), (".lps-index.lock", b"x"), (".a.tmp", b"")):
        (tmp_path/name).write_bytes(data)
        with pytest.raises(FileExistsError, match=f"holds {name}"): ModelIndex.build(models, tmp_path, STEM)
        (tmp_path/name).unlink()


def test_a_packed_index_replaces_only_a_packed_index(built, tmp_path):
    index = ModelIndex.load(built)
    index.save(tmp_path/"market.zip")
    index.save(tmp_path/"market.zip")
    shutil.make_archive(tmp_path/"mine", "zip", built)
    before = (tmp_path/"mine.zip").read_bytes()
    with pytest.raises(FileExistsError, match="exists and is not a packed index"): index.save(tmp_path/"mine.zip")
    assert (tmp_path/"mine.zip").read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="links")
def test_a_link_in_an_index_is_not_written_through(models, market, tmp_path):
    "An index may come from a stranger"
    shutil.copy(market/"rows.f32", tmp_path/"mine")
    (market/"rows.f32").unlink()
    (market/"rows.f32").symlink_to(tmp_path/"mine")
    before = (tmp_path/"mine").read_bytes()
    save_tensors(tmp_path/"more/new.safetensors", network(1, 7), dict(task=1))
    with pytest.raises(OSError): ModelIndex.load(market).add(tmp_path/"more")
    assert (tmp_path/"mine").read_bytes() == before and len(ModelIndex.load(market)) == 9


@pytest.mark.parametrize("words", [["add", "more"], ["remove", "models/t0_0.safetensors"]])
def test_a_packed_index_is_locked_from_reading_to_writing(models, built, tmp_path, monkeypatch, words):
    "So that no other command changes it in between"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, "models")
    save_tensors(tmp_path/"more/new.safetensors", network(1, 7), dict(task=1))
    ModelIndex.build("models", "folder", STEM)
    ModelIndex.load("folder").save("market.zip")
    load, seen = ModelIndex.load, []

    def watched(path):
        with pytest.raises(TimeoutError): store.packed_lock("market.zip").acquire(timeout=0)
        seen.append(path)
        return load(path)

    monkeypatch.setattr(ModelIndex, "load", watched)
    assert main(["index", words[0], "market.zip", words[1]]) == 0
    assert len(seen) == 1 and len(load("market.zip")) == (10 if words[0] == "add" else 8)
    with store.packed_lock("market.zip").acquire(timeout=0): pass


def test_tables_follow_what_another_process_adds(models, market, tmp_path):
    "Also after an error, in which the rows were read again"
    index = ModelIndex.load(market)
    assert len(index.manifest) == len(index.embedding) == 9
    save_tensors(tmp_path/"more/new.safetensors", network(1, 7), dict(task=1))
    ModelIndex.load(market).add(tmp_path/"more")
    with pytest.raises(ValueError, match="no model nothing in the index"): index.remove("nothing")
    assert len(index.manifest) == len(index.embedding) == len(index) == 10
    assert index.tasks(models/"t1_0.safetensors", with_self=True).models.sum() == 10


def test_an_index_that_was_replaced_is_not_changed(models, market, tmp_path):
    stale = ModelIndex.load(market)
    shutil.rmtree(market)
    ModelIndex.build(models, market, "fc")
    save_tensors(tmp_path/"more/new.safetensors", network(1, 7), dict(task=1))
    for change in (lambda: stale.add(tmp_path/"more"), lambda: stale.remove(models)):
        with pytest.raises(ValueError, match="was replaced by another index"): change()
    assert len(ModelIndex.load(market)) == 9


def test_another_fit_of_the_same_method_is_refused(models, tmp_path):
    "Whether it is a file, or a name with other settings"
    few = load_modelset(models)
    few = few[few.manifest.run < 2]
    save_fitted(tmp_path/"a.safetensors", fit_method(few, "frobenius", 0, layers=["conv1"]))
    save_fitted(tmp_path/"b.safetensors", fit_method(few, "frobenius", 0, layers=["layer1.0.conv1"]))
    market = tmp_path/"market"
    ModelIndex.build(models, market, tmp_path/"a.safetensors")
    assert len(ModelIndex.build(models, market, tmp_path/"a.safetensors")) == 9
    assert len(ModelIndex.build(models, market)) == 9
    with pytest.raises(ValueError, match="another fit of frobenius"):
        ModelIndex.build(models, market, tmp_path/"b.safetensors")
    with pytest.raises(ValueError, match="fitted elsewhere, not seed 3"):
        ModelIndex.build(models, market, settings=BuildSettings(seed=3))
    with pytest.raises(ValueError, match="is fitted already: leave out layers"):
        ModelIndex.build(models, tmp_path/"new", tmp_path/"a.safetensors", settings=BuildSettings(fit=dict(layers=())))
    assert not (tmp_path/"new").exists()


def test_settings_of_an_existing_index_are_compared(models, tmp_path, monkeypatch, capsys):
    "The same command goes on; without the settings, too"
    monkeypatch.chdir(tmp_path)
    build = "index", "build", "market", str(models), "--method", "frobenius", "--workers", "1"
    same = "--seed", "3", "--layers", "conv1", "--epochs", "3"
    for words in (same, same, (), ("--seed", "3")): assert main([*build, *words]) == 0
    capsys.readouterr()
    refused = {("--seed", "4"): "built with seed 3, not seed 4", ("--epochs", "4"): "built with epochs 3, not epochs 4",
               ("--layers", "layer1.0.conv1"): "built with layers ['conv1'], not layers ['layer1.0.conv1']",
               ("--folded",): "built with the default folded, not folded True"}
    for words, why in refused.items():
        assert main([*build, *words]) == 2
        assert why in capsys.readouterr().err


def test_a_table_with_other_tasks_for_known_models_is_used(models, market):
    index = ModelIndex.load(market)
    table = pd.DataFrame(dict(file=["t0_0.safetensors", "t0_1.safetensors"], task=[0, 5]))
    assert index.add(models, table=table) == 0
    tasks = {Path(file).name: task for file, task in zip(index.manifest.file, index.manifest.task)}
    assert tasks["t0_0.safetensors"] == 0 and tasks["t0_1.safetensors"] == 5 and tasks["t1_0.safetensors"] == 1


def test_what_is_not_searched_is_named(models, tmp_path, monkeypatch):
    "Folders that cannot be listed, and links to folders"
    folder = shutil.copytree(models, tmp_path/"models")
    (folder/"locked").mkdir()
    (folder/"linked").symlink_to(models)
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("locked"): raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    index = ModelIndex.build(folder, tmp_path/"market", STEM)
    reasons = dict(zip(index.rejected.file, index.rejected.reason))
    assert len(index) == 9 and reasons == {
        str(folder/"locked"): "Permission denied",
        str(folder/"linked"): "is a link to a folder: give the folder it points to"}


def test_an_index_of_no_models(models, market, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    query = models/"t1_0.safetensors"
    ModelIndex.load(market).remove(models)
    ModelIndex.load(market).save("market.zip")
    for place in ("market", "market.zip"):
        index = ModelIndex.load(place)
        assert len(index.query(query)) == len(index.tasks(query)) == len(index.manifest.file) == 0
        assert index.kneighbors(query)[1].shape == (1, 0)
        assert "The index has no models." in index.answer(query, expected=True).sentences
        assert main(["query", place, str(query)]) == 0 and "nan" not in capsys.readouterr().out
        assert main(["index", "info", place, "--check", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["models"] == 0
        assert main(["index", "map", place, "--out", "map.html"]) == 2
        assert capsys.readouterr().err == "lps: the manifest has 0 models: give one or more\n"
    assert ModelIndex.load("market").add(models) == 9


PLACES = [
    "http://127.0.0.1:9/model.safetensors", "https://example.com/model.safetensors", "HTTP://127.0.0.1:9/x.pt",
    "org/name", "hf://org/name", "timm/resnet18.a1_in1k",
    "timm/resnet18.a1_in1k.pt", "timm/hf-hub:org/name", "//server/share/model.pt",
    "\\\\server\\share\\model.pt", "ftp://127.0.0.1/x.pt", "file:///etc/passwd", "model.pt", "x"*5000, "a\0b", "",
]


@pytest.mark.parametrize("place", PLACES)
def test_an_index_causes_no_request(models, market, monkeypatch, place):
    "A stranger chose what it names"
    index = ModelIndex.load(market)
    fact, = index.rows.facts([0])
    fact |= dict(file="theirs", key=[place, None, 1, 1])
    index.rows.append(index.rows.rows[:1], index.rows.digests([0]), [0], [fact])
    index.remove(models)
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network here")

    for name in ("connect", "connect_ex", "sendto"): monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    answer = index.answer(models/"t0_0.safetensors", expected=True)
    assert not asked and "cannot be estimated (theirs: " in answer.expected and len(answer.table) == 1
    if place == "timm/resnet18.a1_in1k": return  # timm would try many times
    answer = index.answer(models/"t0_0.safetensors", reading=Reading(hub=True), expected=True)
    on_hub = place in ("org/name", "hf://org/name")
    assert bool(asked) == on_hub and "cannot be estimated (theirs: " in answer.expected


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
    "What is written can be read again; a text of more than four megabytes is a reason to reject a model"
    save_tensors(tmp_path/"more/long.safetensors", network(1, 7), dict(task=1, data="x"*4_100_000))
    index = ModelIndex.load(market)
    assert index.add(tmp_path/"more") == 0
    assert "the limit is 4000000" in index.rejected.reason[0]
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


def unfit(kind):
    "Weights that can be read, but make no sense to a method"
    state = network(0, 9)
    if kind == "zero": state["conv1.weight"] = torch.zeros_like(state["conv1.weight"])
    for name, tensor in state.items():
        if kind == "huge" and tensor.is_floating_point(): state[name] = tensor*1e30
        if kind == "negative variance" and "running_var" in name: state[name] = -torch.ones_like(tensor)
    return dict(state) if kind != "no layers" else {"conv1.weight": torch.zeros(0, 3, 3, 3)}


FEW = BuildSettings(fit=dict(n_images=16))


@pytest.mark.parametrize("kind", ["zero", "huge", "negative variance", "no layers"])
@pytest.mark.parametrize("method", ["auto", STEM, "frobenius"])
def test_one_model_on_which_nothing_can_be_fitted_does_not_stop_a_build(tmp_path, kind, method):
    fill(tmp_path/"models", tasks=4, runs=3)
    save_tensors(tmp_path/"models/aaa.safetensors", unfit(kind), dict(task=0, run=9, classes=["0a", "0b"]))
    settings = FEW if method == "auto" else BuildSettings(fit=dict(epochs=2, milestones=()))
    index = ModelIndex.build(tmp_path/"models", None, method, settings=settings)
    assert len(index) >= 12 and len(index) + len(index.rejected) == 13
    for file in tmp_path.glob("models/t*"): assert file.name in {Path(name).name for name in index.manifest.file}


@pytest.mark.parametrize("kind", ["zero", "huge", "negative variance", "no layers"])
def test_nor_does_the_first_of_models_of_unknown_tasks(tmp_path, kind):
    for name, state in (("aaa", unfit(kind)), ("b", network(0, 0)), ("c", network(1, 0))):
        save_tensors(tmp_path/f"models/{name}.safetensors", state, {})
    index = ModelIndex.build(tmp_path/"models", None, settings=FEW)
    assert len(index) == 2 and index.rejected.file[0].endswith("aaa.safetensors")
    with pytest.raises(ValueError, match="cannot be fitted on models of unknown tasks"):
        ModelIndex.build(tmp_path/"models", None, STEM)
