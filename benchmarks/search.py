"""Exact search among a million models, beside reading them, scikit-learn, FAISS and usearch, in one run

    python benchmarks/search.py [ROWS]
    python benchmarks/search.py --graph

Rows of 128 float32 in a store of `lps.index.store`, on one core, CPU time of this process. One query at a time, and
32 at once; in turn, five repeats. FAISS takes part where it is installed. The graph of lps.index.store, by usearch, has
100,000
rows; its recall is counted against exact search, for models of a task that is there and for others. Also: what opening
a store and adding one model to it cost. Writes benchmarks/results/search.json; with --graph, the graph's part alone.
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

from lps.core.files import provenance, write_json  # noqa: E402
from lps.index.store import CONNECTIVITY, EXPANSION, EXPANSION_ADD, Store, create_store  # noqa: E402

WIDTH, K, REPEATS, MANY, CHUNK = 128, 10, 5, 32, 50_000
GRAPH_ROWS = 100_000
RESULT = Path(__file__).parent/"results/search.json"


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
    "Return the installed libraries that search the same rows, by name"
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


def kin_of(rows, n, seed):
    "Rows near some of these, as another model of their task is"
    rng = np.random.default_rng(seed)
    x = rows[rng.choice(len(rows), n, replace=False)]*(WIDTH*1.49)**.5 + .7*rng.standard_normal((n, WIDTH))
    return (x/np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def compared(store, queries):
    "The graph's answers beside exact ones, a query at a time: shares that agree, and CPU time"
    exact, graph = store.search(queries, K)[1], store.search_graph(queries, K)[1]
    one_by_one = {name: [cpu(search, query[None], K) for query in queries]
                  for name, search in (("exact", store.search), ("graph", store.search_graph))}
    times = {name: statistics.median(t) for name, t in one_by_one.items()}
    return dict(
        recall_at_10=round(float(np.mean([len(set(a) & set(b))/K for a, b in zip(exact, graph)])), 3),
        nearest_found=round(float((exact[:, 0] == graph[:, 0]).mean()), 3),
        exact_cpu_seconds=round(times["exact"], 5),
        graph_cpu_seconds=round(times["graph"], 5),
        times_faster_than_exact=round(times["exact"]/times["graph"], 1),
    )


def approximate(n):
    "A graph of n rows: what it costs, and what it finds for models of tasks that are there and of others"
    try: import usearch  # noqa: F401
    except ImportError: return None
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LPS_HOME"] = folder
        store = filled(Path(folder)/"market", n)
        build = cpu(store.build_graph)
        return dict(
            rows=n,
            settings=dict(connectivity=CONNECTIVITY, expansion_add=EXPANSION_ADD, expansion_search=EXPANSION),
            build_cpu_seconds=round(build, 1),
            bytes_a_row=round(store.known_graph()[0].stat().st_size/n),
            of_tasks_that_are_there=compared(store, kin_of(store.rows, 100, 7)),
            of_other_tasks=compared(store, rows_of(100, 8)),
        ) | provenance()


def measured(path, ways, queries):
    "CPU seconds of each way, in turn"
    runs = {name: [] for name in ["reading", *ways]}
    for _ in range(REPEATS):
        runs["reading"].append(cpu(read, path))
        for name, search in ways.items(): runs[name].append(cpu(search, queries))
    return {name: [t/base for t, base in zip(times, runs["reading"])] for name, times in runs.items()}, runs


def only_graph():
    "Measure the graph again, beside what else stands in the result file"
    part = approximate(GRAPH_ROWS)
    if part is None: sys.exit("usearch is not installed: pip install 'lps[approximate]'")
    write_json(RESULT, json.loads(RESULT.read_text()) | dict(usearch=part))
    print(json.dumps(part, indent=2))


def main():
    if "--graph" in sys.argv: return only_graph()
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
        result["usearch"] = approximate(min(n, GRAPH_ROWS))
        result["open_cpu_seconds"] = round(statistics.median(cpu(Store, path) for _ in range(REPEATS)), 5)
        row = rows_of(1, 9), [f"{n:032x}"], [-1], [dict(file="new.pt")]
        result["add_one_cpu_seconds"] = round(statistics.median(cpu(store.append, *row) for _ in range(REPEATS)), 5)
        write_json(RESULT, result | provenance())
        print(json.dumps(result, indent=2))


if __name__ == "__main__": main()
