"""Run every experiment on one model set, one notebook after the other, and print how long each took:

python scripts/experiments.py [--model-set FOLDER --images FOLDER | --model-set bundled] [--only branches fusion]
                              [--set n_splits=3 branches.n_splits=1]

Without a folder, all of them run on networks for digits, which they train. Result files are written to results/; the
notebooks in the repository do not change. A result of the same models, settings and sources is reused; outdated results
are computed again. --results FOLDER starts afresh. Commit before you measure: a tree with changes is refused.
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
from lps.core.files import provenance, write_json
from lps.models.modelset import bundled_sets

ROOT = Path(__file__).resolve().parent.parent


def notebook_of(kind: str) -> Path:
    "Return the path of an experiment's notebook"
    return Path(EXPERIMENTS[kind].notebook or ROOT/f"nbs/experiments/{kind}.ipynb").resolve()


def declared(kind: str) -> set[str]:
    "Return the parameters of an experiment"
    return set(pm.inspect_notebook(notebook_of(kind)))


def number(text: str) -> int | float | bool | str:
    "Parse a parameter as Python would"
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
    "Parse `parameter=value` or `experiment.parameter=value`; exit if no experiment has it"
    key, equals, value = text.partition("=")
    experiment, _, parameter = key.rpartition(".")
    setting = Setting(experiment, parameter, value)
    if equals and any(setting.reaches(kind) for kind in EXPERIMENTS): return setting
    ways = "parameter=value or experiment.parameter=value"
    sys.exit(f"--set {text}: use {ways}, with a parameter of an experiment")


def parameters(kind: str, common: dict, settings: list[Setting]) -> dict:
    "Return the requested parameters that this notebook declares; its own settings win"
    names = declared(kind)
    chosen = {name: value for name, value in common.items() if name in names}
    for setting in sorted(settings, key=lambda s: bool(s.experiment)):
        if setting.reaches(kind): chosen[setting.parameter] = number(setting.value)
    return chosen


def cpu_seconds() -> float:
    "Return the CPU time of finished child processes"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def show(name: str, took: dict):
    "Print a row of the table of times"
    print(f"{name:16}{took['minutes']:7.1f} min{took['core_minutes']:8.1f} core-min", flush=True)


def without_folders(argv: list[str]) -> list[str]:
    "Replace paths by their last part"
    return [Path(a).name if "/" in a else a for a in argv]


def read_arguments(argv: list[str]) -> argparse.Namespace:
    "Parse the command line; `--only` accepts experiments that `--load` registers"
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--load", nargs="+", default=[], metavar="MODULE",
                       help="modules that register more experiments or methods")
    for module in first.parse_known_args(argv)[0].load: importlib.import_module(module)
    kinds = list(EXPERIMENTS)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, parents=[first])
    add = parser.add_argument
    add("--model-set", default="digits", help="folder, or a set that comes with lps; default: digits, built here")
    add("--images", help="images of its tasks, by name or folder; without them, experiments that need them are skipped")
    add("--class-names", type=Path, help="table of class names, if images and models name classes differently")
    add("--results", type=Path, default=ROOT/"results", help="folder for the result files")
    add("--only", nargs="+", choices=kinds, default=kinds, metavar="EXPERIMENT",
        help=f"experiments to run: {', '.join(kinds)}")
    add("--set", nargs="+", default=[], metavar="PARAMETER=VALUE",
        help="parameters of the notebooks; experiment.parameter=value for one of them")
    add("--times", type=Path, help="file to write the times to, .json")
    add("--uncommitted", action="store_true", help="measure with uncommitted changes; results are marked")
    return parser.parse_args(argv)


def check(args: argparse.Namespace):
    "Exit before anything runs if something would fail at the end"
    named = [*bundled_sets(), "digits"]
    if args.model_set not in named and not Path(args.model_set).is_dir():
        sys.exit(f"{args.model_set} is not a folder: pass one with trained models, or {', '.join(named)}")
    if args.results.is_file(): sys.exit(f"--results {args.results} is a file: pass a folder")
    if args.times and args.times.is_dir(): sys.exit(f"--times {args.times} is a folder: pass a file to write to")
    commit = provenance()["commit"] or ""
    if commit.endswith("+changes") and not args.uncommitted:
        sys.exit("there are uncommitted changes: commit before you measure, or pass --uncommitted")


def missing(kind: str, args: argparse.Namespace) -> list[str]:
    "Return what an experiment needs and the model set lacks; models and images of digits fit all experiments"
    if args.model_set == "digits": return []
    return [need for need, met in EXPERIMENTS[kind].needs.items() if not met(args.model_set, args.images)]


def chosen(args: argparse.Namespace) -> list[str]:
    "Return the experiments to run, and name those that are skipped"
    kinds = []
    for kind in EXPERIMENTS:
        if kind not in args.only: continue
        lacks = missing(kind, args)
        if lacks: print(f"{kind}: skipped, it needs {' and '.join(lacks)}")
        else: kinds.append(kind)
    return kinds


def common_parameters(args: argparse.Namespace) -> dict:
    "Return the parameters for all notebooks"
    named = args.model_set in [*bundled_sets(), "digits"]
    common = dict(results=str(args.results.resolve()))
    common["model_set"] = args.model_set if named else str(Path(args.model_set).resolve())
    if args.images: common["images"] = str(Path(args.images).resolve()) if Path(args.images).exists() else args.images
    if args.class_names: common["class_names"] = str(args.class_names.resolve())
    return common


def run(kind: str, values: dict) -> dict:
    "Run one notebook and return its times"
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
