"""Pack what comparisons need of the finished networks of a build, so that they outlive the machine that trained them:

python scripts/pack_zoo.py BUILD OUT [--epochs 10 20 40 60 80]

For each epoch, OUT/epochNN.safetensors is a packed model set: the first layer with its batch normalisation in float32
(float16 would save 1 KB a network and change its digest), and all metadata, such as the instruction set that trained
it. OUT/observed/epochNN.safetensors has what two methods observe of the same networks in the same order, in float16:
`outputs`, the centred logits on the probe images of two-spectra-probes without the last class, which is minus the sum
of the others; and `layers`, the signature of all layers. OUT/classes/epochNN.safetensors has the class descriptors of
two-class networks: `first`, the centred logit of the first class on synthetic images, minus which is that of the
second. `lps zoo build BUILD … --packed OUT` trains the rest. Networks that OUT has and BUILD has not are kept; those
that were packed without class descriptors stay without.
"""
import argparse
import os
import tempfile
from pathlib import Path

import torch

from lps.core.files import load_tensors, pluralise, save_tensors
from lps.methods.classes import FOR_FEW, describe_classes
from lps.methods.probes import probe_outputs
from lps.methods.signatures import all_layer_signature
from lps.models.modelset import ModelSet, join_sets, load_modelset, pack
from lps.zoo.datasheet import datasheet

IMAGES = dict(n_images=768, seed=0, size=32, kinds=FOR_FEW)
METHODS = {"outputs": "two-spectra-probes", "layers": "all-layer-signature"}


def observe(models: ModelSet) -> dict[str, torch.Tensor]:
    "Compute outputs on probe images `(M, n, K - 1)` and signatures of all layers `(M, E)`, in float16"
    names = [name for name in models.shapes if not name.endswith("num_batches_tracked")]
    weights = models.weights(names)
    outputs = probe_outputs(weights, models.architectures, parts=2)["outputs"][..., :-1]
    layers = all_layer_signature(weights, "conv")["layers"]
    return dict(outputs=outputs.half().contiguous(), layers=layers.half().contiguous())


def with_earlier(models: ModelSet, tensors: dict, file: Path, observed: Path) -> tuple:
    "Add the networks that were packed before and are not in this build; returns models, observations and digests"
    own = models.manifest.file.tolist()
    rows = dict(zip(own, zip(models.digests, zip(*tensors.values()))))
    if not file.exists(): return models, tensors, models.digests
    earlier = load_modelset(file)
    known, meta = load_tensors(observed)
    about = meta["observed"]
    values = zip(*(known[name] for name in tensors))
    rows = dict(zip(about["files"], zip(about["digests"], values))) | rows
    others = earlier[(~earlier.manifest.file.isin(own)).to_numpy()]
    if not len(others): return models, tensors, models.digests
    joined = join_sets([others, models])
    digests, values = zip(*(rows[name] for name in joined.manifest.file))
    return joined, dict(zip(tensors, map(torch.stack, zip(*values)))), list(digests)


def describe(models: ModelSet, file: Path) -> int:
    "Write the class descriptors of these networks and of those that were described before; returns their number"
    known = {}
    if file.exists():
        state, meta = load_tensors(file)
        about = meta["described"]
        if about["images"] == IMAGES:
            known = dict(zip(about["files"], zip(about["digests"], about["classes"], state["first"])))
    for i, (name, digest) in enumerate(zip(models.manifest.file, models.digests)):
        if name in known and known[name][0] == digest: continue
        found = describe_classes(models[i], precision="float32", **IMAGES)
        if len(found) == 2: known[name] = digest, found.names, found.logits[:, 0]
    if not known: return 0
    names = sorted(known)
    digests, classes, first = zip(*(known[name] for name in names))
    about = dict(images=IMAGES, files=names, digests=digests, classes=classes)
    save_tensors(file, dict(first=torch.stack(first)), dict(described=about))
    return len(names)


def pack_epoch(models: ModelSet, out: Path, epoch: int, name: str) -> str:
    "Write both files of one epoch; returns a line about them"
    file = out/f"epoch{epoch}.safetensors"
    observed = out/"observed"/file.name
    out.mkdir(parents=True, exist_ok=True)
    described = describe(models, out/"classes"/file.name)
    models, tensors, digests = with_earlier(models, observe(models), file, observed)
    about = dict(methods=METHODS, files=models.manifest.file.tolist(), digests=digests)
    with tempfile.TemporaryDirectory(dir=out) as new:  # a set is read with what lies beside it: replace both at once
        pack(models, Path(new)/file.name, datasheet=datasheet(models, f"{name}, after {epoch} epochs"))
        save_tensors(Path(new)/"observed.safetensors", tensors, dict(observed=about))
        observed.parent.mkdir(exist_ok=True)
        os.replace(Path(new)/"observed.safetensors", observed)
        os.replace(Path(new)/file.name, file)
    size = (os.path.getsize(file) + os.path.getsize(observed))/1e6
    count = f"{pluralise(len(models), 'network')} of {pluralise(len(models.tasks), 'task')}"
    return f"epoch {epoch}: {count}, {size:.2f} MB; classes of {pluralise(described, 'network')} described"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="folder of a build")
    parser.add_argument("out", type=Path, help="folder to write to, such as data/modelset500-cifar100")
    parser.add_argument("--epochs", type=int, nargs="+", help="epochs that were kept; all if not given")
    args = parser.parse_args()
    kept = sorted(int(folder.name) for folder in (args.build/"epochs").iterdir() if folder.name.isdecimal())
    for epoch in args.epochs or kept:
        models = load_modelset(args.build/f"epochs/{epoch:03d}")
        print(pack_epoch(models, args.out, epoch, args.build.resolve().name))


if __name__ == "__main__": main()
