"""Train the model sets that claims about related tasks need:

python scripts/build_sets.py overlap subsets [--folder FOLDER] [--images cifar100]

overlap-IMAGES: ResNet20s for all pairs of the six classes of the first three tasks.
subsets-IMAGES: 40 tasks of ten classes, two of each of five superclasses. Two tasks share 0 to 10 classes and 0 to 5
superclasses. There is a ResNet20 for each task, and a network of another kind for each task, in a folder for each kind.

All of it can be interrupted and goes on where it was. --kinds names some kinds alone.
"""
import argparse
import random
from dataclasses import replace
from itertools import chain, combinations, product
from pathlib import Path

from lps.zoo.tasks import DATASETS, load_splits, pair_classes
from lps.zoo.recipe import Recipe
from lps.zoo.build import build

BRIEF = Recipe("brief", epochs=10, lr=0.1, milestones=(5, 8))
TIMM = replace(BRIEF, optimiser="adamw", weight_decay=.05, batch_size=64)
KINDS = {
    "resnet20": BRIEF,
    "half-width": replace(BRIEF, width=8),
    "plain": replace(BRIEF, architecture="plain", depth=8),
    "without-norm": replace(BRIEF, architecture="plain-without-norm", depth=8, init="fan_in", lr=0.02),
    "resnet32": replace(BRIEF, depth=32),
    "vit": replace(TIMM, architecture="vit", depth=14, width=64, lr=1e-3),
    "convnext": replace(TIMM, architecture="convnext", depth=14, width=24, lr=2e-3),
}


def build_overlap(folder: Path, images: tuple, args: argparse.Namespace):
    "All pairs of six classes: any two of these tasks share no class, or one"
    classes = sorted(chain(*pair_classes(len(images[0].classes), args.seed)[:3]))
    how = dict(seed=args.seed, workers=args.workers, tasks=list(combinations(classes, 2)))
    print(build(folder/f"overlap-{args.images}", images, BRIEF, n_models=args.n_models, **how))


def draw_subset(members: dict, parent: list, draw: random.Random) -> list:
    "Two classes of each of five superclasses; some superclasses and classes are those of an earlier subset"
    old = sorted({group for group, classes in members.items() if set(classes) & set(parent)})
    kept = draw.sample(old, draw.randint(0, len(old)))
    groups = kept + draw.sample(sorted(set(members) - set(old)), 5 - len(kept))
    chosen = []
    for group in groups:
        same = [name for name in members[group] if name in parent][:draw.randint(0, 2)]
        others = sorted(set(members[group]) - set(same))
        chosen += same + draw.sample(others, 2 - len(same))
    return chosen


def draw_subsets(superclasses: dict, n: int, seed: int) -> list:
    "Tasks of ten classes by name, each different"
    draw = random.Random(seed)
    members = {}
    for name, group in superclasses.items(): members.setdefault(group, []).append(name)
    subsets = {}
    while len(subsets) < n:
        parent = draw.choice(list(subsets.values())) if subsets else []
        subset = draw_subset(members, parent, draw)
        subsets.setdefault(frozenset(subset), subset)
    return list(subsets.values())


def build_subsets(folder: Path, images: tuple, args: argparse.Namespace):
    "A ResNet20 for each task, and the other kinds in turn; the first two of each kind are trained first"
    number = {name: i for i, name in enumerate(images[0].classes)}
    subsets = draw_subsets(DATASETS[args.images].superclasses, args.n_subsets, args.seed)
    tasks = [[number[name] for name in subset] for subset in subsets]
    others = [kind for kind in KINDS if kind != "resnet20"]
    for n_tasks, kind in product((2, None), args.kinds or KINDS):
        own = tasks if kind == "resnet20" else tasks[others.index(kind)::len(others)]
        recipe = replace(KINDS[kind], epochs=args.epochs) if args.epochs else KINDS[kind]
        how = dict(tasks=own, n_tasks=n_tasks, n_models=1, seed=args.seed, workers=args.workers)
        print(kind, build(folder/f"subsets-{args.images}"/kind, images, recipe, **how))


SETS = dict(overlap=build_overlap, subsets=build_subsets)


def read_arguments() -> argparse.Namespace:
    "The command line"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("sets", nargs="+", choices=SETS, help="what to build")
    add("--folder", type=Path, default=Path("~/.cache/lps/zoos"), help="where the sets go")
    add("--images", default="cifar100", help="a data set with superclasses, by name")
    add("--kinds", nargs="+", choices=KINDS, metavar="KIND", help=f"some of {', '.join(KINDS)}")
    add("--n-models", type=int, default=2, help="networks for each task, and for each kind")
    add("--n-subsets", type=int, default=40, help="tasks of the class-subset set")
    add("--epochs", type=int, help="of the class-subset set, for a trial")
    add("--seed", type=int, default=0, help="decides pairs and networks")
    add("--workers", type=int, default=2, help="processes")
    return parser.parse_args()


def main():
    args = read_arguments()
    images = load_splits(args.images)
    for name in args.sets: SETS[name](args.folder.expanduser(), images, args)


if __name__ == "__main__": main()
