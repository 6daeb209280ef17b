"""Exact search among a million models, beside reading them, scikit-learn, FAISS and usearch, in one run

    python benchmarks/search.py [ROWS]

Rows of 128 float32 in a store of `lps.store`, on one core, CPU time of this process. One query at a time, and 32 at
once; in turn, five repeats. FAISS and usearch take part where they are installed; the recall of usearch's graph is
counted against exact search. Also: what opening a store and adding one model to it cost. Writes
benchmarks/results/search.json.
"""
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"): os.environ[name] = "1"

import numpy as np  # noqa: E402  the number of threads is read at import
from sklearn.neighbors import NearestNeighbors  # noqa: E402

from lps.files import provenance, write_json  # noqa: E402
from lps.store import Store, create_store  # noqa: E402

WIDTH, K, REPEATS, MANY, CHUNK = 128, 10, 5, 32, 50_000


def rows_of(n, seed):
    "Rows of length 1 in clusters of ten, as models of a task are"
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, n//10), WIDTH)).astype(np.float32)
    x = centres[np.arange(n) % len(centres)] + .7*rng.standard_normal((n, WIDTH)).astype(np.float32)
    return x/np.linalg.norm(x, axis=1, keepdims=True)


def filled(path, n):
    "A store of n models"
    store = create_store(path, WIDTH)
    for first in range(0, n, CHUNK):
        m = min(CHUNK, n - first)
        facts = [dict(file=f"models/m{i:07d}.safetensors", task=i//10) for i in range(first, first + m)]
        digests = [f"{i:032x}" for i in range(first, first + m)]
        store.append(rows_of(m, first), digests, np.arange(first, first + m)//10, facts)
    return store


def read(path):
    "Read all rows into a buffer of a megabyte"
    buffer = memoryview(bytearray(1 << 20))
    with open(path/"rows.f32", "rb", buffering=0) as file:
        while file.readinto(buffer): pass


def peers(rows):
    "What searches the same rows, by name: those that are installed"
    brute = NearestNeighbors(algorithm="brute", metric="cosine").fit(rows)
    found = {"scikit-learn brute force": lambda queries: brute.kneighbors(queries, K, return_distance=False)}
    try:
        import faiss
        faiss.omp_set_num_threads(1)
        flat = faiss.IndexFlatIP(WIDTH)
        flat.add(rows)
        found["FAISS IndexFlatIP"] = lambda queries: flat.search(queries, K)[1]
    except ImportError: pass
    return found


def cpu(f, *args):
    "CPU seconds of a call"
    start = time.process_time()
    f(*args)
    return time.process_time() - start


def approximate(rows, queries, exact):
    "usearch's graph over the first rows: recall and time against exact search"
    try: from usearch.index import Index
    except ImportError: return None
    index = Index(ndim=WIDTH, metric="ip", dtype="f32")
    build = cpu(lambda: index.add(np.arange(len(rows)), rows, threads=1))
    found = index.search(queries, K, threads=1).keys
    recall = np.mean([len(set(a) & set(b))/K for a, b in zip(found, exact(queries))])
    ratio = cpu(exact, queries)/cpu(lambda: index.search(queries, K, threads=1))
    return dict(rows=len(rows), recall_at_10=round(float(recall), 3), times_faster_than_exact=round(ratio, 1),
                build_cpu_seconds=round(build, 1))


def measured(path, ways, queries):
    "CPU seconds of each way, in turn"
    runs = {name: [] for name in ["reading", *ways]}
    for _ in range(REPEATS):
        runs["reading"].append(cpu(read, path))
        for name, search in ways.items(): runs[name].append(cpu(search, queries))
    return {name: [t/base for t, base in zip(times, runs["reading"])] for name, times in runs.items()}, runs


def main():
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/"market"
        filled(path, n)
        store = Store(path)
        ways = {"lps store, exact": lambda queries: store.search(queries, K)[1]} | peers(np.array(store.rows))
        one, many = rows_of(1, 7), rows_of(MANY, 8)
        for name, search in ways.items():
            agree = np.mean([len(set(a) & set(b))/K for a, b in zip(search(many), ways["lps store, exact"](many))])
            assert agree > .99, f"{name} finds something else"
        result = dict(command="python benchmarks/search.py", rows=n, width=WIDTH, k=K, repeats=REPEATS)
        for title, queries in (("one_query", one), (f"{MANY}_queries", many)):
            ratios, runs = measured(path, ways, queries)
            result[title] = dict(
                times_reading={name: round(statistics.median(r), 2) for name, r in ratios.items()},
                worst={name: round(max(r), 2) for name, r in ratios.items()},
                cpu_seconds={name: round(statistics.median(t), 4) for name, t in runs.items()},
            )
        few = np.array(store.rows[:min(n, 100_000)])
        exact = Store(path)
        exact.rows, exact.records = few, exact.records[:len(few)]
        result["usearch"] = approximate(few, many, lambda queries: exact.search(queries, K)[1])
        result["open_cpu_seconds"] = round(statistics.median(cpu(Store, path) for _ in range(REPEATS)), 5)
        row = rows_of(1, 9), [f"{n:032x}"], [-1], [dict(file="new.pt")]
        result["add_one_cpu_seconds"] = round(statistics.median(cpu(store.append, *row) for _ in range(REPEATS)), 5)
        write_json(Path(__file__).parent/"results/search.json", result | provenance())
        print(json.dumps(result, indent=2))


if __name__ == "__main__": main()
