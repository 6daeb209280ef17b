"""Write the table of networks that are recognised by their tensors: python scripts/architectures.py [FILE]"""
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import timm
import torchvision
from fastprogress import progress_bar

from lps.nets.known import describe_network

ROOT = Path(__file__).resolve().parents[1]


def names() -> list[str]:
    "Return the networks of the installed packages"
    of_timm = [f"timm/{name}" for name in timm.list_models()]
    of_torchvision = [f"torchvision/{name}" for name in torchvision.models.list_models(torchvision.models)]
    return of_torchvision + of_timm


def main(path: Path):
    "Describe every network that can be built on the meta device"
    rows = []
    failed = []
    for arch in progress_bar(names()):
        try: rows.append("\t".join(describe_network(arch)))
        except Exception as e: failed.append(f"{arch}: {type(e).__name__}")
    versions = ", ".join(f"{package} {version(package)}" for package in ("timm", "torchvision"))
    header = f"# {len(rows)} networks of {versions}; scripts/architectures.py writes this table"
    path.write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    print(f"{path}: {len(rows)} networks, {len(failed)} could not be built: {', '.join(failed)}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT/"lps"/"data"/"architectures.tsv")
