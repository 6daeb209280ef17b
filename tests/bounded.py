"""Run by test_bounds: python bounded.py FOLDER. Each file is read in a process with little memory and time, and
what came of it is printed as JSON

Beyond what a normal query needs, there are twice the file and 300 MB of address space, and 5 seconds of the CPU."""
import functools
import json
import os
import resource
import signal
import sys
import warnings
from pathlib import Path

from lps.models.imports import import_models
from lps.models.inspect import inspect_model
from lps.methods.registry import fit_method, load_fitted
from lps.models.modelset import load_modelset
from lps.index.index import ModelIndex
from lps.zoo.tasks import load_images

SECONDS, MEGABYTES = 5, 300


def address_space():
    "Bytes that this process has"
    return int(Path("/proc/self/statm").read_text().split()[0])*resource.getpagesize()


def limit(n_bytes):
    "No more memory and time than a normal query, and these"
    memory = address_space() + 2*n_bytes + MEGABYTES*10**6
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + SECONDS
    resource.setrlimit(resource.RLIMIT_AS, (memory, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    signal.alarm(300)  # for what waits and uses no time: a pipe


def what_comes_of(asked):
    "How calls end under these limits, one after the other: their answers or errors as text"
    read, write = os.pipe()
    child = os.fork()
    if not child:
        for name, ask, n_bytes in asked:
            limit(n_bytes)
            try: said = f"{ask()}"
            except Exception as e: said = f"{type(e).__name__}: {e}"
            os.write(write, json.dumps([name, said[:4000]]).encode() + b"\n")
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe: said = dict(map(json.loads, pipe))
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status): said[asked[len(said)][0]] = f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return said


def n_bytes(path):
    "Size of a file, or of the files in a folder"
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def greedy(n_bytes):
    "Take memory"
    return len(bytearray(n_bytes))


def endless():
    "Take time"
    while True: pass


def main(folder):
    warnings.simplefilter("ignore")
    models = load_modelset(folder/"zoo")
    index = ModelIndex(fit_method(models, "lps", n_filters=4, epochs=1, milestones=()), models)
    readers = dict(query=index.query, net=load_fitted, index=ModelIndex.load, packed=load_modelset)
    readers["import"] = lambda path: import_models(path, folder/"taken in").rejected.to_string()
    readers["images"] = lambda path: load_images(path, size=32)
    readers["take"] = lambda path: inspect_model(path).architecture
    index.query(folder/"query normal.pt")  # what it loads is loaded now
    asked = []
    for path in sorted(folder.glob("* *")):
        read = readers[path.name.split()[0]]
        asked.append((path.stem, functools.partial(read, path), n_bytes(path)))
    pickles = [case for case in asked if case[1].args[0].suffix != ".safetensors"]
    said = what_comes_of(pickles)  # one after the other: each new process would start one that reads pickles
    for case in asked:
        if case not in pickles: said |= what_comes_of([case])
    said |= what_comes_of([("greedy", lambda: greedy(1_000_000_000), 0)])
    said |= what_comes_of([("modest", lambda: greedy(100_000_000), 0)])
    said |= what_comes_of([("endless", endless, 0)])
    print(json.dumps(said))


if __name__ == "__main__": main(Path(sys.argv[1]))
