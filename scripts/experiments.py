"""Run every experiment on one model set, one notebook after the other, and say how long each took:

python scripts/experiments.py [--model-set FOLDER --images FOLDER | --model-set bundled] [--only branches fusion] [--set n_splits=3 branches.n_splits=1]

Without a folder all of them run on a zoo of digits, which they build. Result files go to results/, the notebooks in the repository stay as they are;
with a result file of the same models and settings, most notebooks take that instead of fitting again: --results FOLDER starts afresh."""
import argparse
import contextlib
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import papermill as pm

from lps.files import provenance, write_json

EXPERIMENTS = Path(__file__).resolve().parent.parent/"nbs/experiments"
ORDER = "table1", "table2", "learning_curve", "triplet", "branches", "alignment", "fusion", "transfer"  # alignment and fusion take what branches has left
OF_FIRST_LAYERS = "table1", "table2", "learning_curve", "triplet"  # all that the bundled model set has


def number(text: str) -> int | float | bool | str:
    "A parameter as Python would read it"
    if text in ("True", "False"): return text == "True"
    for kind in (int, float):
        with contextlib.suppress(ValueError): return kind(text)
    return text


def parameters(name: str, common: dict, settings: list[str]) -> dict:
    "Of all that is asked for, what this notebook declares"
    declared, out = pm.inspect_notebook(EXPERIMENTS/f"{name}.ipynb"), dict(common)
    for key, value in (s.split("=", 1) for s in settings):
        of, _, parameter = key.rpartition(".")
        if of and of != name: continue
        out[parameter] = number(value)
    return {k: v for k, v in out.items() if k in declared}


def known(settings: list[str]):
    "Each setting is a parameter of one notebook at least"
    declared = {name: set(pm.inspect_notebook(EXPERIMENTS/f"{name}.ipynb")) for name in ORDER}
    for s in settings:
        of, _, parameter = s.split("=", 1)[0].rpartition(".")
        if "=" not in s or (of and of not in declared) or not any(parameter in d for d in ([declared[of]] if of else declared.values())):
            sys.exit(f"--set {s}: give parameter=value or experiment.parameter=value, with a parameter that an experiment has")


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


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-set", default="digits", help="folder of a model set, or bundled; default: digits, built here")
    parser.add_argument("--images", help="the images of its tasks, by name or folder: needed for transfer, which is left out without them")
    parser.add_argument("--class-names", type=Path, help="table of classes, where images and models name them differently")
    parser.add_argument("--results", type=Path, default=EXPERIMENTS.parent.parent/"results", help="folder for the result files")
    parser.add_argument("--only", nargs="+", choices=ORDER, default=ORDER, metavar="EXPERIMENT", help=f"some of {', '.join(ORDER)}")
    parser.add_argument("--set", nargs="+", default=[], metavar="PARAMETER=VALUE", help="parameters of the notebooks; experiment.parameter=value for one of them")
    parser.add_argument("--times", type=Path, help="file to write the times to, .json")
    args = parser.parse_args(argv)
    known(args.set)
    named = args.model_set in ("bundled", "digits")
    if not named and not Path(args.model_set).is_dir(): sys.exit(f"{args.model_set} is not a folder: give one with trained models, bundled or digits")
    common = dict(results=str(args.results.resolve()), model_set=args.model_set if named else str(Path(args.model_set).resolve()))
    if args.images: common["images"] = str(Path(args.images).resolve()) if Path(args.images).exists() else args.images
    if args.class_names: common["class_names"] = str(args.class_names.resolve())
    possible = OF_FIRST_LAYERS if args.model_set == "bundled" else ORDER if args.images or args.model_set == "digits" else ORDER[:-1]
    chosen = [n for n in possible if n in args.only]
    if left := [n for n in ORDER if n in args.only and n not in possible]: print(f"{', '.join(left)}: left out, for lack of {'deeper layers' if args.model_set == 'bundled' else '--images'}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the fits go side by side, one core each
    rows = {}
    with tempfile.TemporaryDirectory() as tmp:
        for name in chosen:
            start, cpu = time.perf_counter(), cpu_seconds()
            pm.execute_notebook(EXPERIMENTS/f"{name}.ipynb", f"{tmp}/{name}.ipynb", parameters(name, common, args.set), cwd=EXPERIMENTS, kernel_name="python3", progress_bar=False)
            rows[name] = dict(minutes=round((time.perf_counter() - start)/60, 2), core_minutes=round((cpu_seconds() - cpu)/60, 2))
            show(name, rows[name])
    rows["all"] = {k: round(sum(r[k] for r in rows.values()), 2) for k in ("minutes", "core_minutes")}
    show("all", rows["all"])
    if args.times: write_json(args.times, dict(command=" ".join(["python scripts/experiments.py", *without_folders(argv or sys.argv[1:])]), times=rows, load=os.getloadavg()[0], **provenance()))


if __name__ == "__main__": main()
