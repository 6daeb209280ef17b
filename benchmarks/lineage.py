"""Time the comparison of two models on one core: python benchmarks/lineage.py [--repeat N] [--out FILE]

Each architecture has random weights. Its counterparts are an independent network, the network with noise, the network
in another order of channels, and a merge that contains a quarter of it, in its order and in another. Times are of the
processor, not of the wall.
"""
import argparse
import json
import statistics
import time
from pathlib import Path

import timm
import torch

from lps.core.files import provenance
from lps.core.jobs import one_thread
from lps.lineage.benchmark import merged, noisy
from lps.lineage.compare import channel_groups, compare, parts_of
from lps.models.model import Model
from lps.nets.resnet import ResNet

MAKERS = {"ResNet20": lambda: ResNet(20), "ResNet50": lambda: timm.create_model("resnet50")}


def state_of(make, seed):
    torch.manual_seed(seed)
    state = make().state_dict()
    return {name: v.uniform_(.5, 1.5) if v.ndim == 1 else v for name, v in state.items()}


def reordered(state, seed=0):
    "Permute the channels of a ResNet; the groups are those that the comparison guesses"
    parts = parts_of(state)
    rows, columns, _ = channel_groups(parts)
    g = torch.Generator().manual_seed(seed)
    orders = {}
    for part, group in zip(parts, rows):
        if group is None or group < 0 or part.role == "vector": continue
        if group not in orders: orders[group] = torch.randperm(len(part.weight), generator=g)
    groups = {part.name: (row, column) for part, row, column in zip(parts, rows, columns) if part.role != "vector"}
    found = {}
    current = None
    for name, v in state.items():
        if name in groups:
            current, column = groups[name]
            if column in orders: v = v[:, orders[column]]
        if current in orders and v.ndim: v = v[orders[current]]
        found[name] = v
    return found


def pairs_of(make):
    "Return a network and its counterparts by name"
    a = state_of(make, 0)
    other = state_of(make, 1)
    merge = merged(a, other, .25)
    others = {
        "independent": other,
        "noise of 30 %": noisy(a, .3),
        "another order": reordered(a),
        "merge of 25 %": merge,
        "merge of 25 % in another order": reordered(merge),
    }
    return Model(a), {name: Model(state) for name, state in others.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="comparisons of each pair")
    parser.add_argument("--out", type=Path, help="file for the result, JSON")
    args = parser.parse_args()
    results = {}
    with one_thread():
        for name, make in MAKERS.items():
            a, others = pairs_of(make)
            for other, b in others.items():
                times = []
                for _ in range(args.repeat):
                    start = time.process_time()
                    found = compare(a, b)
                    times.append(time.process_time() - start)
                results[f"{name}, {other}"] = dict(
                    verdict=found.verdict,
                    median=round(statistics.median(times), 3),
                    least=round(min(times), 3),
                    most=round(max(times), 3),
                )
                print(f"{name}, {other}:", results[f"{name}, {other}"], flush=True)
    if args.out: args.out.write_text(json.dumps(dict(seconds=results) | provenance(), indent=2) + "\n")


if __name__ == "__main__": main()
