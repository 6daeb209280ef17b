"""Draw the front page's picture from the result file of Table 1: python scripts/picture.py"""
import hashlib
import json
from pathlib import Path

import matplotlib
import torch

matplotlib.use("agg")  # before lps.study.plots imports pyplot

from lps.study.plots import plot_similarity
from lps.second_order import similarity

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT/"results/table1-bundled.json"
PICTURE = ROOT/"nbs/images/similarity.png"


def fingerprint() -> str:
    "Of what the picture shows: it changes when the embeddings in the result file do"
    unseen = json.loads(RESULT.read_text(encoding="utf-8"))["unseen"]
    return hashlib.sha256(json.dumps(unseen, sort_keys=True).encode()).hexdigest()


def draw():
    "Write the picture, with the fingerprint of its data in its metadata"
    unseen = json.loads(RESULT.read_text(encoding="utf-8"))["unseen"]
    names = {int(task): name for task, name in unseen["names"].items()}
    title = f"TinyImageNet32: {len(unseen['tasks'])} networks that LPS has not seen, by their first layer"
    ax = plot_similarity(similarity(torch.tensor(unseen["embedding"])), unseen["tasks"], names, title)
    ax.figure.savefig(
        PICTURE, dpi=110, bbox_inches="tight", metadata={"Source": RESULT.name, "Fingerprint": fingerprint()}
    )


if __name__ == "__main__": draw()
