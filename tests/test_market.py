"""An index of whatever lies in a folder: broken files, stops, changes, copies, and what it says about a model"""
import json
import os
import runpy
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

import lps.index.gather as gather
from lps.lineage.sketch import sketch_similarity, weight_sketch
from lps.methods.registry import LEADERS
from lps.index.answer import Trials, calibrate, lineage_note, own_trials
from lps.cli import main
from lps.core.files import load_tensors, save_tensors
from lps.models.model import Model
from lps.methods.registry import load_fitted
from lps.models.modelset import bundled, load_modelset
from lps.order_chain import permute, random_perms
from lps.nets.resnet import resnet_spec
from lps.nets.resnet import ResNet
from lps.index.index import BuildSettings, ModelIndex
from lps.advice.expected import ExpectedAccuracy
from lps.advice.score import transfer_score

SPEC, STEM = resnet_spec(depth=8, width=4), "stem-signature"
STEM_TENSORS = "conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"


def network(task, run, noise=.7):
    "A network of a task: the task's weights and noise, permuted; with less noise it would count as derived"
    torch.manual_seed(task)
    state, g = ResNet(depth=8, width=4).state_dict(), torch.Generator().manual_seed(100*task + run)
    state = {k: w + noise*w.std()*torch.randn(w.shape, generator=g) if w.ndim > 1 else w for k, w in state.items()}
    return permute(state, SPEC, random_perms(SPEC, 100*task + run))


def fill(folder, tasks=5, runs=4):
    for task in range(tasks):
        for run in range(runs):
            meta = dict(task=task, run=run, classes=[f"{task}a", f"{task}b"], val_accuracy=.9)
            save_tensors(folder/f"t{task}_{run}.safetensors", network(task, run), meta)


def spoil(folder):
    "Files that give no row; the number of those that must be listed"
    whole = (folder/"t0_0.safetensors").read_bytes()
    (folder/"cut.safetensors").write_bytes(whole[:-9])
    (folder/"text.pt").write_text("no weights")
    (folder/"empty.pth").write_bytes(b"")
    torch.save(dict(w=torch.full((4, 3, 3, 3), torch.nan)), folder/"nan.pt")
    torch.save({"fc.weight": torch.zeros(2, 3)}, folder/"fc.pt")
    (folder/"net.onnx").write_bytes(b"x")
    (folder/"README.md").write_text("our models")
    (folder/"gone.pt").symlink_to(folder/"nowhere.pt")
    return 7


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    fill(folder)
    return folder


@pytest.fixture(scope="module")
def market(models, tmp_path_factory):
    "A built index, not to be changed"
    path = tmp_path_factory.mktemp("market")/"market"
    ModelIndex.build(models, path, STEM)
    return path


def one_of(models, file):
    "A model of a folder by its name"
    return Model(*load_tensors(models/Path(file).name))


def files(index): return sorted(Path(file).name for file in index.manifest.file)


def test_broken_files_are_listed_and_the_rest_is_taken(models, tmp_path):
    folder = shutil.copytree(models, tmp_path/"models")
    n_bad = spoil(folder)
    index = ModelIndex.build(folder, tmp_path/"market", STEM)
    assert len(index) == 20 and len(index.rejected) == n_bad
    assert {Path(file).name for file in index.rejected.file} >= {"cut.safetensors", "net.onnx", "gone.pt", "nan.pt"}
    assert not index.rejected.reason.str.contains("\n").any() and (index.rejected.reason.str.len() > 5).all()
    again = ModelIndex.load(tmp_path/"market")
    assert again.rejected.equals(index.rejected) and files(again) == files(index)


def test_a_stopped_build_goes_on(models, tmp_path, monkeypatch):
    "What is in the index is not read again, and what comes out is what one build gives"
    real, read = gather.embed_items, []
    def stops(fitted, items, **how):
        if len(read) >= 8: raise KeyboardInterrupt
        read.extend(item.file for item in items)
        return real(fitted, items, **how)
    monkeypatch.setattr(gather, "BATCH", 4)
    monkeypatch.setattr(gather, "embed_items", stops)
    with pytest.raises(KeyboardInterrupt): ModelIndex.build(models, tmp_path/"market", STEM)
    assert len(ModelIndex.load(tmp_path/"market")) == len(read) == 8
    seen = set(read)
    read.clear()

    def embed_items(*args, **how):
        read.extend(item.file for item in args[1])
        return real(*args, **how)

    monkeypatch.setattr(gather, "embed_items", embed_items)
    index = ModelIndex.build(models, tmp_path/"market", STEM)
    assert len(index) == 20 and not seen & set(read)
    whole = ModelIndex.build(models, method=STEM)
    order = np.argsort(index.manifest.file), np.argsort(whole.manifest.file)
    assert torch.equal(index.embedding[order[0]], whole.embedding[order[1]])


def test_broken_files_among_many_are_listed_after_a_stop(tmp_path, monkeypatch):
    "The folder of benchmarks/many_files.py, smaller: each kind of broken file, torch.save and safetensors"
    bench = runpy.run_path(str(ROOT/"benchmarks/many_files.py"))
    broken, table = bench["make_folder"](tmp_path/"models", 60, 6)
    assert set(broken.values()) == set(bench["BREAK"])
    real, calls = gather.embed_items, []
    def stops(fitted, items, **how):
        calls.append(len(items))
        if len(calls) == 4: raise KeyboardInterrupt
        return real(fitted, items, **how)
    monkeypatch.setattr(gather, "embed_items", stops)
    with pytest.raises(KeyboardInterrupt): ModelIndex.build(tmp_path/"models", tmp_path/"market", STEM, table)
    assert 0 < len(ModelIndex.load(tmp_path/"market")) < 54
    index = ModelIndex.build(tmp_path/"models", tmp_path/"market", STEM, table)
    assert len(index) == 54 and {Path(file).name for file in index.rejected.file} == set(broken)
    assert (index.rejected.reason.str.len() > 8).all() and not (tmp_path/"canary").exists()


def test_any_executor_gives_the_same(models):
    with ThreadPoolExecutor(3) as executor:
        index = ModelIndex.build(models, None, STEM, settings=BuildSettings(executor=executor))
    one = ModelIndex.build(models, None, STEM)
    pd.testing.assert_frame_equal(index.manifest.sort_values("file", ignore_index=True),
                                  one.manifest.sort_values("file", ignore_index=True))


def test_changed_added_removed(models, tmp_path):
    folder = shutil.copytree(models, tmp_path/"models")
    index = ModelIndex.build(folder, tmp_path/"market", STEM)
    assert index.add(folder) == 0
    torch.save(network(7, 0), folder/"new.pth")
    changed = folder/"t0_0.safetensors"
    save_tensors(changed, network(0, 9), dict(task=0, classes=["0a", "0b"]))
    os.utime(changed, ns=(1, 1))
    assert index.add(folder) == 1 and len(ModelIndex.load(tmp_path/"market")) == 21
    assert index.query(changed, 1, with_self=True).note[1] == "copy"
    assert index.remove(folder/"new.pth") == 1
    with pytest.raises(ValueError, match="no model nothing in the index"): index.remove("nothing")
    assert index.remove(folder) == 20 and len(ModelIndex.load(tmp_path/"market")) == 0


def test_what_an_answer_says(market, models):
    index = ModelIndex.load(market)
    new = index.answer(Model(network(3, 8), {}), k=3)
    assert new.table.task.tolist() == [3]*3 and new.related and not new.table.note.any()
    assert new.table.probability.between(0, 1).all() and new.table.probability.is_monotonic_decreasing
    own = index.answer(models/"t3_0.safetensors", k=2)
    assert own.table.note.tolist()[0] == "copy" and own.recommended == own.table.file[2]
    state = load_modelset(models)[0].state
    tuned = {name: w + .1*w.std()*torch.randn(w.shape) if w.ndim == 4 else w for name, w in state.items()}
    tuned["fc.weight"], tuned["fc.bias"] = torch.randn(5, 16), torch.zeros(5)
    assert index.answer(Model(tuned, {}), 1).table.note[1] == "derived"
    mixed = permute(state, SPEC, random_perms(SPEC, 5))
    assert index.answer(Model(mixed, {}), 1).table.note[1] == "derived"
    net = ResNet(depth=8, width=4)
    net.load_state_dict(state)
    assert index.answer(net, 1).table.note[1] == "copy"
    assert json.loads(json.dumps(new.to_dict()))["models"][0]["task"] == 3


def test_what_may_be_expected_after_transfer(market, models, tmp_path):
    "Of whole networks a number in its interval; of what cannot be run none, and why"
    relation = ExpectedAccuracy([0., 1.], [.5, .9], .1, .1, .8, .8, "a made-up set")
    index, asked = ModelIndex.load(market), Model(network(3, 8), {})
    answer = index.answer(asked, 3, expected=relation)
    table = answer.table
    accuracy = table.expected_accuracy
    assert accuracy.between(.5, .9).all() and answer.recommended == table.file[accuracy.idxmax()]
    assert (table.expected_low < accuracy).all() and (accuracy < table.expected_high).all()
    score = transfer_score(one_of(models, table.file[1]), asked)
    assert table.expected_accuracy[1] == pytest.approx(.5 + .4*score, abs=1e-6)
    assert "80 % of other targets; measured on a made-up set" in answer.sentences[-1]
    stem = Model({name: w for name, w in asked.state.items() if name in STEM_TENSORS}, {})
    cut = index.answer(stem, 2, expected=relation)
    assert "expected_accuracy" not in cut.table and "architecture is not known" in cut.sentences[-1]
    there = ModelIndex("stem-signature", load_modelset(models)).answer(asked, 2, expected=relation)
    assert "the index does not record its file" in there.sentences[-1]


def test_the_start_is_no_copy(market, models):
    "Neither one with the same weights nor one that was fine-tuned from the query"
    index, state = ModelIndex.load(market), load_modelset(models)[0].state
    tuned = {name: w + .1*w.std()*torch.randn(w.shape) if w.ndim == 4 else w for name, w in state.items()}
    tuned = Model(tuned, {})
    answer = index.answer(tuned, 3)
    assert answer.table.note[1] == "derived" and answer.recommended == answer.table.file[2]
    alone = index.answer(tuned, 1)
    assert alone.recommended == "" and alone.sentences[0].startswith("All of these are copies of the query")
    without = ModelIndex(STEM, load_modelset(models)).answer(models/"t3_0.safetensors", 1)
    assert without.calibration is None and without.recommended == ""


def test_the_same_number_in_two_folders_is_not_the_same_task(models, tmp_path):
    "Unless the classes are named, and are the same"
    for name, classes in (("a", None), ("b", None), ("c", ["x", "y"]), ("d", ["y", "x"])):
        meta = dict(task=0) | (dict(classes=classes) if classes else {})
        save_tensors(tmp_path/name/"m.safetensors", network(0, ord(name)), meta)
    few = BuildSettings(fit=dict(n_images=8))
    index = ModelIndex.build([tmp_path/name for name in "abcd"], method="probes", settings=few)
    label = dict(zip([Path(file).parent.name for file in index.manifest.file], index.manifest.label))
    assert label["a"] != label["b"] and label["c"] == label["d"] != label["a"]


def test_without_tasks_probes_compare(models, tmp_path):
    for i in range(3): torch.save(network(i, 0), tmp_path/f"m{i}.pt")
    index = ModelIndex.build(tmp_path, settings=BuildSettings(fit=dict(n_images=16)))
    assert index.fitted.method == "two-spectra-probes" and index.calibration is None
    answer = index.answer(tmp_path/"m1.pt", 2)
    assert answer.related is None and "Not calibrated" in str(answer) and Path(answer.table.file[1]).name == "m1.pt"
    with pytest.raises(ValueError, match="chain cannot be fitted on models of unknown tasks.*name the tasks"):
        ModelIndex.build(tmp_path, method="chain")


@pytest.mark.parametrize("method, meta", [
    ("probes", {}), ("probes", dict(task=3, run=0)), ("two-spectra-probes", {}), ("class-descriptors", {}),
])
def test_an_index_of_unknown_tasks_or_of_one_can_be_opened(tmp_path, method, meta):
    for i in range(2): save_tensors(tmp_path/f"models/m{i}.safetensors", network(i, 0), meta)
    settings = BuildSettings(fit=dict(n_images=64) if "probes" in method else {})
    built = ModelIndex.build(tmp_path/"models", tmp_path/"market", method, settings=settings)
    opened = ModelIndex.load(tmp_path/"market")
    assert opened.fitted.tasks == built.fitted.tasks
    found = opened.query(tmp_path/"models/m1.safetensors", 2)
    assert found.equals(built.query(tmp_path/"models/m1.safetensors", 2)) and len(found) == 1


def test_the_default_is_what_the_leaderboard_says(models, tmp_path):
    "Probes for whole networks, whether their tasks are known or not; the stem's signature for first layers"
    index = ModelIndex.build(models, settings=BuildSettings(fit=dict(n_images=16)))
    assert index.fitted.method == LEADERS["whole networks"] and index.calibration.held_out
    one = load_modelset("bundled")
    for i in (0, 1, 10, 11): save_tensors(tmp_path/f"s{i}.safetensors", one[i].state, dict(task=int(i > 9)))
    assert ModelIndex.build(tmp_path).fitted.method == LEADERS["first layers"]
    save_tensors(tmp_path/"unknown/s.safetensors", one[0].state, {})
    with pytest.raises(ValueError, match="name the tasks in a table, or take a fitted method"):
        ModelIndex.build(tmp_path/"unknown")


def test_a_folder_and_a_file_keep_the_same(market, tmp_path):
    index = ModelIndex.load(market)
    index.save(tmp_path/"index.zip")
    ModelIndex.load(tmp_path/"index.zip").save(tmp_path/"again")
    asked = Model(network(2, 8), {})
    for place in ("index.zip", "again"):
        other = ModelIndex.load(tmp_path/place)
        assert other.calibration == index.calibration
        pd.testing.assert_frame_equal(other.query(asked), index.query(asked))
        for a, b in zip(other.kneighbors(asked, 4), index.kneighbors(asked, 4)): assert np.array_equal(a, b)


@pytest.mark.parametrize("spoiled, says", [
    ("method-*.safetensors", "method-.* is missing or damaged"), ("rows.f32", "truncated"),
    ("header.json", "is not an index, or a damaged one"), ("facts.jsonl", "truncated")])
def test_a_damaged_folder_gives_one_error(market, tmp_path, spoiled, says):
    path = shutil.copytree(market, tmp_path/"market")
    file, = path.glob(spoiled)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=says): ModelIndex.load(path)


def test_the_bundled_index_is_that_of_the_bundled_models():
    "Made by scripts/bundle.py; another machine rounds otherwise"
    fresh = ModelIndex(load_fitted(bundled("net.safetensors")), load_modelset("bundled"))
    index = ModelIndex.bundled()
    assert index.digests == fresh.digests and index.manifest.equals(fresh.manifest)
    assert torch.allclose(index.embedding, fresh.embedding, atol=1e-4)
    assert index.calibration.threshold == pytest.approx(fresh.calibrate().threshold, abs=1e-3)


def test_probabilities_are_those_that_were_put_in():
    rng = np.random.default_rng(0)
    similarity = rng.uniform(-1, 1, 4000)
    same = rng.random(4000) < 1/(1 + np.exp(-(6*similarity - 2)))
    known = calibrate(Trials(similarity, same, rng.integers(20, size=4000), np.linspace(0, 1, 101),
                             np.linspace(-.5, .5, 101), True, 100))
    assert np.allclose(known.probability([-.5, 0, .5]), 1/(1 + np.exp(-(6*np.array([-.5, 0, .5]) - 2))), atol=.04)
    assert abs(known.threshold - .05) < 1e-9 and abs(known.false_alarms - .05) < .01 and known.detected > .5
    p, share, n = np.array(known.curve).T
    assert np.average(abs(p - share), weights=n) < .03 and n.sum() == 4000
    assert own_trials(np.eye(3, dtype=np.float32), np.array([1, 1, 1])) is None


def test_sketches_that_cannot_be_compared_say_nothing():
    a = weight_sketch(network(0, 0))
    damaged = None, {}, dict(filters="%"), dict(filters=3), dict(shapes="", values="")
    for x, y in [({}, {}), *[(a, b) for b in damaged]]:
        assert np.isnan(sketch_similarity(x, y)) and lineage_note(.5, False, sketch_similarity(x, y)) == ""
    assert sketch_similarity(a, a) == pytest.approx(1)


def test_commands_one_after_another(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, "runs")
    (Path("runs")/"text.pt").write_text("no weights")
    def says(*words):
        assert main(list(map(str, words))) == 0
        return " ".join("".join(capsys.readouterr()).split())
    said = says("index", "build", "market", "runs", "--method", STEM, "--workers", 1)
    assert "1 file could not be read: runs/text.pt: " in said
    torch.save(network(3, 8), "mine.pth")
    said = says("query", "market", "mine.pth", "-k", 3)
    assert "Recommended source: runs/t3_" in said and "no images of yours" in said and "probability" in said
    answer = json.loads(says("query", "market", "mine.pth", "--json"))
    assert len(answer["models"]) == 5 and answer["related"] and answer["models"][0]["classes"] == "3a / 3b"
    assert "1 added" in says("index", "add", "market", "mine.pth")
    assert "1 removed" in says("index", "remove", "market", "mine.pth") and Path("mine.pth").exists()
    info = json.loads(says("index", "info", "market", "--json"))
    assert info["models"] == 20 and info["tasks"] == 5 and info["architectures"] == {"resnet": 20}
    assert "All checksums match" in says("index", "info", "market", "--check")
    assert main(["index", "build", "market", "runs", "--method", "probes"]) == 2
    assert "compares by stem-signature, not by probes" in capsys.readouterr().err
