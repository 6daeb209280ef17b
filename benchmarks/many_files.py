"""An index of 10,000 small checkpoints, 100 of them broken, that is killed in the middle and goes on

    python benchmarks/many_files.py [FILES] [BROKEN]

Half of the files are written by torch.save, half by safetensors; the broken ones are truncated, full of NaN, pickled
code, empty, or of another format than their ending. `lps index build` is killed when half of the models are in
the index, and started again. Reports the CPU seconds of each start, and checks that every whole file has one row, that
every broken one is listed with a reason, and that no code from a file was run. Writes
benchmarks/results/many_files.json.
"""
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402  the number of threads is read at import
import pandas as pd  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

from lps.core.files import provenance, write_json  # noqa: E402
from lps.nets.resnet import ResNet  # noqa: E402
from lps.index.index import ModelIndex  # noqa: E402

TASKS, METHOD = 50, "stem-signature"


class Code:
    "Write a file when unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), "w")


@functools.cache
def weights_of(task):
    "Return weights that the networks of a task have in common"
    torch.manual_seed(task)
    return ResNet(depth=8, width=4).state_dict()


def network(task, run):
    "A small network: the weights of its task, and noise"
    state, g = dict(weights_of(task)), torch.Generator().manual_seed(100_000*task + run)
    for name, w in state.items():
        if w.ndim > 1: state[name] = w + .2*w.std()*torch.randn(w.shape, generator=g)
    return state


def write(path, state):
    "Write a file in the format of its ending"
    if path.suffix == ".safetensors": safetensors.torch.save_file(state, path)
    else: torch.save(state, path)


def cut(path, state, canary):
    write(path, state)
    path.write_bytes(path.read_bytes()[:-200])


def not_a_number(path, state, canary):
    write(path, state | {"conv1.weight": torch.full_like(state["conv1.weight"], torch.nan)})


def code(path, state, canary): torch.save({"state_dict": Code(canary)}, path.with_suffix(".pt"))


def empty(path, state, canary): path.write_bytes(b"")


def other_format(path, state, canary): path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(500))


BREAK = dict(truncated=cut, nan=not_a_number, code=code, empty=empty, other_format=other_format)


def make_folder(folder, n, n_broken, seed=0):
    "Fill a folder; gives the names of broken files by what is wrong, and a table of tasks"
    rng = np.random.default_rng(seed)
    broken = {int(i): list(BREAK)[k % len(BREAK)] for k, i in enumerate(rng.permutation(n)[:n_broken])}
    rows, names = [], {}
    for i in range(n):
        path = folder/f"{i//1000:02d}"/f"m{i:05d}{'.pt' if i % 2 else '.safetensors'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        state, kind = network(i % TASKS, i), broken.get(i)
        if kind: BREAK[kind](path, state, folder.parent/"canary")
        else: write(path, state)
        if kind == "code": path = path.with_suffix(".pt")
        if kind: names[path.name] = kind
        rows.append(dict(file=path.name, task=i % TASKS))
    return names, pd.DataFrame(rows)


def start(market, folder, table):
    "lps index build, as a user would start it"
    words = "index", "build", market, folder, "--table", table, "--method", METHOD, "--workers", "1"
    command = "import sys; from lps.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", command, *map(str, words)], stdout=subprocess.PIPE, text=True)


def rows_in(market):
    "Models in an index that may not be there yet"
    try: return len(ModelIndex.load(market))
    except (OSError, ValueError): return 0


def child_cpu():
    "CPU seconds of the processes that have ended"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def kill_halfway(process, market, half):
    "Rows that are there after a kill when half of the models were"
    while rows_in(market) < half:
        if process.poll() is not None: raise SystemExit("the build ended before it was killed")
        time.sleep(.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return rows_in(market)


def main(n=10_000, n_broken=100):
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        broken, table = make_folder(home/"models", n, n_broken)
        table.to_csv(home/"tasks.csv", index=False)
        market, used = home/"market", [child_cpu()]
        kept = kill_halfway(start(market, home/"models", home/"tasks.csv"), market, n//2)
        used.append(child_cpu())
        process = start(market, home/"models", home/"tasks.csv")
        said = process.communicate()[0]
        used.append(child_cpu())
        assert process.returncode == 0, said
        index = ModelIndex.load(market)
        listed = {Path(file).name: reason for file, reason in zip(index.rejected.file, index.rejected.reason)}
        assert set(listed) == set(broken), set(listed) ^ set(broken)
        assert len(index) == n - n_broken and index.manifest.file.is_unique
        assert all(name in said for name in broken) and not (home/"canary").exists()
        index.rows.check()
        asked = next((home/"models").rglob("m00003.*"))
        result = dict(
            command="python benchmarks/many_files.py",
            files=n,
            broken=dict(Counter(broken.values())),
            method=METHOD,
            rows_after_kill=kept,
            rows=len(index),
            listed=len(listed),
            reasons=sorted({reason.partition(":")[0] for reason in listed.values()}),
            file_finds_itself=bool(index.answer(asked, 1).table.note[1] == "copy"),
            cpu_seconds=dict(until_killed=round(used[1] - used[0], 1), going_on=round(used[2] - used[1], 1)),
            cpu_ms_a_file=round(1000*(used[2] - used[0])/n, 2),
        )
        print(json.dumps(result, indent=2))
        return result | provenance()


if __name__ == "__main__":
    found = main(*map(int, sys.argv[1:3]))
    if len(sys.argv) == 1: write_json(Path(__file__).parent/"results/many_files.json", found)
