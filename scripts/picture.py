"""Draw the front page's picture from the result file of Table 1: python scripts/picture.py"""
import hashlib
import json
from pathlib import Path

import matplotlib
import torch

from lps.second_order import similarity
from lps.study.figures import plot_similarity
from lps.study.table1 import TableRecord

matplotlib.use("agg")

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT/"results/table1-bundled.json"
PICTURE = ROOT/"nbs/images/similarity.png"


def fingerprint() -> str:
    "Compute a hash of the embeddings that the picture shows"
    unseen = json.loads(RESULT.read_text(encoding="utf-8"))["unseen"]
    return hashlib.sha256(json.dumps(unseen, sort_keys=True).encode()).hexdigest()


def draw():
    "Write the picture, with the fingerprint of its data in its metadata"
    unseen = TableRecord.read(RESULT).unseen
    names = {int(task): name for task, name in unseen.names.items()}
    title = f"TinyImageNet32: {len(unseen.tasks)} networks that LPS was not fitted on, by their first layer"
    ax = plot_similarity(similarity(torch.tensor(unseen.embedding)), unseen.tasks, names, title)
    ax.figure.savefig(
        PICTURE, dpi=110, bbox_inches="tight", metadata={"Source": RESULT.name, "Fingerprint": fingerprint()}
    )


if __name__ == "__main__": draw()
