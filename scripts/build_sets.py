"""Train the model sets that claims across architectures and about related tasks need:

python scripts/build_sets.py overlap mixed copies subsets [--folder FOLDER] [--images tinyimagenet32] [--resnet20 BUILD]

overlap-IMAGES: ResNet20s for all pairs of the six classes of the first three tasks.
mixed-IMAGES: a folder for each kind of network, all on the first eight tasks of a build of this seed.
copies-IMAGES: a folder for each thing that was done to some of the ResNet20s in mixed-IMAGES, which is needed first.
subsets-IMAGES: 40 tasks of ten classes, two of each of five superclasses. Two tasks share 0 to 10 classes and 0 to 5
superclasses. There is a ResNet20 for each task, and a network of another kind for each task, in a folder for each kind.

All of it can be interrupted and goes on where it was. --kinds names some kinds alone. With --resnet20, networks of
another build for the same tasks are the ResNet20s, such as those of ModelSet500 after 20 epochs.
"""
import argparse
import random
import shutil
from dataclasses import replace
from itertools import chain, combinations, product
from pathlib import Path

from lps.lineage.benchmark import write_copies
from lps.models.modelset import load_modelset
from lps.zoo.tasks import DATASETS, load_splits, pair_classes
from lps.zoo.recipe import Recipe
from lps.zoo.build import build, model_file

BRIEF = Recipe("brief", epochs=10, lr=0.1, milestones=(5, 8))
TIMM = replace(BRIEF, optimiser="adamw", weight_decay=.05, batch_size=64)
KINDS = {
    "resnet20": BRIEF,
    "half-width": replace(BRIEF, width=8),
    "plain": replace(BRIEF, architecture="plain", depth=8),
    "without-norm": replace(BRIEF, architecture="plain-without-norm", depth=8, init="fan_in", lr=0.02),
    "resnet32": replace(BRIEF, depth=32),
    "double-width": replace(BRIEF, width=32),
    "vit": replace(TIMM, architecture="vit", depth=14, width=64, lr=1e-3),
    "convnext": replace(TIMM, architecture="convnext", depth=14, width=24, lr=2e-3),
}
MIXED = [kind for kind in KINDS if kind not in ("vit", "convnext")]  # kinds of the mixed set


def build_overlap(folder: Path, images: tuple, args: argparse.Namespace):
    "All pairs of six classes: any two of these tasks share no class, or one"
    classes = sorted(chain(*pair_classes(len(images[0].classes), args.seed)[:3]))
    how = dict(seed=args.seed, workers=args.workers, tasks=list(combinations(classes, 2)))
    print(build(folder/f"overlap-{args.images}", images, BRIEF, n_models=args.n_models, **how))


def copy_resnets(folder: Path, args: argparse.Namespace):
    "The first networks for each task of another build"
    folder.mkdir(parents=True, exist_ok=True)
    for task in range(args.n_tasks):
        for run in range(args.n_models): shutil.copy2(args.resnet20/model_file(task, run), folder)


def build_mixed(folder: Path, images: tuple, args: argparse.Namespace):
    "The same tasks for each kind of network"
    for kind in args.kinds or MIXED:
        if kind == "resnet20" and args.resnet20:
            copy_resnets(folder/f"mixed-{args.images}"/kind, args)
            continue
        how = dict(n_tasks=args.n_tasks, n_models=args.n_models, seed=args.seed, workers=args.workers)
        print(kind, build(folder/f"mixed-{args.images}"/kind, images, KINDS[kind], **how))


def build_copies(folder: Path, images: tuple, args: argparse.Namespace):
    "Copies of the first ResNet20 of each of the first tasks; all ResNet20s of the mixed set stand beside them"
    models = load_modelset(folder/f"mixed-{args.images}"/"resnet20")
    first = models[((models.manifest.run == 0) & (models.manifest.task < args.n_copied)).to_numpy()]
    write_copies(folder/f"copies-{args.images}", first, images, BRIEF, args.seed)


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
    kinds = [kind for kind in KINDS if kind != "double-width"]
    others = [kind for kind in kinds if kind != "resnet20"]
    chosen = [kind for kind in args.kinds or kinds if kind in kinds]
    for n_tasks, kind in product((2, None), chosen):
        own = tasks if kind == "resnet20" else tasks[others.index(kind)::len(others)]
        recipe = replace(KINDS[kind], epochs=args.epochs) if args.epochs else KINDS[kind]
        how = dict(tasks=own, n_tasks=n_tasks, n_models=1, seed=args.seed, workers=args.workers)
        print(kind, build(folder/f"subsets-{args.images}"/kind, images, recipe, **how))


SETS = dict(overlap=build_overlap, mixed=build_mixed, copies=build_copies, subsets=build_subsets)


def read_arguments() -> argparse.Namespace:
    "The command line"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("sets", nargs="+", choices=SETS, help="what to build")
    add("--folder", type=Path, default=Path("~/.cache/lps/zoos"), help="where the sets go")
    add("--images", default="tinyimagenet32", help="a data set with 16 classes or more, by name")
    add("--kinds", nargs="+", choices=KINDS, metavar="KIND", help=f"some of {', '.join(KINDS)}")
    add("--resnet20", type=Path, help="folder of trained ResNet20s for the same tasks, one file each")
    add("--n-models", type=int, default=2, help="networks for each task, and for each kind")
    add("--n-tasks", type=int, default=8, help="tasks of the mixed set")
    add("--n-copied", type=int, default=4, help="networks that are copied")
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
