"""Kill commands at their file operations, and run pairs of them at once: python scripts/kills.py [--n 1000] [--seed 1]

A command is killed before, after or in the middle of each of its file operations. What it left is compared with a fresh
build: an index must hold each model once, with the row and facts that a fresh build gives it, and the same command must
complete the work. Of two commands that run at once, the result must be that of running one after
the other. The script exits with 1 if anything else was seen, and prints it."""
import argparse
import contextlib
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from lps.cli import main as lps
from lps.core.files import save_tensors
from lps.index.index import ModelIndex
from lps.methods.registry import load_fitted
from lps.models.modelset import load_modelset
from lps.nets.resnet import ResNet
from lps.zoo.recipe import recipes

OPERATIONS = "open", "write", "fsync", "replace", "rename", "link", "unlink", "remove", "ftruncate", "mkdir", "rmdir"
METHOD = "--method", "stem-signature", "--workers", "1"
FILES = [f"t{task}_{run}.safetensors" for task in range(3) for run in range(2)]
CHANGED, NEW, GONE = FILES[1:4], "new.safetensors", FILES[:2]
TINY = replace(recipes["digits"], name="kills", epochs=2, milestones=(), depth=8, width=1, batch_size=512)


class Operations:
    "Count the file operations of this process; die at one of them, or pause at all"
    def __init__(self, at=0, how="", pause=None):
        self.at = at        # number of the operation; 0: none
        self.how = how      # 'before', 'half' or 'after'
        self.pause = pause  # a `random.Random`
        self.n = 0
        for name in OPERATIONS: setattr(os, name, self.counted(name, getattr(os, name)))

    def counted(self, name, call):
        def run(*args, **kwargs):
            self.n += 1
            if self.pause: signal.sigtimedwait([], self.pause.random()*.002)
            if self.n != self.at: return call(*args, **kwargs)
            try:
                if self.how == "half" and name == "write": call(args[0], bytes(args[1])[:len(args[1])//2])
                if self.how == "after": call(*args, **kwargs)
            finally: os.kill(os.getpid(), signal.SIGKILL)
        return run


def run_words(words) -> int:
    "Run a command, or call a function; return the exit code"
    return (words() or 0) if callable(words) else lps([str(word) for word in words])


def forked(words, report=None, **operations) -> int:
    "Run a command in a forked process, which may report its number of file operations; return the process number"
    pid = os.fork()
    if pid: return pid
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2): os.dup2(quiet, stream)
    counted = Operations(**operations)
    try:
        code = run_words(words)
        if report: report.write_text(str(counted.n))
    except BaseException: code = 3
    os._exit(code)


def ended(pid) -> int:
    "Return the exit code of a process, negative for a signal"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def write_model(path, task, run):
    "Write a small network of a task"
    torch.manual_seed(100*task + run)
    meta = dict(task=task, run=run, classes=[f"{task}a", f"{task}b"])
    save_tensors(path, ResNet(depth=8, width=2).state_dict(), meta)


class World:
    "Models in two versions, and indexes of them"
    def __init__(self, folder):
        self.folder = folder
        self.models = Path("models")  # as the commands name it
        for version in (0, 1):
            for file in FILES: write_model(folder/f"v{version}"/file, int(file[1]), int(file[3]) + 10*version)
            write_model(folder/f"v{version}"/NEW, 2, 7 + 10*version)
        self.restore()
        self.market = folder/"market"
        ModelIndex.build(self.models, folder/"kept", "stem-signature")
        self.index = ModelIndex.load(folder/"kept")
        self.fresh = {}
        for version in (0, 1):
            self.put(version, [*FILES, NEW])
            self.fresh |= rows_of(ModelIndex.build(self.models, None, self.index.fitted))
        self.restore()

    def put(self, version, files):
        "Place files of a version, with the time that they always have"
        self.models.mkdir(exist_ok=True)
        for file in files: shutil.copy2(self.folder/f"v{version}"/file, self.models/file)

    def restore(self):
        "Place the first version of all files but the new one"
        self.put(0, FILES)
        (self.models/NEW).unlink(missing_ok=True)

    def reset(self):
        "Make the index anew"
        self.restore()
        for name in ("market", "market.zip", "net.safetensors", "zoo"):
            path = self.folder/name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.copytree(self.folder/"kept", self.market)

    def held(self, fresh=None) -> list:
        "Return names and versions of the models in the index, after its checks and a comparison with a fresh build"
        index = ModelIndex.load(self.market if self.market.exists() else self.folder/"market.zip")
        index.check()
        rows = rows_of(index)
        for key, row in rows.items():
            if row != (fresh or self.fresh)[key]: raise AssertionError(f"{key} differs from a fresh build")
        return sorted((Path(key[0]).name, key[3]) for key in rows)

    def version(self, version, files) -> list:
        return [(file, (self.folder/f"v{version}"/file).stat().st_mtime_ns) for file in files]


def rows_of(index) -> dict:
    "Return row, digest, label and facts of each model by its key"
    places = index.rows.places
    facts = index.rows.facts(places)
    rows = [index.rows.rows[place].tobytes() for place in places]
    found = zip(rows, index.rows.digests(places), index.rows.labels(places).tolist(), facts)
    keys = [tuple(fact["key"]) for fact in facts]
    if len({key[:2] for key in keys}) < len(keys): raise AssertionError("a model is in the index twice")
    return dict(zip(keys, found))


class Build:
    "Build an index in a new folder"
    words = "index", "build", "market", "models", *METHOD

    def prepare(self, world): shutil.rmtree(world.market)

    def check(self, world, done):
        if (world.market/"header.json").exists(): held = world.held()
        else: held = []
        if not set(held) <= set(world.version(0, FILES)): raise AssertionError(held)
        if done and len(held) != len(FILES): raise AssertionError(held)


class Add:
    "Add models of which three have changed and one is new"
    words = "index", "add", "market", "models", "--workers", "1"

    def prepare(self, world): world.put(1, [*CHANGED, NEW])

    def check(self, world, done):
        held = world.held()
        same = [file for file in FILES if file not in CHANGED]
        before = sorted(world.version(0, FILES))
        after = sorted(world.version(0, same) + world.version(1, [*CHANGED, NEW]))
        if held != after and (done or held != before): raise AssertionError(held)


class Grow(Add):
    "Build again into an index, whose models have changed"
    words = Build.words


class Remove:
    "Remove two models from an index"
    words = "index", "remove", "market", *(f"models/{file}" for file in GONE)

    def prepare(self, world): pass

    def check(self, world, done):
        held = world.held()
        left = [file for file in FILES if file not in GONE]
        after = sorted(world.version(0, left))
        if held != after and (done or held != sorted(world.version(0, FILES))): raise AssertionError(held)


class AddPacked(Add):
    "Add models to a packed index"
    words = "index", "add", "market.zip", "models", "--workers", "1"

    def prepare(self, world):
        ModelIndex.load(world.market).save(world.folder/"market.zip")
        shutil.rmtree(world.market)
        super().prepare(world)


class Fit:
    "Fit a method over an earlier one"
    words = "fit", "models", "--method", "frobenius", "--seed", "1", "--out", "net.safetensors"
    whole = None

    def prepare(self, world):
        if self.whole is None:
            Fit.whole = []
            for seed in ("0", "1"):
                run_here([*self.words[:-3], seed, *self.words[-2:]])
                Fit.whole.append((world.folder/"net.safetensors").read_bytes())
        (world.folder/"net.safetensors").write_bytes(self.whole[0])

    def check(self, world, done):
        file = world.folder/"net.safetensors"
        load_fitted(file)
        if file.read_bytes() not in (self.whole[1:] if done else self.whole): raise AssertionError("another method")


class ZooBuild:
    "Train two networks"
    words = "zoo", "build", "zoo", "--recipe", "kills", "--tasks", "1", "--models", "2", "--workers", "1"
    whole = None

    def prepare(self, world):
        if self.whole is not None: return
        run_here(self.words)
        ZooBuild.whole = {file.name: file.read_bytes() for file in (world.folder/"zoo").glob("*.safetensors")}
        shutil.rmtree(world.folder/"zoo")

    def check(self, world, done):
        found = {file.name: file.read_bytes() for file in (world.folder/"zoo").glob("*.safetensors")}
        for name, data in found.items():
            if data != self.whole[name]: raise AssertionError(f"{name} has other bytes")
        if not done: return
        if found != self.whole: raise AssertionError("models are missing")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if len(load_modelset(world.folder/"zoo")) != 2: raise AssertionError("models are not read")


class Save(Build):
    "Save an index to a new folder"
    def words(self): ModelIndex.load("kept").save("market")


KILLED = Build, Add, Grow, Remove, AddPacked, Save, Fit, ZooBuild


def run_here(words):
    "Run a command in this process, without output"
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        code = run_words(words)
    if code: raise AssertionError(f"{words} ends with {code}")


def count_operations(world, trial) -> int:
    "Run a command to its end in a process, and return the number of its file operations"
    world.reset()
    trial.prepare(world)
    report = world.folder/"report"
    code = ended(forked(trial.words, report))
    if code: raise AssertionError(f"{trial.words} ends with {code}")
    trial.check(world, done=True)
    return int(report.read_text())


def one_kill(world, trial, where):
    "Kill a command, check what it left, let it complete its work, and check that"
    world.reset()
    trial.prepare(world)
    code = ended(forked(trial.words, **where))
    if code != -signal.SIGKILL: raise AssertionError(f"{where}: it ended with {code}")
    trial.check(world, done=False)
    if isinstance(trial, Remove) and len(world.held()) < len(FILES): return  # they are removed already
    if isinstance(trial, Save) and (world.market/"header.json").exists(): return
    run_here(trial.words)
    trial.check(world, done=True)


def kills(world, n, rng) -> list:
    "Return what was seen that should not be, for n kills"
    trials = [kind() for kind in KILLED]
    plans = []
    for trial in trials:
        number = count_operations(world, trial)
        print(f"{type(trial).__name__}: {number} file operations", flush=True)
        places = [(at, how) for how in ("half", "before", "after") for at in range(1, number + 1)]
        plans.append(itertools.cycle(rng.sample(places, len(places))))
    faults = []
    for i in range(n):
        trial = trials[i % len(trials)]
        at, how = next(plans[i % len(trials)])
        try: one_kill(world, trial, dict(at=at, how=how))
        except Exception as e: faults.append(f"{type(trial).__name__} killed {how} {at}: {type(e).__name__}: {e}")
    return faults


def add(path, *files): return "index", "add", path, *(f"models/{file}" for file in files), "--workers", "1"
def remove(path, *files): return "index", "remove", path, *(f"models/{file}" for file in files)


FIRST, SECOND = FILES[0], FILES[1]
PAIRS = [
    (add("PLACE", NEW), add("PLACE", NEW)),
    (add("PLACE", NEW, *CHANGED), add("PLACE", NEW, *CHANGED)),
    (add("PLACE", NEW), add("PLACE", *CHANGED)),
    (add("PLACE", NEW, *CHANGED), remove("PLACE", FIRST)),
    (add("PLACE", *CHANGED), remove("PLACE", SECOND)),
    (remove("PLACE", FIRST), remove("PLACE", SECOND)),
    (remove("PLACE", FIRST), remove("PLACE", FIRST)),
    (add("PLACE", NEW, *CHANGED), ("query", "PLACE", f"v0/{FIRST}", "--no-expected")),
    (remove("PLACE", FIRST), ("index", "info", "PLACE", "--check")),
]
BUILDS = [(Build.words, Build.words), (Build.words, ("index", "build", "market", "models", "--method", "fc"))]


def results(world, pair, place) -> list:
    "Return what the index holds after one command and then the other, in both orders"
    found = []
    for words in (pair, pair[::-1]):
        start(world, place)
        for command in words: ended(forked(command))
        found.append(world.held())
    return found


def start(world, place):
    "Place an index, in a folder or packed, and models of which three have changed"
    world.reset()
    if place == "market.zip": AddPacked().prepare(world)
    world.put(1, [*CHANGED, NEW])


def at_once(pair, rng) -> list:
    "Run two commands at once, and return how they ended"
    pids = [forked(words, pause=random.Random(rng.random())) for words in pair]
    return [ended(pid) for pid in pids]


def one_pair(world, number, rng, known):
    "Run a pair at once; its result must be that of one after the other"
    place = "market.zip" if number % 3 == 2 else "market"
    pair = [tuple(str(word).replace("PLACE", place) for word in words) for words in PAIRS[number % len(PAIRS)]]
    if (number % len(PAIRS), place) not in known: known[number % len(PAIRS), place] = results(world, pair, place)
    start(world, place)
    codes = at_once(pair, rng)
    held = world.held()
    if held not in known[number % len(PAIRS), place]: raise AssertionError(f"holds {held}")
    if not set(codes) <= {0, 2} or codes == [2, 2]: raise AssertionError(f"ended with {codes}")
    if 2 in codes and pair[0] != pair[1]: raise AssertionError(f"ended with {codes}")


def two_builds(world, number, rng):
    "Build two indexes in one new folder: one is refused or finds all done, and the other is whole"
    world.reset()
    shutil.rmtree(world.market)
    codes = at_once(BUILDS[number % len(BUILDS)], rng)
    if 0 not in codes or not set(codes) <= {0, 2}: raise AssertionError(f"ended with {codes}")
    index = ModelIndex.load(world.market)
    fresh = rows_of(ModelIndex.build(world.models, None, index.fitted))
    if world.held(fresh) != sorted(world.version(0, FILES)): raise AssertionError("models are missing")


def pairs(world, n, rng) -> list:
    "Return what was seen that should not be, for n pairs"
    faults = []
    known = {}
    for i in range(n):
        try:
            if i % 10 == 9: two_builds(world, i//10, rng)
            else: one_pair(world, i - i//10, rng, known)
        except Exception as e: faults.append(f"pair {i}: {type(e).__name__}: {e}")
    return faults


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="number of kills")
    parser.add_argument("--pairs", type=int, default=200, help="number of pairs of commands")
    parser.add_argument("--seed", type=int, default=1, help="seed of all choices")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    torch.set_num_threads(1)
    recipes["kills"] = TINY
    warnings.simplefilter("ignore")
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        os.environ["LPS_HOME"] = folder
        os.chdir(folder)
        world = World(Path(folder))
        faults = kills(world, args.n, rng)
        print(f"{args.n} kills, {len(faults)} faults, seed {args.seed}", flush=True)
        more = pairs(world, args.pairs, rng)
        print(f"{args.pairs} pairs of commands at once, {len(more)} faults, seed {args.seed}", flush=True)
        os.chdir("/")
    for fault, count in Counter(faults + more).most_common(): print(f"{count} x {fault}"[:500])
    return 1 if faults or more else 0


if __name__ == "__main__": sys.exit(main())
