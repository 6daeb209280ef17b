"""Measure how reliably `lps compare` tells derived models from independent ones:

python scripts/lineage.py train FOLDER    trains the networks on CIFAR-100 (about 8 minutes of one core); resumes
python scripts/lineage.py measure FOLDER explore|confirm OUT

Thresholds were chosen on the set `explore`; `confirm` has other architectures, classes and seeds.
"""
import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from lps.core.files import load_tensors, save_tensors
from lps.core.jobs import one_thread, seeded
from lps.nets.plain import PlainNet
from lps.nets.resnet import ResNet
from lps.zoo.batchnorm import FusedResNet
from lps.zoo.recipe import model_seed
from lps.zoo.tasks import augment, load_images, normalise

STATS = (.507, .487, .441), (.267, .256, .276)  # of CIFAR-100
BATCH = 64
SIDE = 16  # of the images, which are averaged from 32 pixels


def timm_resnet(block, channels, n_classes):
    from timm.models import resnet
    return resnet.ResNet(getattr(resnet, block), (1, 1, 1, 1), num_classes=n_classes, channels=channels)


def timm_model(name, n_classes):
    import timm
    return timm.create_model(name, num_classes=n_classes)


def vit(dim, depth, heads, n_classes):
    from timm.models.vision_transformer import VisionTransformer
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=dim, depth=depth, num_heads=heads, num_classes=n_classes,
    )


@dataclass(frozen=True)
class Kind:
    "An architecture and how it is trained"
    make: object            # `n_classes` → module
    n_classes: int          # of a task
    n_images: int           # of a class
    epochs: int
    lr: float
    adam: bool = False      # AdamW instead of SGD

KINDS = {
    "resnet20": Kind(lambda k: ResNet(20, n_classes=k), 2, 250, 5, .1),
    "basic": Kind(lambda k: timm_resnet("BasicBlock", (24, 48, 96, 192), k), 10, 50, 6, .05),
    "bottleneck": Kind(lambda k: timm_resnet("Bottleneck", (12, 24, 48, 96), k), 10, 50, 6, .05),
    "mobilenetv2": Kind(lambda k: timm_model("mobilenetv2_035", k), 10, 50, 5, .05),
    "mobilenetv3": Kind(lambda k: timm_model("mobilenetv3_small_050", k), 10, 50, 5, .05),
    "vit-96": Kind(lambda k: vit(96, 4, 3, k), 10, 50, 5, 1e-3, True),
    "vit-64": Kind(lambda k: vit(64, 6, 4, k), 10, 50, 5, 1e-3, True),
    "resnet14": Kind(lambda k: ResNet(14, width=16, n_classes=k), 2, 250, 5, .1),
    "plain": Kind(lambda k: PlainNet(8, 16, n_classes=k), 2, 250, 5, .05),
    "basic-16": Kind(lambda k: timm_resnet("BasicBlock", (16, 32, 64, 128), k), 10, 50, 6, .05),
    "mobilenetv2-050": Kind(lambda k: timm_model("mobilenetv2_050", k), 10, 50, 5, .05),
    "vit-80": Kind(lambda k: vit(80, 5, 5, k), 10, 50, 5, 1e-3, True),
}
SETS = {  # kind → (number of tasks, models of each task, parents of trained derivations)
    "explore": {"resnet14": (1, 5, 2), "plain": (1, 4, 1), "basic-16": (1, 5, 2), "mobilenetv2-050": (1, 4, 1),
                "vit-80": (1, 6, 2)},
    "confirm": {"resnet20": (4, 8, 3), "basic": (5, 8, 3), "bottleneck": (3, 8, 2), "mobilenetv2": (2, 8, 1),
                "mobilenetv3": (2, 8, 1), "vit-96": (3, 8, 4), "vit-64": (1, 8, 1)},
}
FIRST_TASK = {"explore": 100, "confirm": 0}
TRAINED = {  # derivation → (epochs, in multiples of those of the kind; factor of the learning rate; another task?)
    "fine-tuned-short": (.4, .1, False),
    "fine-tuned-task": (1, .3, True),
    "fine-tuned-long": (2, 1, True),
    "pruned-tuned": (.4, .1, False),
    "distilled": (1, 1, False),
}


def task_of(images, kind, number):
    "Return images and labels of a task: classes that its number decides"
    g = torch.Generator().manual_seed(number)
    classes = torch.randperm(100, generator=g)[:kind.n_classes]
    rows = torch.cat([(images.labels == c).nonzero()[:kind.n_images, 0] for c in classes])
    return images.images[rows], torch.arange(kind.n_classes).repeat_interleave(kind.n_images)


def optimiser(net, kind, lr):
    if kind.adam: return torch.optim.AdamW(net.parameters(), lr, weight_decay=.05)
    return torch.optim.SGD(net.parameters(), lr, momentum=.9, weight_decay=5e-4)


def fit(net, task, kind, seed, epochs, lr, masks=()):
    "Train a network with a learning rate that falls to 0 along a cosine"
    x, y = task
    g = torch.Generator().manual_seed(seed)
    run = FusedResNet(net) if isinstance(net, ResNet) else net
    run = run.train().to(memory_format=torch.channels_last)
    opt = optimiser(run, kind, lr)
    steps = epochs*math.ceil(len(x)/BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=g).split(BATCH):
            if len(rows) < 2: continue
            batch = normalise(augment(x[rows], 2, True, g), STATS).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=run is not net): out = run(batch)
            loss = F.cross_entropy(out.float(), y[rows])
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
            for p, mask in masks: p.data *= mask
    return loss.item()


def new_network(kind, seed, n_classes=None):
    with seeded(seed): return kind.make(n_classes or kind.n_classes)


def save(path, net, **meta):
    state = {name: v.detach().contiguous() for name, v in net.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, state, meta)


def train_from_scratch(path, images, name, task, run):
    kind = KINDS[name]
    seed = model_seed(0, task, run)
    net = new_network(kind, seed)
    start = time.process_time()
    loss = fit(net, task_of(images, kind, task), kind, seed, kind.epochs, kind.lr)
    save(path, net, kind=name, task=task, run=run, seed=seed, loss=loss, seconds=time.process_time() - start)


def smallest(net, share):
    "Return a mask for each matrix of a network: 0 for the smallest weights"
    matrices = [p for p in net.parameters() if p.ndim > 1]
    threshold = torch.cat([p.detach().abs().flatten() for p in matrices]).quantile(share)
    return [(p, (p.detach().abs() > threshold).float()) for p in matrices]


def train_derived(path, parent, images, how, task, run, name):
    kind = KINDS[name]
    epochs, factor, other = TRAINED[how]
    seed = model_seed(1, task, 10*run + list(TRAINED).index(how))
    net = new_network(kind, seed)
    start = time.process_time()
    state = load_tensors(parent)[0]
    data = task_of(images, kind, task + 1000*other)
    masks = ()
    if how == "distilled":
        teacher = kind.make(kind.n_classes).eval()
        teacher.load_state_dict(state)
        with torch.no_grad():
            soft = [teacher(normalise(batch, STATS)).softmax(1) for batch in data[0].split(250)]
        data = data[0], torch.cat(soft)
    else:
        head = [k for k, v in state.items() if v.shape[:1] == (kind.n_classes,)]
        own = net.state_dict()
        net.load_state_dict(state | {k: own[k] for k in head if other})
    if how == "pruned-tuned":
        masks = smallest(net, .8)
        for p, mask in masks: p.data *= mask
    epochs = max(1, round(epochs*kind.epochs))
    loss = fit(net, data, kind, seed, epochs, factor*kind.lr, masks)
    about = dict(kind=name, task=task, run=run, seed=seed, loss=loss, seconds=time.process_time() - start)
    save(path, net, parent=parent.name, how=how, **about)


def jobs(part):
    "List what there is to train of a part: path, function and its arguments; the first runs of all tasks first"
    found = []
    for name, (n_tasks, n_runs, n_parents) in SETS[part].items():
        tasks = range(FIRST_TASK[part], FIRST_TASK[part] + n_tasks)
        models = [(task, run) for run in range(n_runs) for task in tasks]
        for i, (task, run) in enumerate(models):
            path = Path(part)/f"{name}-{task}-{run}.safetensors"
            found.append((run, path, train_from_scratch, (name, task, run)))
            if i >= n_parents: continue
            for how in TRAINED:
                if how == "distilled" and i > 0: continue
                copy = path.with_stem(f"{path.stem}-{how}")
                found.append((run, copy, train_derived, (path, how, task, run, name)))
    return [job for _, *job in sorted(found, key=lambda job: job[0])]


def train(folder):
    images = load_images("cifar100", "train")
    images.images = F.avg_pool2d(images.images.float(), 32//SIDE).round().byte()
    for part in SETS:
        for path, function, arguments in jobs(part):
            if (folder/path).exists(): continue
            if function is train_derived:
                parent, how, task, run, name = arguments
                train_derived(folder/path, folder/parent, images, how, task, run, name)
            else: train_from_scratch(folder/path, images, *arguments)
            meta = load_tensors(folder/path)[1]
            print(path, f"loss {meta['loss']:.2f}, {meta['seconds']:.1f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    with one_thread(): train(args.folder)


if __name__ == "__main__": main()
