"""Draw the front page's picture from result files: python scripts/picture.py"""
import hashlib
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

from lps.second_order import similarity
from lps.study.figures import COLOURS, plot_similarity
from lps.study.imagenet import ImagenetRecord
from lps.study.table1 import TableRecord

matplotlib.use("agg")

ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT/"results/table1-modelset500-epoch20.json"
CLASSES = ROOT/"results/imagenet-1k.json"
PICTURE = ROOT/"nbs/images/front.png"


def fingerprint() -> str:
    "Return the SHA-256 of the result files"
    return hashlib.sha256(TASKS.read_bytes() + CLASSES.read_bytes()).hexdigest()


N_TASKS = 10  # of those in the result file, the first


def draw_tasks(ax):
    "Draw the similarities of networks that LPS was not fitted on, ordered by task"
    unseen = TableRecord.read(TASKS).unseen
    shown = sorted(set(unseen.tasks))[:N_TASKS]
    kept = [i for i, task in enumerate(unseen.tasks) if task in shown]
    sim = similarity(torch.tensor(unseen.embedding)[kept])
    title = f"{len(kept)} networks of {len(shown)} tasks, by their first layer"
    plot_similarity(sim, [unseen.tasks[i] for i in kept], None, title, ax)
    ax.set(xticks=[], yticks=[], xlabel="network, ordered by task", ylabel="network, ordered by task")


def draw_classes(ax):
    "Draw the share of classes that two networks match, by the number of synthetic images"
    record = ImagenetRecord.read(CLASSES)
    pair = next(iter(record.pairs))
    counts = [*map(int, record.curve), record.settings["n_images"]]
    found = [of_pairs[pair] for of_pairs in record.curve.values()] + [record.pairs[pair]]
    looks = {"one to one": "o-", "nearest": "s--"}
    for colour, (name, look) in zip(COLOURS, looks.items()):
        ax.plot(counts, [entry[name][0] for entry in found], look, color=colour, label=name)
    ax.axhline(record.chance, color="0.45", ls=":", label=f"chance, {record.chance:.1f} %")
    ax.set_xscale("log", base=2)
    ax.set(xlabel="synthetic images", ylabel="classes matched, %", ylim=(-2, 102))
    ax.grid(alpha=.25)
    ax.legend(frameon=False)
    n_classes = round(100/record.chance)
    ax.set_title(f"{n_classes:,} classes of two ImageNet networks, without data", fontsize=11)


def draw():
    "Write the picture, with the fingerprint of its data in its metadata"
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    draw_tasks(left)
    draw_classes(right)
    about = {"Source": f"{TASKS.name}, {CLASSES.name}", "Fingerprint": fingerprint()}
    fig.savefig(PICTURE, dpi=110, bbox_inches="tight", metadata=about)


if __name__ == "__main__": draw()
