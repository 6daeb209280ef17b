"""align_layer, forward and backward, against eqs (5), (6), (8) written out: time and peak memory, in one run

    python benchmarks/align.py

A 64×64×3×3 layer of 8 models, P = 100, Q = 64, float32, one thread. Each repeat is a process of its own, the two in
turn; its time is that of the
second of two passes, its memory what the process's peak has grown by. Writes benchmarks/results/align.json.
"""
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from lps.align import align_layer
from lps.core.files import provenance, write_json

SHAPE, P, Q, REPEATS = (8, 64, 64, 3, 3), 100, 64, 5


def written_out(weight, second_order):
    products = torch.einsum("bijuv,pquv->bijpq", weight, second_order)  # eq. (5)
    return products.amax(2).sum(-1).sort(dim=1, descending=True)[0]     # eqs (6), (8)


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def measure(name):
    "Seconds of one pass, MB that it adds to the process's peak, and its gradients' norms as a check"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight, second_order = torch.randn(SHAPE, requires_grad=True), torch.randn(P, Q, 3, 3, requires_grad=True)
    f, before = {"align_layer": align_layer, "written out": written_out}[name], peak_mb()
    for _ in range(2):
        weight.grad = second_order.grad = None
        start = time.perf_counter()
        f(weight, second_order).square().sum().backward()
        seconds = time.perf_counter() - start
    return dict(
        seconds=seconds, mb=peak_mb() - before, grads=[weight.grad.norm().item(), second_order.grad.norm().item()]
    )


def main():
    runs = {"written out": [], "align_layer": []}
    for _ in range(REPEATS):
        for name in runs:
            out = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True).stdout
            runs[name].append(json.loads(out))
    for a, b in zip(*runs.values()):
        assert all(abs(x/y - 1) < 1e-4 for x, y in zip(a["grads"], b["grads"])), "the two disagree"
    ratios = {k: [a[k]/b[k] for a, b in zip(*runs.values())] for k in ("seconds", "mb")}
    rows = {n: {k: round(statistics.median(r[k] for r in rs), 3) for k in ("seconds", "mb")} for n, rs in runs.items()}
    result = dict(
        command="python benchmarks/align.py",
        what=f"forward + backward, weight {SHAPE}, second order ({P}, {Q}, 3, 3), float32, 1 thread",
        repeats=REPEATS,
        median=rows,
        times_faster={
            f: round(g(ratios["seconds"]), 2) for f, g in (("min", min), ("median", statistics.median), ("max", max))
        },
        times_less_memory={
            f: round(g(ratios["mb"]), 1) for f, g in (("min", min), ("median", statistics.median), ("max", max))
        },
        **provenance(),
    )
    write_json(Path(__file__).parent/"results/align.json", result)
    print(json.dumps({k: result[k] for k in ("median", "times_faster", "times_less_memory")}, indent=2))


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1]))) if len(sys.argv) > 1 else main()
