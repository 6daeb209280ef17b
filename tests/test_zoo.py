"""Builds that are killed, interrupted, repeated, extended and mixed up, in real processes"""
import inspect, json, multiprocessing, os, shutil, signal, subprocess, sys, time, warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ROOT, heed_ctrl_c
from fastai.callback.core import Callback
from PIL import Image

import lps.zoo.many as many
import lps.zoo.train as train
import lps.zoo.build as zoo
from lps.core.files import load_tensors, read_json, read_marker, write_json
from lps.models.modelset import load_modelset, pack
from lps.zoo.tasks import ImageSet, load_images, pair_classes, task_images
from lps.zoo.train import Diverged, train_model
from lps.zoo.recipe import Recipe, best_precision, recipes
from lps.zoo.build import BuildPlan, build, plan_build

TINY = replace(recipes["digits"], name="tiny", epochs=4, milestones=(3,), depth=8, width=4, batch_size=256)
SCRIPT = """
import sys
from dataclasses import replace
from lps.zoo.recipe import recipes
from lps.zoo.build import build
tiny = replace(recipes['digits'], name='tiny', epochs=4, milestones=(3,), depth=8, width=4, batch_size=256)
if __name__ == '__main__': build(sys.argv[1], 'digits', tiny, n_models=int(sys.argv[2]), workers=2)
"""


def start(tmp_path, n_models):
    "A build in a process group of its own, as a shell would start it"
    (script := tmp_path/"script.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "zoo"), str(n_models)],
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def models(path): return sorted(path.glob("[!.]*.safetensors"))


def wait_for(condition, seconds, what):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"{what} did not happen in {seconds} s"
        time.sleep(.02)


def alive(group):
    "Processes of a group that still run (zombies do not)"
    stats = [p.read_text().rpartition(")")[2].split() for p in map(lambda d: d/"stat", proc_dirs()) if p.exists()]
    return [s for s in stats if int(s[2]) == group and s[0] != "Z"]


def proc_dirs():
    from pathlib import Path
    return [d for d in Path("/proc").iterdir() if d.name.isdigit()]


def fingerprint(files): return {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for left-over processes in /proc")


@needs_proc
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_stopped_build_resumes(tmp_path, sig):
    p, folder = start(tmp_path, n_models=60), tmp_path/"zoo"
    try:
        wait_for(lambda: len(models(folder)) >= 6, 120, "six models")
        p.send_signal(sig) if sig == signal.SIGKILL else os.killpg(p.pid, sig)
        p.wait(30)
        wait_for(lambda: not alive(p.pid), 20, "the end of all workers")
    finally:
        if p.poll() is None or alive(p.pid): os.killpg(p.pid, signal.SIGKILL)
    written = fingerprint(models(folder))
    done = {f: v for f, v in written.items() if read_marker(folder/f)}
    assert 5 <= len(done) < 300 and len(written) - len(done) <= 2 and p.returncode != 0
    (half := folder/".task04_run1.safetensors.00000001.tmp").write_bytes(b"half a model")
    n = max(int(f.split("run")[1].split(".")[0]) for f in written) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ms = build(folder, "digits", TINY, n_models=n, workers=1, progress=False)
    assert len(ms) == 5*n and not len(ms.rejected) and half.name not in set(ms.manifest.file)
    now = fingerprint(models(folder))
    assert {f: now[f] for f in done} == done, "a finished model was touched"
    assert all(now[f][1] == data for f, (_, data) in written.items()), "trained again to other bytes"
    straight = build(tmp_path/"straight", "digits", TINY, n_models=1, workers=1, progress=False)
    for f in straight.manifest.file: same_weights(load_tensors(folder/f)[0], load_tensors(straight.path/f)[0])


def test_interrupt_between_two_models_ends_the_workers(tmp_path, monkeypatch):
    "Wherever Ctrl-C strikes, and whoever keeps its traceback"
    def watched(results, *args):
        yield next(results)
        raise KeyboardInterrupt
    monkeypatch.setattr(zoo, "watched", watched)
    before = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt) as kept:
        build(tmp_path, "digits", TINY, n_models=60, workers=2, progress=False)
    wait_for(lambda: before >= set(multiprocessing.active_children()), 10, "the end of all workers")
    assert kept.traceback and 1 <= len(models(tmp_path)) < 300


def same_weights(a, b): assert list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())


def test_interrupt_leaves_finished_models(tmp_path, monkeypatch):
    train, n = zoo.train_model, 0
    def interrupted(*a, **kw):
        nonlocal n
        if (n := n + 1) == 4: raise KeyboardInterrupt
        return train(*a, **kw)
    monkeypatch.setattr(zoo, "train_model", interrupted)
    with pytest.raises(KeyboardInterrupt): build(tmp_path, "digits", TINY, n_models=2, workers=1, progress=False)
    assert len(load_modelset(tmp_path)) == 3


def test_diverged_models_are_set_aside_once(tmp_path, monkeypatch):
    train, calls = zoo.train_model, []
    def sometimes(xy, *a, **kw):
        calls.append(1)
        if len(calls) == 2: raise Diverged("the loss is nan in epoch 0, batch 3")
        return train(xy, *a, **kw)
    monkeypatch.setattr(zoo, "train_model", sometimes)
    ms = build(tmp_path, "digits", TINY, n_models=1, workers=1, progress=False)
    assert ms.tasks == [0, 2, 3, 4] and len(calls) == 5
    assert [f.name for f in (tmp_path/"set_aside").iterdir()] == ["task01_run0.json"]
    assert "batch 3" in (tmp_path/"set_aside"/"task01_run0.json").read_text()
    assert len(build(tmp_path, "digits", TINY, n_models=1, workers=1, progress=False)) == 4 and len(calls) == 5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_seed_one_model(precision):
    torch.manual_seed(5); state = torch.random.get_rng_state()
    train, test = load_images("digits"), load_images("digits", "test")
    pair, recipe = pair_classes(10)[2], replace(TINY, epochs=2, precision=precision, flip=True)
    fit = lambda seed: train_model(task_images(train, pair), task_images(test, pair), recipe, seed)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        (a, m), (b, _), (c, _) = fit(3), fit(3), fit(4)
    finally: torch.set_num_threads(threads)
    same_weights(a.state_dict(), b.state_dict())
    assert not torch.equal(a.conv1.weight, c.conv1.weight) and m["precision"] == precision
    assert torch.equal(state, torch.random.get_rng_state()), "training moved torch's global random state"


def test_order_of_building_does_not_matter(tmp_path):
    all_at_once = build(tmp_path/"a", "digits", TINY, n_models=2, workers=1, progress=False)
    build(tmp_path/"b", "digits", TINY, n_tasks=1, n_models=2, workers=1, progress=False)
    with ThreadPoolExecutor(2) as ex:
        grown = build(tmp_path / "b", "digits", TINY, n_models=2, executor=ex, progress=False)
    assert len(grown) == len(all_at_once) == 10
    for i in range(10): same_weights(grown[i].state, all_at_once[i].state)


@pytest.mark.parametrize("change, words", [
    (dict(seed=1), "seed 0, now 1"),
    (dict(recipe=replace(TINY, lr=.05)), "recipe lr 0.1, now 0.05"),
    (dict(images="colours"), "images name digits, now colours"),
])
def test_another_build_in_the_same_folder_is_refused(tmp_path, monkeypatch, change, words):
    build(tmp_path/"zoo", "digits", TINY, n_tasks=1, n_models=1, workers=1, progress=False)
    before = fingerprint(models(tmp_path/"zoo"))
    colours(tmp_path/"colours")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        build(**(dict(path="zoo", images="digits", recipe=TINY, workers=1, progress=False) | change))
    assert fingerprint(models(tmp_path/"zoo")) == before


def test_models_of_unknown_origin_are_not_added_to(tmp_path):
    (tmp_path/"task00_run0.safetensors").write_bytes(b"whatever")
    with pytest.raises(ValueError, match="no build.json"): build(tmp_path, "digits", TINY, workers=1)


def colours(root, n=6, size=32):
    "Two classes of noisy colours"
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for c, name in enumerate(("blue", "red")):
            (root/split/name).mkdir(parents=True)
            for i in range(n):
                a = rng.integers(0, 120, (size, size, 3), dtype=np.uint8); a[..., 2*(1 - c)] += 100
                Image.fromarray(a).save(root/split/name/f"{i}.png")


def test_own_images_with_the_short_recipe(tmp_path):
    colours(tmp_path/"colours")
    recipe = replace(recipes["short"], epochs=1, depth=8, width=4)
    ms = build(tmp_path/"zoo", tmp_path/"colours", recipe, n_models=2, workers=1, progress=False)
    m = ms[1].meta
    assert (
        m["classes"] in (["blue", "red"], ["red", "blue"])
        and m["data"] == "colours"
        and m["precision"] == best_precision()
    )
    assert (
        m["recipe"]["epochs"] == 1
        and m["versions"]["torch"]
        and len(m["mean"]) == 3
        and ms.stack("conv1").shape == (2, 4, 3, 3, 3)
    )


def test_what_cannot_be_built_is_said(tmp_path):
    digits = load_images("digits")
    black = ImageSet(digits.images*0, digits.labels, digits.classes, "black")
    wide = ImageSet(digits.images.repeat(1, 1, 1, 2), digits.labels, digits.classes, "wide")
    gap = ImageSet(digits.images[digits.labels != 3], digits.labels[digits.labels != 3], digits.classes, "gap")
    for kw, words in [
            (dict(images="nowhere"), "unknown images"),
            (dict(images=(black, digits)), "channel 0 of 'black' is 0 in every pixel"),
            (dict(images=(digits, wide)), r"training images are \(1, 8, 8\), test images \(1, 8, 16\)"),
            (dict(images=(digits, gap)), "class '3' of 'gap' has no test image"),
            (dict(recipe="fast"), "known are paper, short, digits"),
            (dict(n_tasks=6), "10 classes"),
            (dict(n_models=0), "at least 1"),
            (dict(at_once=-1), "at least 1"),
            (dict(seed=2**70), "give a whole number from 0"),
            (dict(seed=-1), "give a whole number from 0"),
            (dict(device="mps"), "unknown device 'mps'"),
            (dict(device="meta"), "unknown device 'meta'")]:
        with pytest.raises(ValueError, match=words): build(tmp_path/"zoo", **kw, workers=1)
    with pytest.raises(ValueError, match="known are float32"): Recipe("odd", 1, .1, (), precision="half")
    assert not (tmp_path/"zoo").exists()


@pytest.mark.parametrize("field, value", [
    ("epochs", 0), ("epochs", -1), ("epochs", 1.5), ("batch_size", 0), ("pad", -1), ("width", 0), ("depth", 9),
    ("lr", float("nan")), ("lr", -1), ("momentum", float("inf")), ("weight_decay", -1e-4), ("init", "fan")])
def test_recipes_that_cannot_work_are_refused_when_made(field, value):
    with pytest.raises(ValueError, match=str(value)): replace(TINY, **{field: value})


def test_first_weights_by_fan_in_are_the_same_draws_at_another_scale():
    by_out, by_in = (train.init_model(3, replace(TINY, init=init)).state_dict() for init in ("fan_out", "fan_in"))
    for k, v in by_out.items():
        scale = (v.shape[0]/v.shape[1])**.5 if v.ndim == 4 else 1
        torch.testing.assert_close(by_in[k], v*scale)
    assert abs(by_in["layer3.0.conv1.weight"].std()/(2/(9*8))**.5 - 1) < .1  # 8 channels in, 16 out


def test_another_scale_of_first_weights_is_another_build(tmp_path):
    how = dict(images="digits", n_tasks=1, n_models=1, workers=1, progress=False)
    build(tmp_path, recipe=TINY, **how)
    with pytest.raises(ValueError, match="recipe init fan_out, now fan_in"):
        build(tmp_path, recipe=replace(TINY, init="fan_in"), **how)
    ms = build(tmp_path/"in", recipe=replace(TINY, init="fan_in"), **how)
    assert ms[0].meta["recipe"]["init"] == "fan_in" and "init" not in load_modelset(tmp_path)[0].meta["recipe"]


def test_a_folder_that_an_older_version_began_is_taken_up(tmp_path):
    "One model finished, one stopped after two of four epochs, by the code before recipes had `init`"
    shutil.copytree(ROOT/"tests"/"data"/"older_build", tmp_path/"zoo")
    old, begun, plan = fingerprint(models(tmp_path/"zoo")), [], (tmp_path/"zoo"/"build.json").read_bytes()
    class Begun(Callback):
        def before_train(self): begun.append(self.epoch)
    recipe = Recipe(**json.loads(plan)["recipe"])
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(train, "make_learner", lambda *a, f=train.make_learner, **k: f(*a, **k).add_cb(Begun()))
        ms = build(tmp_path/"zoo", "digits", recipe, n_tasks=1, n_models=2, workers=1, progress=False)
    assert begun == [2, 3] and len(ms) == 2 and not len(ms.rejected)
    assert old.items() <= fingerprint(models(tmp_path/"zoo")).items()
    assert (tmp_path/"zoo"/"build.json").read_bytes() == plan
    assert len(load_modelset(tmp_path/"zoo"/"epochs"/"002")) == 2 and not list((tmp_path/"zoo"/"checkpoints").iterdir())
    before = {k: v for k, v in json.loads(plan).items() if k != "seed"}
    with pytest.raises(ValueError, match="seed 0, now 1"): build(tmp_path/"zoo", "digits", recipe, seed=1)
    assert before.keys() | {"seed"} == BuildPlan.__dataclass_fields__.keys()


@pytest.mark.parametrize("content, words", [
    ("null", "holds None, expected fields by name"), ("{}", "'images' is missing"), ("[1]", "expected fields"),
    ("half", "is not JSON")])
def test_a_plan_that_says_nothing_is_refused(tmp_path, content, words):
    (tmp_path/"build.json").write_text(content)
    with pytest.raises(ValueError, match=f"build.json.*{words}"): build(tmp_path, "digits", TINY, workers=1)


@pytest.mark.parametrize("field, value", [
    ("recipe", {}), ("recipe", dict(epochs="4")), ("seed", "0"), ("pairs", [[0]*2, "a"]), ("images", None),
    ("mean", ["x"])])
def test_a_plan_of_wrong_types_is_refused(tmp_path, field, value):
    plan = json.loads((ROOT/"tests"/"data"/"older_build"/"build.json").read_text())
    write_json(tmp_path/"build.json", plan | {field: plan[field] | value if value and field == "recipe" else value})
    with pytest.raises(ValueError, match="has no plan that can be read"): build(tmp_path, "digits", TINY, workers=1)


@pytest.mark.parametrize("record", [{}, None, dict(task=0, run=0), dict(task=0, run=0, reason=1), [0]])
def test_a_reason_that_says_nothing_is_refused(tmp_path, record):
    write_json(tmp_path/"build.json", asdict(plan_build(load_images("digits", "train"), TINY, seed=0)))
    write_json(tmp_path/"set_aside"/"task00_run0.json", record)
    with pytest.raises(ValueError, match="task00_run0.json"):
        build(tmp_path, "digits", TINY, n_tasks=1, n_models=1, workers=1, progress=False)


# Forks two builds at a time from one process that has imported everything. Both find the folder without a plan:
# they wait for each other before either may write one.
PAIRS = """
import json, os, sys
import torch
torch.set_num_threads(1)
import lps.zoo.build as zoo
from lps.zoo.tasks import load_images
from multiprocessing import get_context
sys.path.insert(0, {tests!r})
from test_zoo import QUICK

images, lock, fork = tuple(load_images('digits', s) for s in ('train', 'test')), zoo.FileLock, get_context('fork')

def run(folder, seed, barrier, answers):
    def meet(file):
        barrier.wait(30)
        return lock(file)
    zoo.FileLock = meet
    try: zoo.build(folder, images, QUICK, seed=seed, **how)
    except ValueError as e: answers.put((seed, str(e)))
    else: answers.put((seed, 'built'))

how = dict(n_tasks=1, n_models=2, workers=1, progress=False)
zoo.build({before!r}, images, QUICK, **how)  # what is loaded at first use is loaded now
for line in sys.stdin:
    folder, *seeds = line.split()
    barrier, answers = fork.Barrier(2), fork.Queue()
    both = [fork.Process(target=run, args=(folder, int(s), barrier, answers)) for s in seeds]
    for p in both: p.start()
    print(json.dumps([answers.get(timeout=60) for p in both]), flush=True)
    for p in both: p.join()
"""
QUICK = replace(TINY, epochs=1, milestones=(), width=2, batch_size=512)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_eight_pairs_of_builds_started_together(tmp_path):
    "Of two builds with different seeds one goes on and the other is told; two that are equal share the work"
    code = PAIRS.format(tests=str(ROOT/"tests"), before=str(tmp_path/"before"))
    pairs = {tmp_path/f"pair{i:02d}": (i, i + i % 2) for i in range(8)}
    lines = "".join(f"{folder} {a} {b}\n" for folder, (a, b) in pairs.items())
    p = subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr
    answers = [json.loads(line) for line in p.stdout.splitlines()]
    assert len(answers) == 8
    for (folder, (a, b)), said in zip(pairs.items(), answers):
        seed = read_json(folder/"build.json", BuildPlan).seed
        refused = [words for s, words in said if words != "built"]
        assert len(refused) == (a != b) and all(f"was built with seed {seed}, now " in words for words in refused)
        assert {load_tensors(f)[1]["build_seed"] for f in models(folder)} == {seed}
        assert len(models(folder)) == 2 and all(read_marker(f) for f in models(folder))


def test_paper_recipe_is_the_papers():
    r = recipes["paper"]
    assert (
        r.epochs,
        r.lr,
        r.milestones,
        r.momentum,
        r.weight_decay,
        r.batch_size,
        r.pad,
        r.flip,
        r.depth,
        r.width,
    ) == (160, 0.1, (80, 120), 0.9, 1e-4, 128, 4, True, 20, 16)


def test_finished_build_again_changes_nothing(tmp_path):
    build(tmp_path, "digits", TINY, n_tasks=2, n_models=1, workers=1, progress=False)
    before = fingerprint(models(tmp_path))
    for workers in (0, 1, 2):
        assert len(build(tmp_path, "digits", TINY, n_tasks=2, n_models=1, workers=workers, progress=False)) == 2
    assert fingerprint(models(tmp_path)) == before


def test_few_units_are_handed_out_at_a_time(tmp_path, monkeypatch):
    "A unit carries megabytes of images: a scheduler must not get five hundred of them at once"
    waiting, most = 0, 0
    class Counting(ThreadPoolExecutor):
        def submit(self, *a):
            nonlocal waiting, most
            waiting += 1; most = max(most, waiting)
            return super().submit(self.run, *a)
        def run(self, f, *a):
            nonlocal waiting
            time.sleep(.001); waiting -= 1
            return [dict(task=0, run=0, val_accuracy=.5)]
    for f in ("load_modelset", "write_datasheet"): monkeypatch.setattr(zoo, f, lambda path: None)
    with Counting(1) as ex: build(tmp_path, "digits", TINY, n_models=60, executor=ex, progress=False)
    assert 50 <= most <= 65


@pytest.mark.parametrize("how, words", [
    (dict(keep=(2, 4)), r"epochs \[4\] cannot be kept: recipe 'tiny' has 4"),
    (dict(every=0), "every 0 epochs: at least 1"),
    (dict(device="gpu0"), "unknown device 'gpu0': give 'cpu' or 'cuda'")])
def test_impossible_wishes_are_refused_before_anything_is_written(tmp_path, how, words):
    with pytest.raises(ValueError, match=words):
        build(tmp_path / "zoo", "digits", TINY, n_models=1, progress=False, **how)
    assert not (tmp_path/"zoo").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_said(tmp_path):
    with pytest.raises(ValueError, match="device 'cuda', but torch .* sees no GPU here: give device='cpu'"):
        build(tmp_path / "zoo", "digits", TINY, device="cuda", progress=False)


def test_a_gpu_is_asked_for_where_the_models_train(tmp_path, monkeypatch):
    "Whoever hands units to a cluster's GPUs may have none"
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        zoo,
        "train_unit",
        lambda unit: asked.append(unit.device) or [dict(task=0, run=0, val_accuracy=0.5)] * len(unit.metas),
    )
    for f in ("load_modelset", "write_datasheet"): monkeypatch.setattr(zoo, f, lambda path: None)
    with ThreadPoolExecutor(1) as ex:
        build(tmp_path, "digits", TINY, n_models=1, executor=ex, device="cuda", progress=False)
    assert set(asked) == {"cuda"}


def with_states(folder):
    "Bytes of a finished build's models and kept epochs, by their place"
    files = [*folder.glob("*.safetensors"), *folder.glob("epochs/*/*.safetensors")]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@pytest.mark.parametrize("at_once", [1, 3])
def test_build_stopped_after_some_epochs_goes_on_to_the_same_bits(tmp_path, at_once):
    images = [load_images("digits", s) for s in ("train", "test")]
    images = tuple(ImageSet(i.images[:400], i.labels[:400], i.classes, "digits") for i in images)
    how = dict(
        recipe=replace(TINY, epochs=6, milestones=(4,)),
        n_tasks=1,
        n_models=3,
        workers=1,
        at_once=at_once,
        progress=False,
        keep=(1,),
    )
    build(tmp_path/"straight", images, **how | dict(keep=(1, 3)))
    early = build(tmp_path/"stopped", images, until=3, **how)
    assert early.path == tmp_path/"stopped/epochs/003" and set(early.manifest.recipe) == {"tiny, after 3 of 6 epochs"}
    assert "after 3 of 6 epochs" in (early.path / "DATASHEET.md").read_text() and not list(
        (tmp_path / "stopped").glob("*.safetensors")
    )
    begun = []
    class Begun(Callback):
        def before_train(self): begun.append(self.epoch)
    with pytest.MonkeyPatch.context() as mp:
        for module in (train, many):
            mp.setattr(module, "make_learner", lambda *a, f=train.make_learner, **k: f(*a, **k).add_cb(Begun()))
        build(tmp_path/"stopped", images, until=3, **how)
        assert begun == [], "what is there is not trained again"
        build(tmp_path/"stopped", images, **how)
    assert set(begun) == {3, 4, 5}
    assert with_states(tmp_path/"stopped") == with_states(tmp_path/"straight")
    assert not list((tmp_path/"stopped/checkpoints").iterdir())


def test_stopping_where_a_build_cannot_go_back_to_is_refused(tmp_path):
    how = dict(images="digits", recipe=TINY, n_tasks=1, n_models=1, workers=1, progress=False)
    build(tmp_path, until=3, **how)
    with pytest.raises(ValueError, match="already at epoch 3, and the run was to stop after 2"):
        build(tmp_path, until=2, **how)
    build(tmp_path, **how)
    with pytest.raises(ValueError, match="trained to its end and was not kept after 2 epochs"):
        build(tmp_path, until=2, **how)
    with pytest.raises(ValueError, match="until 5 epochs: recipe 'tiny' has 4"): build(tmp_path, until=5, **how)


def lost(folder, models, name="packed", **kwargs):
    "The first layers of some models, packed"
    return pack(models, folder/f"{name}.safetensors", **kwargs).path


def claimed(models):
    "Digests of whole networks, which a packed model has in its metadata"
    return [model.meta.get("digest") or digest for model, digest in zip(models, models.digests, strict=True)]


HOW = dict(images="digits", recipe=TINY, workers=1, progress=False)


def test_packed_models_are_not_trained_again(tmp_path):
    "Those of the stage asked for or later, in one file or several; the others are what they are without it"
    whole = build(tmp_path/"whole", n_models=2, keep=(1,), **HOW)
    early = load_modelset(tmp_path/"whole/epochs/001")
    packs = tmp_path/"packs"
    packs.mkdir()
    lost(packs, early[:5], "epoch1")
    lost(packs, whole[5:9], "epoch4")
    rest = build(tmp_path/"rest", n_models=2, packed=packs, **HOW)
    trained = {f.name for f in models(tmp_path/"rest")}
    assert trained == {"task00_run0.safetensors", "task04_run1.safetensors"} | set(whole.manifest.file[:5])
    assert rest.manifest.file.tolist() == whole.manifest.file.tolist() and claimed(rest) == whole.digests
    for name in trained: assert (tmp_path/"rest"/name).read_bytes() == (tmp_path/"whole"/name).read_bytes()
    stage = build(tmp_path/"stage", n_models=2, until=1, packed=packs, **HOW)
    assert [f.name for f in models(tmp_path/"stage/epochs/001")] == ["task04_run1.safetensors"]
    assert len(stage) == 10 and not models(tmp_path/"stage")


def test_a_build_whose_models_are_all_packed_trains_nothing(tmp_path, monkeypatch):
    whole = build(tmp_path/"whole", n_models=1, **HOW)
    file = lost(tmp_path, whole, classes={"4": "four"})
    monkeypatch.setattr(zoo, "train_unit", None)
    again = build(tmp_path/"again", n_models=1, packed=file, **HOW)
    assert claimed(again) == whole.digests and not models(tmp_path/"again")
    assert again.digests == load_modelset(file).digests != whole.digests, "of the first layers, which are here"
    assert (tmp_path/"again/build.json").read_bytes() == (tmp_path/"whole/build.json").read_bytes()


@pytest.mark.parametrize("change, words", [
    (dict(seed=1), "build_seed 0, not 1"),
    (dict(recipe=replace(TINY, lr=.05)), "is of another build: recipe"),
    (dict(tasks=[(0, 1), (2, 3)]), "pairs "),
])
def test_a_packed_set_of_another_build_is_refused(tmp_path, change, words):
    file = lost(tmp_path, build(tmp_path/"whole", n_tasks=1, n_models=1, **HOW))
    with pytest.raises(ValueError, match=words): build(tmp_path/"new", n_models=1, packed=file, **HOW | change)
    assert not (tmp_path/"new").exists()
    with pytest.raises(FileNotFoundError): build(tmp_path/"new", n_models=1, packed=tmp_path/"nowhere", **HOW)


@pytest.mark.parametrize("at_once", [1, 2])
def test_tasks_of_four_classes(tmp_path, at_once):
    "Heads and metadata have as many classes as the tasks, which may share some"
    tasks = [(0, 1, 5, 8), (8, 2, 3, 4), (2, 3, 5, 6)]
    how = HOW | dict(tasks=tasks, n_models=2, keep=(1,), at_once=at_once)
    ms = build(tmp_path, **how)
    assert [model.net.fc.out_features for model in ms] == [4]*6
    assert [model.meta["classes"] for model in ms[::2]] == [["0", "1", "5", "8"], ["8", "2", "3", "4"], list("2356")]
    assert [model.meta["pair"] for model in ms] == [list(tasks[task]) for task in ms.labels]
    assert read_json(tmp_path/"build.json", BuildPlan).pairs == list(map(list, tasks))
    assert ms.manifest.val_accuracy.between(0, 1).all()
    before = fingerprint(models(tmp_path))
    build(tmp_path, **how)
    assert fingerprint(models(tmp_path)) == before


@pytest.mark.parametrize("tasks", [
    [(0,)], [(0, 0)], [(0, 1, 0)], [(0, 10)], [(0, -1)], [(0, 1), (1, 0)], [(0, 1), (2, 3, 4)],
])
def test_impossible_tasks_are_refused(tmp_path, tasks):
    with pytest.raises(ValueError, match="classes"): build(tmp_path/"zoo", tasks=tasks, **HOW)
    assert not (tmp_path/"zoo").exists()


def test_settings_are_shown_where_they_are_passed():
    "Fields of `Running` and `Saving` are in the signatures of the functions that take them"
    assert {"workers", "executor", "device", "packed", "until"} <= set(inspect.signature(build).parameters)
    assert {"checkpoint", "every", "until", "keep"} <= set(inspect.signature(train_model).parameters)
    with pytest.raises(TypeError, match="worker"): build("nowhere", worker=1)
