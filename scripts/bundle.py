"""Make the model set that comes with the package from the folder of a build:
python scripts/bundle.py BUILD --classes classes.tsv [--name modelset500-tinyimagenet32]

With --kept 80 it adds the networks that a build kept after 80 epochs, as many as there are, in a file of their own;
--add names packed sets of the same build, trained elsewhere or earlier, whose networks go into it too.
With --answers it adds what the whole networks of a folder say to the images of `two-spectra-probes`."""
import argparse
import csv
import shutil
import sys
import tempfile
from pathlib import Path

from lps.lineage.sketch import weight_sketch
from lps.zoo.datasheet import datasheet, write_datasheet
from lps.study.splits import classification_splits
from lps.core.files import load_tensors, save_tensors
from lps.methods.registry import LEADERS, fit_method, load_fitted, observations, save_fitted
from lps.models.modelset import ModelSet, join_sets, load_modelset, pack
from lps.index.index import BUNDLED_INDEX, BUNDLED_OUTPUTS, ModelIndex

DATA = Path(__file__).resolve().parent.parent/"lps/data"
LIMIT = 7_000_000  # bytes, of all files together
FILES = "modelset.safetensors", "net.safetensors", "DATASHEET.md", "datasheet.json", BUNDLED_INDEX


def class_names(path: Path | None) -> dict[str, str]:
    "The first of the names of each class, by its id: a table with columns wnid and name"
    if path is None: return {}
    with open(path, encoding="utf-8", newline="") as f:
        names = {r["wnid"]: r["name"].split(",")[0] for r in csv.DictReader(f, delimiter="\t")}
    if len(set(names.values())) < len(names): sys.exit(f"{path}: two classes have the same first name")
    return names


def add_net(path: Path, models: ModelSet, name: str):
    "One LPS with the default recipe, fitted on all but two models of each task; its metadata say which"
    n_train = int(models.manifest.task.value_counts().min()) - 2
    train, held_out = classification_splits(models.labels, n_train, n_splits=1, seed=0)[0]
    fitted, files = fit_method(models[train]), models.manifest.file
    split = f"split 0 of classification_splits(labels, n_train={n_train}, seed=0)"
    about = dict(model_set=name, split=split, files=sorted(files[train]), held_out=sorted(files[held_out]))
    save_fitted(path, fitted, trained_on=about)


def add_index(folder: Path):
    "The index of all models, compared and calibrated by the bundled network"
    index = ModelIndex(load_fitted(folder/FILES[1]), load_modelset(folder/FILES[0]))
    index.calibrate()
    index.save(folder/BUNDLED_INDEX)


def unfit(folder: Path) -> str | None:
    "Return the reason not to bundle these files, or None"
    sizes = {n: (folder/n).stat().st_size for n in FILES}
    if sum(sizes.values()) > LIMIT: return f"{sum(sizes.values())} bytes, {LIMIT} are allowed: {sizes}"
    for n in FILES[:2]:
        for k, v in load_tensors(folder/n)[0].items():
            if not v.is_floating_point() or v.ndim > 2 and max(v.shape[-2:]) > 7:
                return f"{n}: {k} is {v.dtype} {tuple(v.shape)}, which may be an image"


def check_names(models: ModelSet, names: dict, table: Path | None):
    "Each class has a readable name, if any has one"
    shown = set()
    for task in datasheet(models, classes=names)["tasks"]: shown |= set(task["classes"])
    missing = sorted(shown - set(names.values()))
    if names and missing: sys.exit(f"{table} does not name {missing[:5]}")


def kept_models(build: Path | None, epoch: int, added: list[Path]) -> ModelSet:
    "The networks that a build kept after some epochs, and those of packed sets; a network of several counts once"
    sets = [load_modelset(build/f"epochs/{epoch:03d}")] if build else []
    seen = {file for models in sets for file in models.manifest.file}
    for path in added:
        models = load_modelset(path)
        epochs = {model.meta.get("epoch", model.meta["recipe"]["epochs"]) for model in models}
        if epochs != {epoch}: sys.exit(f"{path} holds networks after {sorted(epochs)} epochs, not {epoch}")
        models = models[~models.manifest.file.isin(seen).to_numpy()]
        seen |= set(models.manifest.file)
        if len(models): sets.append(models)
    return join_sets(sets)


def bundle_kept(
    models: ModelSet, epoch: int, classes: Path | None, name: str, out: Path, stem: str = "modelset500"
) -> str:
    "Add the first layers of networks that were kept after some epochs; returns what they are in a line"
    names = class_names(classes)
    check_names(models, names, classes)
    file = out/f"{stem}-epoch{epoch}.safetensors"
    sheet = datasheet(models, f"{name}, after {epoch} epochs", names)
    with tempfile.TemporaryDirectory() as tmp:
        pack(models, f"{tmp}/{file.name}", classes=names, datasheet=sheet)
        others = sum(f.stat().st_size for f in out.iterdir() if f != file)
        size = Path(f"{tmp}/{file.name}").stat().st_size
        if others + size > LIMIT: sys.exit(f"nothing was bundled: {others + size} bytes, {LIMIT} are allowed")
        shutil.copyfile(f"{tmp}/{file.name}", file)
    return f"{load_modelset(file)}: {file.stat().st_size/1e6:.2f} MB"


def network_facts(file: str, model, names: dict) -> dict:
    "Return the facts of a network for an index"
    first, second = (names.get(c, c) for c in model.meta["classes"])
    return dict(
        file=file,
        task=model.meta["task"],
        run=model.meta["run"],
        class_0=first,
        class_1=second,
        val_accuracy=model.meta["val_accuracy"],
        recipe=f"{model.meta['recipe']['name']}, {model.meta['epoch']} of {model.meta['recipe']['epochs']} epochs",
        architecture="resnet",
        parameters=sum(tensor.numel() for tensor in model.state.values()),
        sketch=weight_sketch(model.state),
    )


def bundle_answers(models: ModelSet, classes: Path | None, out: Path) -> str:
    "Add what whole networks for two classes say to synthetic images; returns what that is in a line"
    names = class_names(classes)
    check_names(models, names, classes)
    fitted = fit_method(models[:2], LEADERS["whole networks"])
    outputs = observations(models, fitted)["outputs"]
    if outputs.shape[2] != 2: sys.exit(f"{models.path} holds networks for {outputs.shape[2]} classes, expected two")
    facts = [network_facts(file, model, names) for file, model in zip(models.manifest.file, models)]
    about = dict(method=fitted.method, facts=facts, digests=models.digests)
    save_tensors(out/BUNDLED_OUTPUTS, dict(first=outputs[:, :, 0].half().contiguous()), dict(answers=about))
    return f"{len(models)} networks, {outputs.shape[1]} images: {(out/BUNDLED_OUTPUTS).stat().st_size/1e6:.2f} MB"


def bundle(build: Path, classes: Path | None, name: str, out: Path) -> str:
    "Write the files, all or none; returns what they are in a line"
    models, names = load_modelset(build), class_names(classes)
    if not (build/"build.json").exists(): sys.exit(f"{build} is not the folder of a build: it has no build.json")
    check_names(models, names, classes)
    with tempfile.TemporaryDirectory() as tmp:
        packed = pack(models, f"{tmp}/{FILES[0]}", classes=names, datasheet=datasheet(models, name, names))
        add_net(Path(tmp)/FILES[1], packed, name)
        write_datasheet(packed, tmp, name=name)
        add_index(Path(tmp))
        if why := unfit(Path(tmp)): sys.exit(f"nothing was bundled: {why}")
        out.mkdir(parents=True, exist_ok=True)
        for n in FILES: shutil.copyfile(f"{tmp}/{n}", out/n)
    return f"{load_modelset(out/FILES[0])}: {sum((out/n).stat().st_size for n in FILES)/1e6:.2f} MB"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, nargs="?", help="folder of a build, with build.json and complete/")
    parser.add_argument(
        "--classes", type=Path, help="tab-separated table with columns wnid and name: readable names for the classes"
    )
    parser.add_argument("--name", default="modelset500-tinyimagenet32", help="what the set is called")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to")
    parser.add_argument("--kept", type=int, metavar="EPOCH", help="add networks kept after this many epochs instead")
    parser.add_argument("--add", type=Path, nargs="+", default=[], help="packed sets of networks kept at that epoch")
    parser.add_argument("--file", default="modelset500", help="with --kept: the file is FILE-epochEPOCH.safetensors")
    parser.add_argument("--answers", action="store_true", help="add what the whole networks of a folder say instead")
    args = parser.parse_args()
    if not args.kept and (args.add or not args.build): sys.exit("give the folder of a build, or --kept with --add")
    if args.answers: print(bundle_answers(load_modelset(args.build), args.classes, args.out))
    elif args.kept:
        kept = kept_models(args.build, args.kept, args.add)
        print(bundle_kept(kept, args.kept, args.classes, args.name, args.out, args.file))
    else: print(bundle(args.build, args.classes, args.name, args.out))
