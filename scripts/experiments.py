"""Run every experiment on one model set, one notebook after the other, and say how long each took:

python scripts/experiments.py [--model-set FOLDER --images FOLDER | --model-set bundled] [--only branches fusion]
                              [--set n_splits=3 branches.n_splits=1]

Without a folder all of them run on a zoo of digits, which they build. Result files go to results/, the notebooks in the
repository stay as they are. A result of the same models, settings and sources is taken as it is; what is stale is
computed again. --results FOLDER starts afresh. Commit first, then measure: a tree with changes is refused.
"""
import argparse
import contextlib
import importlib
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import papermill as pm

from lps.study.registry import EXPERIMENTS
from lps.core.files import provenance, read_json, write_json
from lps.models.modelset import bundled_sets

ROOT = Path(__file__).resolve().parent.parent


def notebook_of(kind: str) -> Path:
    "Where an experiment's notebook is"
    return Path(EXPERIMENTS[kind].notebook or ROOT/f"nbs/experiments/{kind}.ipynb").resolve()


def declared(kind: str) -> set[str]:
    "The parameters of an experiment"
    return set(pm.inspect_notebook(notebook_of(kind)))


def number(text: str) -> int | float | bool | str:
    "A parameter as Python would read it"
    if text in ("True", "False"): return text == "True"
    for kind in (int, float):
        with contextlib.suppress(ValueError): return kind(text)
    return text


@dataclass
class Setting:
    "A parameter, of one experiment or of all that have it"
    experiment: str
    parameter: str
    value: str

    def reaches(self, kind: str) -> bool:
        return self.experiment in ("", kind) and self.parameter in declared(kind)


def read_setting(text: str) -> Setting:
    "`parameter=value` or `experiment.parameter=value`; ends the program where no experiment has it"
    key, equals, value = text.partition("=")
    experiment, _, parameter = key.rpartition(".")
    setting = Setting(experiment, parameter, value)
    if equals and any(setting.reaches(kind) for kind in EXPERIMENTS): return setting
    ways = "parameter=value or experiment.parameter=value"
    sys.exit(f"--set {text}: give {ways}, with a parameter that an experiment has")


def parameters(kind: str, common: dict, settings: list[Setting]) -> dict:
    "Of all that is asked for, what this notebook declares; its own settings win"
    names = declared(kind)
    chosen = {name: value for name, value in common.items() if name in names}
    for setting in sorted(settings, key=lambda s: bool(s.experiment)):
        if setting.reaches(kind): chosen[setting.parameter] = number(setting.value)
    return chosen


def cpu_seconds() -> float:
    "Of all processes that were started from here and have ended"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def show(name: str, took: dict):
    "A row of the table of times"
    print(f"{name:16}{took['minutes']:7.1f} min{took['core_minutes']:8.1f} core-min", flush=True)


def without_folders(argv: list[str]) -> list[str]:
    "Arguments fit to be published: of a path, its last part"
    return [Path(a).name if "/" in a else a for a in argv]


def read_arguments(argv: list[str]) -> argparse.Namespace:
    "The command line; experiments that `--load` brings can be named in `--only`"
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--load", nargs="+", default=[], metavar="MODULE",
                       help="modules that register more experiments or methods")
    for module in first.parse_known_args(argv)[0].load: importlib.import_module(module)
    kinds = list(EXPERIMENTS)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, parents=[first])
    add = parser.add_argument
    add("--model-set", default="digits", help="folder, or a set that comes with lps; default: digits, built here")
    add("--images", help="the images of its tasks, by name or folder: what needs them is left out without")
    add("--class-names", type=Path, help="table of classes, where images and models name them differently")
    add("--results", type=Path, default=ROOT/"results", help="folder for the result files")
    add("--only", nargs="+", choices=kinds, default=kinds, metavar="EXPERIMENT", help=f"some of {', '.join(kinds)}")
    add("--set", nargs="+", default=[], metavar="PARAMETER=VALUE",
        help="parameters of the notebooks; experiment.parameter=value for one of them")
    add("--times", type=Path, help="file to write the times to, .json")
    add("--uncommitted", action="store_true", help="measure with changes that are not committed; the results say so")
    return parser.parse_args(argv)


def check(args: argparse.Namespace):
    "End the program, before anything runs, for what would fail in the end"
    named = [*bundled_sets(), "digits"]
    if args.model_set not in named and not Path(args.model_set).is_dir():
        sys.exit(f"{args.model_set} is not a folder: give one with trained models, or {', '.join(named)}")
    if args.results.is_file(): sys.exit(f"--results {args.results} is a file: give a folder")
    if args.times and args.times.is_dir(): sys.exit(f"--times {args.times} is a folder: give a file to write to")
    commit = provenance()["commit"] or ""
    if commit.endswith("+changes") and not args.uncommitted:
        sys.exit("there are changes that are not committed: commit first, then measure, or say --uncommitted")


def has_kinds(folder: Path) -> bool:
    "Is there a folder of models for each of several kinds of networks?"
    return len(list(folder.glob("*/task*.safetensors"))) > 0 and not has_copies(folder)


def has_shared_classes(folder: Path) -> bool:
    "Is this a build of tasks some of which share a class?"
    if not (folder/"build.json").exists(): return False
    classes = [c for pair in read_json(folder/"build.json")["pairs"] for c in pair]
    return len(set(classes)) < len(classes)


def has_copies(folder: Path) -> bool:
    "Are these copies of networks?"
    return (folder/"original").is_dir()


FOLDERS = {"several kinds": has_kinds, "shared classes": has_shared_classes, "copies": has_copies}


def missing(kind: str, args: argparse.Namespace) -> list[str]:
    "What an experiment needs and the model set does not come with"
    stems_alone = args.model_set in bundled_sets()
    at_hand = {"all layers": not stems_alone, "images": bool(args.images) or args.model_set == "digits"}
    at_hand |= {need: args.model_set == "digits" or there(Path(args.model_set)) for need, there in FOLDERS.items()}
    return [need for need in EXPERIMENTS[kind].needs if not at_hand[need]]


def chosen(args: argparse.Namespace) -> list[str]:
    "The experiments to run, those left out are named"
    kinds = []
    for kind in EXPERIMENTS:
        if kind not in args.only: continue
        lacks = missing(kind, args)
        if lacks: print(f"{kind}: left out, for lack of {' and '.join(lacks)}")
        else: kinds.append(kind)
    return kinds


def common_parameters(args: argparse.Namespace) -> dict:
    "What the command line says to all notebooks"
    named = args.model_set in [*bundled_sets(), "digits"]
    common = dict(results=str(args.results.resolve()))
    common["model_set"] = args.model_set if named else str(Path(args.model_set).resolve())
    if args.images: common["images"] = str(Path(args.images).resolve()) if Path(args.images).exists() else args.images
    if args.class_names: common["class_names"] = str(args.class_names.resolve())
    return common


def run(kind: str, values: dict) -> dict:
    "Run one notebook; returns what it took"
    start, cpu = time.perf_counter(), cpu_seconds()
    notebook = notebook_of(kind)
    with tempfile.TemporaryDirectory() as tmp:
        pm.execute_notebook(
            notebook,
            f"{tmp}/{kind}.ipynb",
            parameters=values,
            cwd=notebook.parent,
            kernel_name="python3",
            progress_bar=False,
        )
    minutes, core_minutes = (time.perf_counter() - start)/60, (cpu_seconds() - cpu)/60
    return dict(minutes=round(minutes, 2), core_minutes=round(core_minutes, 2))


def main(argv: list[str] | None = None):
    argv = [str(a) for a in (sys.argv[1:] if argv is None else argv)]
    args = read_arguments(argv)
    settings = [read_setting(text) for text in args.set]
    check(args)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the fits go side by side, one core each
    common, rows = common_parameters(args), {}
    for kind in chosen(args):
        rows[kind] = run(kind, parameters(kind, common, settings))
        show(kind, rows[kind])
    total = {k: round(sum(row[k] for row in rows.values()), 2) for k in ("minutes", "core_minutes")}
    rows["all"] = total
    show("all", total)
    command = " ".join(["python scripts/experiments.py", *without_folders(argv)])
    if args.times: write_json(args.times, dict(command=command, times=rows, load=os.getloadavg()[0], **provenance()))


if __name__ == "__main__": main()
