"""Fitting branch 1 on 400 models of 50 tasks, 100 epochs at minibatch 1: our fit against a loop with
`torch.optim.SGD`, in one run

    python benchmarks/second_order.py

Random stems of the paper's shape (16×3×3×3) stand in for the models: the work does not depend on their values. One
thread. The whole fit is timed once a repeat; the plain loop is timed over 5 of the 100 epochs and scaled, the two in
turn. Both give the same weights to the bit, which is checked over 5 epochs. Then one branch of each size that a
ResNet20 has, 80 models: a step of ours and of the plain loop, in turn, and what all 19 branches would take for 300
epochs. Writes benchmarks/results/second_order.json.
"""
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lps.core.files import provenance, save_tensors, write_json
from lps.core.jobs import one_thread, seeded
from lps.models.modelset import load_modelset
from lps.second_order import NetConfig, SecondOrderNet, fit

TASKS, MODELS, EPOCHS, PLAIN_EPOCHS, REPEATS = 50, 8, 100, 5, 3
SIZES = {
    (16, 3): 1,
    (16, 16): 6,
    (32, 16): 1,
    (32, 32): 5,
    (64, 32): 1,
    (64, 64): 5,
}  # filters and channels: branches of this size in a ResNet20


def random_models(folder):
    for t in range(TASKS):
        for r in range(MODELS):
            save_tensors(
                f"{folder}/task{t:02d}_run{r}.safetensors",
                {"conv1.weight": 0.3 * torch.randn(16, 3, 3, 3)},
                dict(task=t, run=r),
            )
    return load_modelset(folder)


def deep_models(folder, tasks=10, models=8):
    for t in range(tasks):
        for r in range(models):
            save_tensors(
                f"{folder}/task{t:02d}_run{r}.safetensors",
                {f"layer_{n}_{c}.weight": (2 / (9 * n)) ** 0.5 * torch.randn(n, c, 3, 3) for n, c in SIZES},
                dict(task=t, run=r),
            )
    return load_modelset(folder)


def branch_steps(epochs=2):
    """Milliseconds of a step for each size of branch, ours and plain, the smallest of the repeats, and core-minutes
    for all branches
    """
    with tempfile.TemporaryDirectory() as folder:
        models, rows, total = deep_models(folder), {}, {"ours": 0, "plain": 0}
        for (n, c), branches in SIZES.items():
            layer, times, nets = f"layer_{n}_{c}", {"ours": [], "plain": []}, {}
            models.stack(layer)
            for _ in range(REPEATS):
                for who in times:
                    how = fit if who == "ours" else plain_fit
                    t, nets[who] = seconds(how, models, layers=(layer,), epochs=epochs, stem="layer_16_3")
                    times[who].append(t/(epochs*len(models)))
            assert all(
                torch.equal(p, q) for p, q in zip(nets["ours"].parameters(), nets["plain"].parameters())
            ), "the two disagree"
            rows[f"{n}x{c}"] = {who: round(1000*min(t), 3) for who, t in times.items()}
            for who, t in times.items(): total[who] += branches*min(t)*len(models)*300/60
    return dict(
        milliseconds_a_step=rows,
        core_minutes_for_19_branches_of_80_models_300_epochs={who: round(t, 1) for who, t in total.items()},
    )


def plain_fit(models, layers=("conv1",), epochs=100, milestones=(40, 80), stem="conv1"):
    "Fit with torch's optimiser and schedule"
    weights, (tasks, targets) = models.weights(layers), models.labels.unique(return_inverse=True)
    shapes = {layer: weight.shape[1:] for layer, weight in weights.items()}
    with seeded(0): net = SecondOrderNet(NetConfig(shapes=shapes, tasks=tasks.tolist(), stem=stem))
    opt = torch.optim.SGD(net.parameters(), 1e-3, momentum=.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.1**sum(epoch >= m for m in milestones))
    g = torch.Generator().manual_seed(0)
    with one_thread():
        for _ in range(epochs):
            for i in torch.randperm(len(targets), generator=g).split(1):
                loss = net.loss(net(*[weight[i] for weight in weights.values()]), targets[i])
                opt.zero_grad()
                loss.backward()
                opt.step()
            schedule.step()
    return net


def seconds(how, models, **kwargs):
    start = time.perf_counter()
    net = how(models, milestones=(40, 80), **kwargs)
    return time.perf_counter() - start, net


def main():
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        models = random_models(folder)
        models.stack("conv1")
        ours, plain = [], []
        for _ in range(REPEATS):
            ours.append(seconds(fit, models, epochs=EPOCHS)[0])
            t, a = seconds(plain_fit, models, epochs=PLAIN_EPOCHS)
            plain.append(t*EPOCHS/PLAIN_EPOCHS)
        b = seconds(fit, models, epochs=PLAIN_EPOCHS)[1]
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())), "the two disagree"
    ratios = [p/o for p, o in zip(plain, ours)]
    result = dict(
        command="python benchmarks/second_order.py",
        what=f"{TASKS*MODELS} models, {EPOCHS} epochs, minibatch 1, P = 100, 1 thread: {TASKS*MODELS*EPOCHS} steps",
        repeats=REPEATS,
        fit_seconds=dict(min=round(min(ours), 1), median=round(statistics.median(ours), 1), max=round(max(ours), 1)),
        plain_seconds_scaled=dict(
            min=round(min(plain), 1), median=round(statistics.median(plain), 1), max=round(max(plain), 1)
        ),
        times_faster=dict(
            min=round(min(ratios), 2), median=round(statistics.median(ratios), 2), max=round(max(ratios), 2)
        ),
        branches=branch_steps(),
        **provenance(),
    )
    write_json(Path(__file__).parent/"results/second_order.json", result)
    print(
        json.dumps(
            {k: result[k] for k in ("fit_seconds", "plain_seconds_scaled", "times_faster", "branches")}, indent=2
        )
    )


if __name__ == "__main__":
    main()
