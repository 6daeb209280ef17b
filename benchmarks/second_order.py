"""Fitting branch 1 on 400 models of 50 tasks, 100 epochs at minibatch 1: our fit against the plain Learner loop, in one run

    python benchmarks/second_order.py

Random stems of the paper's shape (16×3×3×3) stand in for the models: the work does not depend on their values. One thread. The whole fit is timed
once a repeat; the plain loop, one Learner batch a model, is timed over 5 of the 100 epochs and scaled, the two in turn. Both give the same
weights to the bit, which is checked over 5 epochs. Writes benchmarks/results/second_order.json.
"""
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lps.modelset import load_modelset, provenance, save_model, write_json
from lps.second_order import fit

TASKS, MODELS, EPOCHS, PLAIN_EPOCHS, REPEATS = 50, 8, 100, 5, 3


def random_models(folder):
    for t in range(TASKS):
        for r in range(MODELS):
            save_model(f"{folder}/task{t:02d}_run{r}.safetensors", {"conv1.weight": 0.3*torch.randn(16, 3, 3, 3)}, dict(task=t, run=r))
    return load_modelset(folder)


def seconds(models, **kwargs):
    start = time.perf_counter()
    net = fit(models, milestones=(40, 80), **kwargs)
    return time.perf_counter() - start, net


def main():
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        models = random_models(folder)
        models.stack("conv1")
        ours, plain = [], []
        for _ in range(REPEATS):
            ours.append(seconds(models, epochs=EPOCHS)[0])
            t, a = seconds(models, epochs=PLAIN_EPOCHS, plain=True)
            plain.append(t*EPOCHS/PLAIN_EPOCHS)
        b = seconds(models, epochs=PLAIN_EPOCHS)[1]
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())), "the two disagree"
    ratios = [p/o for p, o in zip(plain, ours)]
    result = dict(
        command="python benchmarks/second_order.py", what=f"{TASKS*MODELS} models, {EPOCHS} epochs, minibatch 1, P = 100, 1 thread: {TASKS*MODELS*EPOCHS} steps",
        repeats=REPEATS, fit_seconds=dict(min=round(min(ours), 1), median=round(statistics.median(ours), 1), max=round(max(ours), 1)),
        plain_seconds_scaled=dict(min=round(min(plain), 1), median=round(statistics.median(plain), 1), max=round(max(plain), 1)),
        times_faster=dict(min=round(min(ratios), 2), median=round(statistics.median(ratios), 2), max=round(max(ratios), 2)), **provenance())
    write_json(Path(__file__).parent/"results/second_order.json", result)
    print(json.dumps({k: result[k] for k in ("fit_seconds", "plain_seconds_scaled", "times_faster")}, indent=2))


if __name__ == "__main__":
    main()
