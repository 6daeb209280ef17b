"""Draw the picture of class matching from its result file: python scripts/class_picture.py"""
import hashlib
from pathlib import Path

import matplotlib

from lps.study.imagenet import ImagenetRecord, plot_imagenet

matplotlib.use("agg")

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT/"results/imagenet-1k.json"
PICTURE = ROOT/"nbs/images/classes.png"


def fingerprint() -> str:
    "Return the SHA-256 of the result file"
    return hashlib.sha256(RESULT.read_bytes()).hexdigest()


def draw():
    "Write the picture, with the fingerprint of its data in its metadata"
    fig = plot_imagenet(ImagenetRecord.read(RESULT))
    fig.suptitle("Classes of ImageNet networks that find each other, by synthetic images alone", fontsize=10)
    about = {"Source": RESULT.name, "Fingerprint": fingerprint()}
    fig.savefig(PICTURE, dpi=110, bbox_inches="tight", metadata=about)


if __name__ == "__main__": draw()
