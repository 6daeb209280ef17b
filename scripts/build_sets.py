"""Train the model sets that claims across architectures and about related tasks need:

python scripts/build_sets.py overlap mixed copies [--folder FOLDER] [--images tinyimagenet32] [--workers 2]

overlap-IMAGES: all pairs of the six classes of the first three tasks, four ResNet20s each.
mixed-IMAGES: a folder for each kind of network, two networks each on the first eight tasks of a build of this seed.
copies-IMAGES: a folder for each thing that was done to some of the ResNet20s in mixed-IMAGES, which is needed first.

All of it can be interrupted and goes on where it was. --kinds names some of the kinds alone.
"""
import argparse
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path

from lps.tasks import load_images, pair_classes
from lps.train import Recipe
from lps.zoo import build

BRIEF = Recipe("brief", epochs=20, lr=0.1, milestones=(10, 15))
BRIEFER = replace(BRIEF, name="briefer", epochs=10, milestones=(5, 8))
KINDS = {
    "resnet20": BRIEF,
    "half-width": replace(BRIEF, width=8),
    "plain": replace(BRIEF, architecture="plain", depth=8),
    "without-norm": replace(BRIEF, architecture="plain-without-norm", depth=8, init="fan_in", lr=0.02),
    "resnet32": replace(BRIEF, depth=32),
    "double-width": replace(BRIEF, width=32),
}


def build_overlap(folder: Path, images: tuple, args: argparse.Namespace):
    "All pairs of six classes: any two of these tasks share no class, or one"
    classes = sorted(chain(*pair_classes(len(images[0].classes), args.seed)[:3]))
    how = dict(seed=args.seed, workers=args.workers, pairs=list(combinations(classes, 2)))
    print(build(folder/f"overlap-{args.images}", images, BRIEFER, n_models=4, **how))


def build_mixed(folder: Path, images: tuple, args: argparse.Namespace):
    "The same tasks for each kind of network"
    for kind in args.kinds:
        how = dict(n_tasks=args.n_tasks, n_models=2, seed=args.seed, workers=args.workers)
        print(kind, build(folder/f"mixed-{args.images}"/kind, images, KINDS[kind], **how))


SETS = dict(overlap=build_overlap, mixed=build_mixed)


def read_arguments() -> argparse.Namespace:
    "The command line"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("sets", nargs="+", choices=SETS, help="what to build")
    add("--folder", type=Path, default=Path("~/.cache/lps/zoos"), help="where the sets go")
    add("--images", default="tinyimagenet32", help="a data set with 16 classes or more, by name")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=f"some of {', '.join(KINDS)}")
    add("--n-tasks", type=int, default=8, help="tasks of the mixed set")
    add("--seed", type=int, default=0, help="decides pairs and networks")
    add("--workers", type=int, default=2, help="processes")
    return parser.parse_args()


def main():
    args = read_arguments()
    images = load_images(args.images, "train"), load_images(args.images, "test")
    for name in args.sets: SETS[name](args.folder.expanduser(), images, args)


if __name__ == "__main__": main()
