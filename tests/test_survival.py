"""Builds whose machine fails: killed at any moment, disks full or broken, numbers that are no longer numbers"""
import errno
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback

import lps.core.files as files
import lps.zoo.train as train
import lps.zoo.build as zoo
from lps.core.files import load_tensors, not_as_marked
from lps.core.jobs import one_thread
from lps.models.modelset import load_modelset
from lps.zoo.tasks import ImageSet, load_images, pair_classes, task_images
from lps.zoo.recipe import recipes
from lps.zoo.train import train_model
from lps.zoo.build import build, train_unit

TINY = replace(recipes["digits"], name="tiny", epochs=6, milestones=(4,), depth=8, width=2, batch_size=128)
QUICK = replace(TINY, batch_size=512)  # one batch an epoch: most of the time goes to files
HOW = dict(workers=1, progress=False, every=2, keep=(3,))
IMAGES = tuple(load_images("digits", s) for s in ("train", "test"))


def all_files(path):
    return {
        str(f.relative_to(path)): f.read_bytes()
        for f in sorted(path.rglob("*"))
        if f.is_file() and not f.name.endswith(".tmp")
    }
def weights(contents):
    return {k: v for k, v in contents.items() if k.endswith(".safetensors") and "checkpoints" not in k}
def sheets(contents): return {k: v for k, v in contents.items() if "datasheet" in k.lower()}
def finished(path):
    return {
        f.name: f.read_bytes() for f in path.glob("[!.]*.safetensors") if files.read_marker(f) and not not_as_marked(f)
    }


# A process that has imported everything forks one build for each line it reads. A build dies by SIGKILL after so many
# seconds, or before or after so many of its file operations, and notes every epoch that it begins.
FORKS = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import lps.core.files, lps.zoo.build as zoo
from fastai.callback.core import Callback
from test_survival import HOW, IMAGES, QUICK

class Log(Callback):
    def __init__(self, file): self.file = file
    def before_train(self):
        with open({log!r}, 'a') as f: f.write(f'{{self.file}} {{self.epoch}}\\n')

def die(): os.kill(os.getpid(), signal.SIGKILL)

class DyingOs:
    "`os`, until the n-th file operation"
    def __init__(self, n): self.n = n
    def __getattr__(self, name):
        f = getattr(os, name)
        if name not in ('write', 'fsync', 'replace'): return f
        def op(*args):
            self.n -= 1
            if self.n == 0 and name == 'write': os.write(args[0], args[1][:len(args[1])//2]); die()
            if self.n == 0 and name == 'fsync': die()
            r = f(*args)
            if self.n == 0: die()
            return r
        return op

def child(n_ops, n_models):
    real = zoo.train_model
    def logged(*a, checkpoint, **kw):
        return real(*a, cbs=[Log(checkpoint.name)], checkpoint=checkpoint, **kw)
    zoo.train_model = logged
    if n_ops: lps.core.files.os = DyingOs(n_ops)
    zoo.build({folder!r}, IMAGES, QUICK, n_models=n_models, **HOW)

zoo.build({folder!r} + ' before', IMAGES, QUICK, n_models=1, **HOW)  # what is loaded at first use is loaded now
print('ready', flush=True)
for line in sys.stdin:
    seconds, n_ops, n_models = line.split()
    if not (pid := os.fork()):
        try: child(int(n_ops), int(n_models))
        except BaseException as e: print('error', type(e).__name__, e, flush=True); os._exit(1)
        os._exit(0)
    if float(seconds): time.sleep(float(seconds)); os.kill(pid, signal.SIGKILL)
    print('status', os.waitpid(pid, 0)[1], flush=True)
"""


def epochs_begun(log):
    "Each training's epochs in the order they were begun, by file"
    begun = {}
    for l in log.read_text().splitlines() if log.exists() else []:
        begun.setdefault(l.split()[0], []).append(int(l.split()[1]))
    return begun


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_thirty_kills(tmp_path):
    folder, log, rng = tmp_path/"zoo", tmp_path/"log", random.Random(0)
    code = FORKS.format(tests=str(Path(__file__).parent), log=str(log), folder=str(folder))
    p = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
    )
    def run(seconds=0, n_ops=0, n_models=40):
        p.stdin.write(f"{seconds} {n_ops} {n_models}\n")
        answer = p.stdout.readline().split()
        assert answer[0] == "status", answer
        return int(answer[1])
    try:
        assert p.stdout.readline() == "ready\n"
        kept, seen = {}, {}
        for i in range(30):
            when = dict(seconds=rng.uniform(.02, .6)) if i % 2 else dict(n_ops=rng.randint(1, 60))
            assert run(**when) == 9, "the build ended before it was killed"
            now, seen_now = finished(folder), epochs_begun(log)
            assert {k: now.get(k) for k in kept} == kept, "a finished model was lost or changed"
            for name, epochs in seen_now.items():
                again = epochs[len(seen.get(name, [])):]
                if again and name in seen:
                    assert (
                        0 <= seen[name][-1] + 1 - again[0] <= HOW["every"]
                    ), f"{name}: epoch {seen[name][-1]} was begun, then {again[0]}"
                assert all(b == a + 1 for a, b in zip(again, again[1:])), (name, epochs, again)
            kept, seen = now, seen_now
        n_models = 1 + max((int(f.split("run")[1].split(".")[0]) for f in [*kept, *seen]), default=0)
        assert run(n_models=n_models) == 0
    finally: p.kill()
    assert len(kept) >= 6
    straight = build(tmp_path/"straight", IMAGES, QUICK, n_models=n_models, **HOW)
    expected = weights(all_files(tmp_path/"straight"))
    assert weights(all_files(folder)) == expected and len(expected) == 2*5*n_models
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(load_modelset(folder)) == len(load_modelset(folder/"epochs"/"003")) == len(straight)
    assert not list((folder/"checkpoints").glob("[!.]*"))


class FaultyOs:
    "`os` whose n-th file operation fails"
    def __init__(self, n, fault): self.n, self.fault, self.ops = n, fault, []
    def __getattr__(self, name):
        f = getattr(os, name)
        if name not in ("write", "fsync", "replace"): return f
        def op(*args):
            self.ops.append(name)
            if len(self.ops) != self.n: return f(*args)
            if self.fault == "short": return f(args[0], args[1][:len(args[1])//3]) if name == "write" else f(*args)
            if self.fault == "lost" and name == "write": f(args[0], args[1][:len(args[1])//3]); return len(args[1])
            code = getattr(errno, self.fault, errno.EIO)
            raise OSError(code, os.strerror(code))
        return op


SHORT = replace(TINY, epochs=3, milestones=(2,))
ONE = dict(n_tasks=1, workers=1, progress=False, every=2, keep=(1,))


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    "A folder with one finished model; the same with a second one; the file operations in between"
    path = tmp_path_factory.mktemp("grown")
    build(path/"one", IMAGES, SHORT, n_models=1, **ONE)
    shutil.copytree(path/"one", path/"two")
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(files, "os", counting := FaultyOs(0, ""))
        build(path/"two", IMAGES, SHORT, n_models=2, **ONE)
    return path, counting.ops


def test_a_model_is_written_by_these_operations(grown):
    assert (
        grown[1] == ["write", "fsync", "replace", "fsync"] * 7
    ), "kept epoch and its marker, checkpoint, model and its marker, the datasheet twice"


ANY_OPERATION = [(n, ("ENOSPC", "EIO")[(n - 1)//4 % 2]) for n in range(1, 29)]  # four operations a file
WRITES = itertools.product(range(1, 29, 4), ["short", "lost"])
FAULTS = [*ANY_OPERATION, *WRITES]


@pytest.mark.parametrize("n, fault", FAULTS)
def test_failing_file_operation(grown, tmp_path, monkeypatch, n, fault):
    (source, ops), folder = grown, tmp_path/"zoo"
    assert ops[n - 1] == "write" or fault not in ("short", "lost")
    shutil.copytree(source/"one", folder)
    before = all_files(folder)
    with monkeypatch.context() as mp:
        mp.setattr(files, "os", FaultyOs(n, fault))
        if fault == "short": build(folder, IMAGES, SHORT, n_models=2, **ONE)
        else:
            with pytest.raises(OSError, match=f"{folder}.* could not be written: ") as e:
                build(folder, IMAGES, SHORT, n_models=2, **ONE)
            assert e.value.errno == getattr(errno, fault, errno.EIO) and "\n" not in str(e.value)
    now = all_files(folder)
    assert {k: now[k] for k in before} | sheets(now) == before | sheets(now), "an old file changed"
    assert all(json.loads(v) for k, v in now.items() if k.endswith(".json"))
    assert not list(folder.rglob(".*.tmp")), "a temporary file was left"
    whole = weights(all_files(source/"two"))
    assert all(whole[k] == v for k, v in weights(now).items()), "a file that is not whole"
    build(folder, IMAGES, SHORT, n_models=2, **ONE)
    assert weights(all_files(folder)) == whole


@pytest.mark.parametrize("n", range(1, 5))
def test_failing_at_the_very_first_file(tmp_path, monkeypatch, n):
    with monkeypatch.context() as mp:
        mp.setattr(files, "os", FaultyOs(n, "ENOSPC"))
        with pytest.raises(OSError, match="build.json could not be written: No space left on device"):
            build(tmp_path / "zoo", IMAGES, SHORT, n_models=1, **ONE)
    assert len(build(tmp_path/"zoo", IMAGES, SHORT, n_models=1, **ONE)) == 1


class PowerCut(BaseException):
    "The machine is off"


class UnsyncedOs:
    "`os` whose power fails before the n-th file operation; renames in folders that were not synced are then undone"
    def __init__(self, n): self.n, self.renamed = n, []
    def __getattr__(self, name): return getattr(os, name)

    def count(self):
        self.n -= 1
        if self.n: return
        for path, before in reversed(self.renamed):
            if before is None: os.unlink(path)
            else: path.write_bytes(before)
        raise PowerCut

    def write(self, *args):
        self.count()
        return os.write(*args)

    def fsync(self, fd):
        self.count()
        synced = Path(os.readlink(f"/proc/self/fd/{fd}"))
        self.renamed = [(p, before) for p, before in self.renamed if p.parent != synced]

    def replace(self, tmp, path):
        self.count()
        path = Path(path)
        self.renamed.append((path.resolve(), path.read_bytes() if path.exists() else None))
        os.replace(tmp, path)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
@pytest.mark.parametrize("n", range(3, 29))
def test_power_fails_before_a_folder_is_synced(grown, tmp_path, monkeypatch, n):
    "Nothing that was finished is lost, nothing half-written counts, and the build ends as if nothing had happened"
    source, folder = grown[0], tmp_path/"zoo"
    shutil.copytree(source/"one", folder)
    before = finished(folder)
    with monkeypatch.context() as mp:
        mp.setattr(files, "os", UnsyncedOs(n))
        with pytest.raises(PowerCut): build(folder, IMAGES, SHORT, n_models=2, **ONE)
    whole = weights(all_files(source/"two"))
    assert before.items() <= finished(folder).items() <= whole.items()
    assert {k: v for k, v in all_files(folder).items() if k in whole}.items() <= whole.items()
    build(folder, IMAGES, SHORT, n_models=2, **ONE)
    assert weights(all_files(folder)) == whole


def test_failure_in_a_worker_process(tmp_path):
    "The error comes back through a pool with its words, and what was finished stays"
    build(tmp_path, IMAGES, SHORT, n_models=1, **ONE)
    before = all_files(tmp_path)
    (tmp_path/"checkpoints").rmdir()
    (tmp_path/"checkpoints").write_text("in the way")
    with pytest.raises(OSError, match="checkpoints"):
        build(tmp_path, IMAGES, SHORT, n_models=4, **ONE | dict(workers=2))
    assert all(all_files(tmp_path)[k] == v for k, v in before.items())
    (tmp_path/"checkpoints").unlink()
    assert len(build(tmp_path, IMAGES, SHORT, n_models=4, **ONE)) == 4


def test_disk_space_is_checked_before(tmp_path, monkeypatch):
    free = lambda n: monkeypatch.setattr(zoo.shutil, "disk_usage", lambda path: SimpleNamespace(free=n))
    free(50_000_000)
    words = r"500 models need (\d+) MB in .*zoo, 50 MB are free: make (\d+) MB more room, or choose another folder"
    with pytest.raises(OSError, match=words) as e:
        build(tmp_path/"zoo", tuple(synthetic()), "paper", progress=False)
    need, more = (int(s) for s in re.search(r"need (\d+) MB.* make (\d+) MB", str(e.value)).groups())
    assert need - 50 <= more <= need - 49 and 550 < need < 700 and not list((tmp_path/"zoo").glob("*.safetensors"))
    one = build(tmp_path/"small", IMAGES, SHORT, n_models=1, **ONE)
    assert len(one) == 1
    free(0)
    assert len(build(tmp_path/"small", IMAGES, SHORT, n_models=1, **ONE)) == 1, "a finished build needs no room"


def synthetic():
    "A hundred classes of photographs' shape, without photographs"
    from lps.zoo.tasks import ImageSet
    return [
        ImageSet(
            torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8),
            torch.arange(200) % 100,
            [f"c{i:02d}" for i in range(100)],
            "synthetic",
        )
        for _ in range(2)
    ]


class Inject(Callback):
    "Spoil one number of the network in one batch"
    def __init__(self, tensor, value, epoch, log):
        self.tensor, self.value, self.at, self.log = tensor, value, epoch, log
    def before_train(self): self.log.append(self.epoch)
    def after_batch(self):
        if self.epoch == self.at and self.iter == 1:
            getattr(self.model, "net", self.model).state_dict()[self.tensor].view(-1)[0] = self.value


@pytest.mark.parametrize("tensor", ["conv1.weight", "layer2.0.bn1.running_var", "fc.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_number_is_noticed_within_the_epoch(tmp_path, monkeypatch, tensor, value):
    real, log, recipe = zoo.train_model, [], replace(TINY, precision="bfloat16" if value > 0 else "float32")
    def injected(*a, checkpoint, **kw):
        spoiling = [Inject(tensor, value, 4, log)] if "task01" in checkpoint.name else []
        return real(*a, cbs=spoiling, checkpoint=checkpoint, **kw)
    monkeypatch.setattr(zoo, "train_model", injected)
    ms = build(tmp_path, IMAGES, recipe, n_models=1, n_tasks=3, **HOW)
    assert log == [0, 1, 2, 3, 4], "no epoch was begun after it"
    assert ms.tasks == load_modelset(tmp_path / "epochs" / "003").tasks == [0, 2] and not list(
        tmp_path.rglob("*task01*.safetensors")
    )
    aside = (tmp_path/"set_aside"/"task01_run0.json").read_text()
    assert "epoch 4" in aside and ("nan" in aside.lower() or "inf" in aside)
    monkeypatch.undo()
    assert build(tmp_path, IMAGES, recipe, n_models=1, n_tasks=3, **HOW).tasks == [0, 2]


class CutOff(Callback):
    def __init__(self, epoch): self.at = epoch
    def before_epoch(self):
        if self.epoch == self.at: raise KeyboardInterrupt


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("every, cut", [(1, 1), (2, 5), (4, 3)])
def test_resumed_equals_uninterrupted(tmp_path, precision, every, cut):
    recipe = replace(TINY, precision=precision, flip=True, width=4)
    args = *(task_images(s, pair_classes(10)[1]) for s in IMAGES), recipe, 7
    with one_thread():
        whole, metrics = train_model(*args)
        with pytest.raises(KeyboardInterrupt):
            train_model(*args, cbs=[CutOff(cut)], checkpoint=tmp_path / "c.safetensors", every=every)
        assert (tmp_path/"c.safetensors").exists() == (cut >= every)
        resumed, again = train_model(*args, checkpoint=tmp_path/"c.safetensors", every=every)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())
    assert {k: v for k, v in metrics.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}


@pytest.mark.parametrize("spoil", ["torn", "nan", "other seed", "other recipe", "not a checkpoint"])
def test_unfit_checkpoint_counts_as_none(tmp_path, spoil):
    file, args, begun = tmp_path/"c.safetensors", [task_images(s, pair_classes(10)[1]) for s in IMAGES], []
    class Begun(Callback):
        def before_train(self): begun.append(self.epoch)
    with one_thread():
        with pytest.raises(KeyboardInterrupt): train_model(*args, TINY, 7, cbs=[CutOff(4)], checkpoint=file, every=1)
        state, meta = load_tensors(file)
        if spoil == "torn": file.write_bytes(file.read_bytes()[:-50])
        if spoil == "nan": state["momentum.0"].view(-1)[0] = float("nan"); files.save_tensors(file, state, meta)
        if spoil == "not a checkpoint": files.save_tensors(file, {"conv1.weight": torch.zeros(2)}, {})
        recipe, seed = replace(TINY, lr=.05) if spoil == "other recipe" else TINY, 8 if spoil == "other seed" else 7
        a, _ = train_model(*args, recipe, seed, cbs=[Begun()], checkpoint=file, every=1)
        b, _ = train_model(*args, recipe, seed)
    assert begun == list(range(6)) and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_one_unit_twice(tmp_path, monkeypatch):
    "Done again, or by two at the same time: one model, one answer"
    units = []
    def grab(us, *_): units.extend(us); yield from ()
    monkeypatch.setattr(zoo, "unit_results", grab)
    with pytest.raises(ValueError, match="no model"): build(tmp_path, IMAGES, SHORT, n_models=1, **ONE)
    with ThreadPoolExecutor(2) as ex: (a,), (b,) = ex.map(train_unit, units*2)
    same = lambda r: {k: v for k, v in r.items() if k != "seconds"}
    assert same(a) == same(b) and not not_as_marked(tmp_path/a["file"]) and a["sha256"]
    times = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()}
    assert same(*train_unit(units[0])) == same(a) and times == {
        f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()
    }


def test_model_without_marker_is_not_finished(tmp_path):
    ms = build(tmp_path, IMAGES, SHORT, n_models=2, **ONE)
    (tmp_path/"complete"/"task00_run0.json").unlink()
    with pytest.warns(UserWarning, match="has no marker of completeness"): assert len(load_modelset(tmp_path)) == 1
    again = build(tmp_path, IMAGES, SHORT, n_models=2, **ONE)
    assert len(again) == 2 and all(torch.equal(v, again[0].state[k]) for k, v in ms[0].state.items())


def equal_tasks():
    "As many images of each class, so that models of several tasks can train side by side"
    return tuple(
        ImageSet(
            *(t[torch.cat([(s.labels == c).nonzero()[:30, 0] for c in range(10)])] for t in (s.images, s.labels)),
            s.classes,
            "equal"
        )
        for s in IMAGES
    )


MANY = dict(n_tasks=3, n_models=2, at_once=4, workers=1, progress=False, every=1, keep=(2,))


def test_models_side_by_side_are_those_built_one_by_one(tmp_path):
    many = build(tmp_path/"many", equal_tasks(), TINY, **MANY)
    one = build(tmp_path/"one", equal_tasks(), TINY, **MANY | dict(at_once=1))
    for folder in ("", "epochs/002"):
        a, b = load_modelset(many.path/folder), load_modelset(one.path/folder)
        assert (
            a.manifest.drop(columns=["val_accuracy", "train_accuracy"]).equals(
                b.manifest.drop(columns=["val_accuracy", "train_accuracy"])
            )
            and len(a) == 6
        )
        for i in range(6): torch.testing.assert_close(a[i].state, b[i].state, rtol=1e-3, atol=1e-4)
    assert not list((many.path/"checkpoints").glob("*"))


@pytest.mark.parametrize("written", [0, 2])
def test_interrupted_unit_of_many_goes_on_as_it_was(tmp_path, monkeypatch, written):
    "Also when some of its models had been written already, and when other models are asked for"
    whole, real, begun = build(tmp_path/"whole", equal_tasks(), TINY, **MANY), zoo.train_models, []
    class Begun(Callback):
        def before_train(self): begun.append((self.model.M, self.epoch))
    def cut(*a, **kw): return real(*a, **kw, cbs=[Begun(), *([] if written else [CutOff(4)])])
    finish = zoo.Unit.finish
    def failing(self, place, *a):
        if len(list(place.folder.glob("complete/*"))) == written: raise KeyboardInterrupt
        return finish(self, place, *a)
    with monkeypatch.context() as mp:
        mp.setattr(zoo, "train_models", cut)
        mp.setattr(zoo.Unit, "finish", failing)
        with pytest.raises(KeyboardInterrupt): build(tmp_path/"cut", equal_tasks(), TINY, **MANY)
    before, begun[:] = finished(tmp_path/"cut"), []
    assert len(before) == written
    monkeypatch.setattr(zoo, "train_models", lambda *a, **kw: real(*a, **kw, cbs=[Begun()]))
    again = build(tmp_path/"cut", equal_tasks(), TINY, **MANY | dict(n_models=3, n_tasks=4))
    assert begun[0] == (4, 5 if written else 4) and len(again) == 12
    assert before.items() <= finished(tmp_path/"cut").items()
    a = again[again.manifest.file.isin(whole.manifest.file.tolist())]
    for i in range(6): torch.testing.assert_close(a[i].state, whole[i].state, rtol=1e-3, atol=1e-4)
    assert not list((tmp_path/"cut"/"checkpoints").glob("*"))


def test_one_of_many_is_set_aside_alone(tmp_path, monkeypatch):
    real = zoo.train_models
    def spoilt(*a, **kw):
        results = real(*a, **kw)
        return [train.Diverged("the loss is nan") if i == 1 else r for i, r in enumerate(results)]
    monkeypatch.setattr(zoo, "train_models", spoilt)
    ms = build(tmp_path, equal_tasks(), TINY, **MANY | dict(n_models=1))
    assert ms.tasks == [0, 2] and [f.name for f in (tmp_path/"set_aside").iterdir()] == ["task01_run0.json"]
    assert load_modelset(tmp_path/"epochs"/"002").tasks == [0, 2]


def test_unequal_tasks_train_apart(tmp_path):
    "The digits' classes have different numbers of images"
    assert len(build(tmp_path, IMAGES, TINY, n_models=2, at_once=8, workers=1, progress=False)) == 10
