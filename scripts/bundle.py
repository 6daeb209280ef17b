"""Make the model set that comes with the package from packed networks:

python scripts/bundle.py data/modelset500-cifar100/epoch80.safetensors [--out lps/data]

It writes `modelset500.safetensors`, the first layers; `observed/modelset500.safetensors`, what two methods observe of
the whole networks; `classes-modelset500.safetensors`, class descriptors; `net.safetensors`, an LPS that was fitted on
four fifths of the networks; `index.zip`, an index of all networks by it; and the datasheet. Only runs that all
tasks have are taken. The fit takes some minutes.
"""
import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from lps.core.files import load_tensors, save_tensors
from lps.index.index import BUNDLED_INDEX, ModelIndex
from lps.methods.registry import fit_method, load_fitted, save_fitted
from lps.models.modelset import ModelSet, load_modelset, pack
from lps.study.sets import count_train
from lps.study.splits import classification_splits
from lps.zoo.datasheet import datasheet, write_datasheet

DATA = Path(__file__).resolve().parent.parent/"lps/data"
LIMIT = 7_000_000  # bytes, of all files together
MODELS = "modelset500.safetensors"
NET = "net.safetensors"
OBSERVED = f"observed/{MODELS}"
CLASSES = f"classes-{MODELS}"
FILES = MODELS, OBSERVED, CLASSES, NET, BUNDLED_INDEX, "DATASHEET.md", "datasheet.json"


def complete_runs(models: ModelSet) -> ModelSet:
    "Select the networks of the runs that all tasks have. Exits if there are fewer than three, too few to fit on"
    counts = models.manifest.groupby("run").task.nunique()
    runs = counts.index[counts == len(models.tasks)]
    if len(runs) < 3: sys.exit(f"{models.path}: all tasks have {len(runs)} runs in common, expected at least 3")
    return models[models.manifest.run.isin(runs).to_numpy()]


def add_observed(path: Path, source: Path, models: ModelSet):
    "Copy the observations of these networks"
    tensors, meta = load_tensors(source)
    about = meta["observed"]
    place = {file: i for i, file in enumerate(about["files"])}
    rows = [place[file] for file in models.manifest.file]
    for name in ("files", "digests"): about[name] = [about[name][i] for i in rows]
    save_tensors(path, {name: v[rows].contiguous() for name, v in tensors.items()}, dict(observed=about))


def add_net(path: Path, models: ModelSet, name: str):
    "Fit LPS on four fifths of the networks; its metadata name them"
    n_train = count_train(models)
    train, held_out = classification_splits(models.labels, n_train, n_splits=1, seed=0)[0]
    fitted = fit_method(models[train])
    files = models.manifest.file
    split = f"split 0 of classification_splits(labels, n_train={n_train}, seed=0)"
    about = dict(model_set=name, split=split, files=sorted(files[train]), held_out=sorted(files[held_out]))
    save_fitted(path, fitted, trained_on=about)


def add_index(folder: Path):
    "Write the index of all networks, compared and calibrated by the fitted LPS"
    index = ModelIndex(load_fitted(folder/NET), load_modelset(folder/MODELS))
    index.calibrate()
    index.save(folder/BUNDLED_INDEX)


def unfit(folder: Path) -> str | None:
    "Return the reason not to bundle these files, or None"
    sizes = {name: (folder/name).stat().st_size for name in FILES}
    if sum(sizes.values()) > LIMIT: return f"{sum(sizes.values())} bytes, {LIMIT} are allowed: {sizes}"
    for file in (MODELS, NET):
        for name, v in load_tensors(folder/file)[0].items():
            if not v.is_floating_point() or v.ndim > 2 and max(v.shape[-2:]) > 7:
                return f"{file}: {name} is {v.dtype} {tuple(v.shape)}, which may be an image"


def bundle(packed: Path, out: Path) -> str:
    "Write all files, or none; returns a line about them"
    models = complete_runs(load_modelset(packed))
    name = models.about["datasheet"]["name"]
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        (folder/"observed").mkdir()
        pack(models, folder/MODELS, datasheet=datasheet(models, name))
        add_observed(folder/OBSERVED, packed.parent/"observed"/packed.name, models)
        shutil.copyfile(packed.parent/"classes"/packed.name, folder/CLASSES)
        write_datasheet(load_modelset(folder/MODELS), folder)
        add_net(folder/NET, models, name)
        add_index(folder)
        why = unfit(folder)
        if why: sys.exit(f"nothing was bundled: {why}")
        (out/"observed").mkdir(parents=True, exist_ok=True)
        for file in FILES: os.replace(shutil.copyfile(folder/file, out/f"{file}.new"), out/file)
    size = sum((out/file).stat().st_size for file in FILES)/1e6
    return f"{load_modelset(out/MODELS)}: {size:.2f} MB"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path, help="packed networks, with observed/ and classes/ beside them")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to")
    args = parser.parse_args()
    print(bundle(args.packed, args.out))
