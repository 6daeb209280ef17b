"""Measure how reliably `lps compare` tells derived models from independent ones:

python scripts/lineage.py train FOLDER                   trains on CIFAR-100 (about 8 minutes of one core); resumes
python scripts/lineage.py measure FOLDER/confirm OUT.json [--more FOLDER …]

Folders given with --more hold models that were trained on their own, as files or in folders of files; those that do
not exist are skipped. They are compared with each other and with the set, and nothing is derived from them. Two models
that record the same seed may share initial weights, so they are no independent pair.

Thresholds were chosen on the set `explore`; `confirm` has other architectures, classes and seeds. Pairs that were
measured are kept in tables beside OUT.json, and a second run continues from them.
"""
import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from lps.core.files import load_tensors, provenance, save_tensors
from lps.core.jobs import one_thread, seeded
from lps.lineage.benchmark import (
    grey, half, merged, noisy, pruned, quantised, renamed, rescaled, sliced, with_new_head,
)
from lps.methods.synthetic import noise_images
from lps.models.model import Model
from lps.models.read import read_model
from lps.nets.plain import PlainNet
from lps.nets.resnet import ResNet
from lps.order_chain import PermutationSpec, permute, random_perms
from lps.study.lineage import (
    LineageRecord, Pair, Subject, lineage_fields, measure_independent, measure_related,
)
from lps.study.records import sources_field
from lps.zoo.batchnorm import FusedResNet
from lps.zoo.recipe import model_seed
from lps.models.model import normalise
from lps.zoo.tasks import augment, load_images

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
    heads: int = 1          # of attention

KINDS = {
    "resnet20": Kind(lambda k: ResNet(20, n_classes=k), 2, 250, 5, .1),
    "basic": Kind(lambda k: timm_resnet("BasicBlock", (24, 48, 96, 192), k), 10, 50, 6, .05),
    "bottleneck": Kind(lambda k: timm_resnet("Bottleneck", (12, 24, 48, 96), k), 10, 50, 6, .05),
    "mobilenetv2": Kind(lambda k: timm_model("mobilenetv2_035", k), 10, 50, 5, .05),
    "mobilenetv3": Kind(lambda k: timm_model("mobilenetv3_small_050", k), 10, 50, 5, .05),
    "vit-96": Kind(lambda k: vit(96, 4, 3, k), 10, 50, 5, 1e-3, True, 3),
    "vit-64": Kind(lambda k: vit(64, 6, 4, k), 10, 50, 5, 1e-3, True, 4),
    "resnet14": Kind(lambda k: ResNet(14, width=16, n_classes=k), 2, 250, 5, .1),
    "plain": Kind(lambda k: PlainNet(8, 16, n_classes=k), 2, 250, 5, .05),
    "basic-16": Kind(lambda k: timm_resnet("BasicBlock", (16, 32, 64, 128), k), 10, 50, 6, .05),
    "mobilenetv2-050": Kind(lambda k: timm_model("mobilenetv2_050", k), 10, 50, 5, .05),
    "vit-80": Kind(lambda k: vit(80, 5, 5, k), 10, 50, 5, 1e-3, True, 5),
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


HEADS = "fc", "head", "classifier"


def conv_block(axes, conv, norm, rows, columns):
    "Note which channels a convolution and the norm after it follow; a depthwise one has no columns"
    axes[f"{conv}.weight"] = ((rows,), (columns,) if columns else None)
    for vector in ("weight", "bias", "running_mean", "running_var"): axes[f"{norm}.{vector}"] = ((rows,),)


def timm_resnet_axes(state):
    "Return the channels that each tensor of a timm ResNet with one block a stage follows"
    axes = {}
    conv_block(axes, "conv1", "bn1", "stream0", None)
    stream = "stream0"
    for stage in range(1, 5):
        block = f"layer{stage}.0"
        n = 3 if f"{block}.conv3.weight" in state else 2
        out = f"stream{stage}" if f"{block}.downsample.0.weight" in state else stream
        before = stream
        for i in range(1, n + 1):
            rows = out if i == n else f"{block}.hidden{i}"
            conv_block(axes, f"{block}.conv{i}", f"{block}.bn{i}", rows, before)
            before = rows
        if out != stream: conv_block(axes, f"{block}.downsample.0", f"{block}.downsample.1", out, stream)
        stream = out
    return axes | {"fc.weight": (None, (stream,))}


def mobilenet_axes(state):
    "Return the channels that each tensor of a timm MobileNet follows"
    axes = {}
    conv_block(axes, "conv_stem", "bn1", "stem", None)
    stream = "stem"
    blocks = dict.fromkeys(".".join(name.split(".")[:3]) for name in state if name.startswith("blocks."))
    for block in blocks:
        layers = [name.split(".")[3] for name in state if name.startswith(f"{block}.") and name.endswith(".weight")]
        if "conv" in layers:
            conv_block(axes, f"{block}.conv", f"{block}.bn1", block, stream)
            stream = block
            continue
        last = "conv_pwl" if "conv_pwl" in layers else "conv_pw"
        inner = f"{block}.inner" if last == "conv_pwl" else stream
        norms = iter(("bn1", "bn2", "bn3"))
        if last == "conv_pwl": conv_block(axes, f"{block}.conv_pw", f"{block}.{next(norms)}", inner, stream)
        conv_block(axes, f"{block}.conv_dw", f"{block}.{next(norms)}", inner, None)
        if "se" in layers:
            axes[f"{block}.se.conv_reduce.weight"] = ((f"{block}.se",), (inner,))
            axes[f"{block}.se.conv_reduce.bias"] = ((f"{block}.se",),)
            axes[f"{block}.se.conv_expand.weight"] = ((inner,), (f"{block}.se",))
            axes[f"{block}.se.conv_expand.bias"] = ((inner,),)
        out = stream if block[-1] != "0" else block
        conv_block(axes, f"{block}.{last}", f"{block}.{next(norms)}", out, inner)
        stream = out
    conv_block(axes, "conv_head", "bn2", "features", stream)
    if "bn2.weight" not in state:
        for vector in ("weight", "bias", "running_mean", "running_var"): del axes[f"bn2.{vector}"]
        axes["conv_head.bias"] = (("features",),)
    return axes | {"classifier.weight": (None, ("features",))}


def vit_axes(state):
    "Return the channels that each tensor of a ViT follows"
    stream = ("stream",)
    axes = {"cls_token": (None, None, stream), "pos_embed": (None, None, stream)}
    for name in state:
        block = name.rpartition(".attn.")[0] or name.rpartition(".mlp.")[0]
        heads = f"{block}.queries", f"{block}.queries", f"{block}.values"
        if name.endswith(("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "proj.bias", "fc2.bias")):
            axes[name] = (stream,)
        elif name in ("norm.weight", "norm.bias", "patch_embed.proj.weight"): axes[name] = (stream,)
        elif name.endswith("qkv.weight"): axes[name] = (heads, stream)
        elif name.endswith("qkv.bias"): axes[name] = (heads,)
        elif name.endswith("attn.proj.weight"): axes[name] = (stream, (f"{block}.values",))
        elif name.endswith("fc1.weight"): axes[name] = ((f"{block}.hidden",), stream)
        elif name.endswith("fc1.bias"): axes[name] = ((f"{block}.hidden",),)
        elif name.endswith("fc2.weight"): axes[name] = (stream, (f"{block}.hidden",))
        elif name == "head.weight": axes[name] = (None, stream)
    return axes


def spec_of(kind, state):
    "Return the permutation spec of a network of the benchmark"
    known = Model(state).architecture
    if known is not None: return known.spec
    axes = vit_axes(state) if kind.startswith("vit") else mobilenet_axes(state)
    if kind.startswith(("basic", "bottleneck")): axes = timm_resnet_axes(state)
    sizes = {}
    for name, groups_of_axes in axes.items():
        for axis, groups in enumerate(groups_of_axes):
            if groups: sizes |= dict.fromkeys(groups, state[name].shape[axis]//len(groups))
    return PermutationSpec(sizes, axes)


def permuted(kind, state, seed):
    "Permute channels without a change of the function; in a ViT, heads and the channels inside each"
    spec = spec_of(kind, state)
    perms = random_perms(spec, seed)
    g = torch.Generator().manual_seed(seed)
    for group, n in spec.sizes.items() if kind.startswith("vit") else ():
        if not group.endswith((".queries", ".values")): continue
        heads = KINDS[kind].heads
        order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed + len(group.split(".")[1])))
        inner = torch.stack([torch.randperm(n//heads, generator=g) for _ in range(heads)])
        perms[group] = (order[:, None]*(n//heads) + inner).flatten()
    known = {name: v for name, v in state.items() if name in spec.axes_to_perm}
    return state | permute(known, spec, perms)


def rescaled_network(kind, state, seed):
    "Scale filters before batch normalisation, with any sign, or what layer normalisation reads"
    known = Model(state).architecture
    if known is not None and known.norms: return rescaled(state, known, seed)
    g = torch.Generator().manual_seed(seed)
    state = {name: v.clone() for name, v in state.items()}
    names = list(state)
    for name, after in zip(names, names[1:]):
        norm = after.removesuffix(".weight")
        if state[name].ndim != 4 or f"{norm}.running_var" not in state: continue
        n = len(state[name])
        scales = (torch.rand(n, generator=g) + .5)*(torch.randint(2, (n,), generator=g)*2 - 1)
        state[name] *= scales[:, None, None, None]
        state[f"{norm}.running_mean"] *= scales
        state[f"{norm}.running_var"] *= scales**2
        state[f"{norm}.weight"] *= scales.sign()
    readers = {"norm1": "attn.qkv", "norm2": "mlp.fc1"}
    for name in names:
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm not in readers or not kind.startswith("vit"): continue
        scales = torch.rand(len(state[name]), generator=g) + .5
        state[name] *= scales
        state[name.replace("weight", "bias")] *= scales
        state[f"{block}.{readers[norm]}.weight"] /= scales
    return state


def disguised(kind, state, seed):
    "Permute, rescale, rename and convert to float16"
    return half(renamed(rescaled_network(kind, permuted(kind, state, seed), seed)))


def without_blocks(state, every):
    "Leave out residual blocks that keep the number of channels: the last one, or all but the first of a stage"
    parts = {}
    for name in state:
        words = name.split(".")
        if words[0].startswith("layer") and words[1] != "0": parts[f"{words[0]}.{words[1]}."] = None
        if words[0] != "blocks": continue
        if words[2].isdigit() and words[2] != "0": parts[f"blocks.{words[1]}.{words[2]}."] = None
        if not words[2].isdigit() and int(words[1]) % 2: parts[f"blocks.{words[1]}."] = None
    gone = tuple(parts) if every else tuple(parts)[-1:]
    return {name: v for name, v in state.items() if not name.startswith(gone)} if gone else None


def four_channels(state, stem):
    "Add an input channel, the mean of the others"
    weight = state[f"{stem}.weight"]
    return state | {f"{stem}.weight": torch.cat([weight, weight.mean(1, keepdim=True)], 1)}


SAME_VALUES = "same weights in another precision or under other names"
SAME_NETWORK = "same network, reordered or rescaled"
ONE_WAY = "pruned", "quantised", "channels removed", "layers removed"


def derivations(kind, state, other, seed):
    "Yield name, tensors, expected verdict and change of everything that is made without training"
    spec = spec_of(kind, state)
    stem = next(name for name, v in state.items() if v.ndim == 4).removesuffix(".weight")
    head = next(name for name in HEADS if f"{name}.weight" in state)
    yield "float16", half(state), SAME_VALUES, ""
    yield "renamed", renamed(state), SAME_VALUES, ""
    yield "reordered", permuted(kind, state, seed), SAME_NETWORK, ""
    yield "rescaled", rescaled_network(kind, state, seed), SAME_NETWORK, ""
    yield "disguised", disguised(kind, state, seed), SAME_NETWORK, ""
    yield "new head", with_new_head(state, head, 7, seed), "derived", "head replaced"
    for share in (.5, .8, .9): yield f"pruned {share:.0%}", pruned(state, share), "derived", "pruned"
    yield "pruned 80% and disguised", disguised(kind, pruned(state, .8), seed), "derived", "pruned"
    for bits in (8, 4, 3): yield f"{bits} bits", quantised(state, bits), "derived", "quantised"
    for share in (.75, .5, .25): yield f"merged {share:.0%}", merged(state, other, share), "derived", "merged"
    yield "merged 50% and disguised", disguised(kind, merged(state, other, .5), seed), "derived", "merged"
    yield "merged 25% and reordered", permuted(kind, merged(state, other, .25), seed), "derived", "merged"
    for share in (.75, .5): yield f"slice {share:.0%}", sliced(state, spec, share, seed), "derived", "channels removed"
    yield "one block dropped", without_blocks(state, False), "derived", "layers removed"
    yield "many blocks dropped", without_blocks(state, True), "derived", "layers removed"
    yield "grey images", grey(state, stem), "derived", "input channels changed"
    yield "four channels", four_channels(state, stem), "derived", "input channels changed"
    for size in (.3, 1): yield f"noise {size:.0%}", noisy(state, size, seed), "derived", ""


@torch.no_grad()
def subject_of(kind, state, meta, images):
    "Return a model of the benchmark, with its outputs if it can be run"
    try:
        net = KINDS[kind].make(KINDS[kind].n_classes).eval()
        net.load_state_dict(state)
        outputs = net(images)
    except (KeyError, RuntimeError): outputs = None
    return Subject(Model(state), outputs, kind, str(meta.get("task", "")), meta.get("seed"))


def uncounted(state):
    return {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")}


def trained_pairs(a, state, path, meta, images):
    "Yield the pairs of a model and those that were trained from it"
    kind = meta["kind"]
    for how in TRAINED:
        file = path.with_stem(f"{path.stem}-{how}")
        if not file.exists(): continue
        child = {name: v.clone() for name, v in load_tensors(file)[0].items()}
        b = subject_of(kind, child, meta, images)
        if how == "distilled": yield Pair(a, b, how, "independent")
        elif how == "pruned-tuned": yield Pair(a, b, "pruned 80% and fine-tuned", "derived", "pruned", "a → b")
        else:
            name = how.replace("fine-tuned-", "fine-tuned, ")
            yield Pair(a, b, name, "derived", "fine-tuned", "a → b")
            bare = subject_of(kind, uncounted(state), meta, images), subject_of(kind, uncounted(child), meta, images)
            yield Pair(*bare, "fine-tuned, no counters", "derived", "fine-tuned", "a → b")
            disguise = subject_of(kind, disguised(kind, child, 1), meta, images)
            yield Pair(a, disguise, "fine-tuned and disguised", "derived", "fine-tuned")


def related_pairs(models, images, n_parents):
    "Yield all related pairs, those of the first few models of each kind"
    by_kind = {}
    for path, (state, meta) in models.items(): by_kind.setdefault(meta["kind"], []).append((path, state, meta))
    for kind, members in by_kind.items():
        members.sort(key=lambda member: (member[2]["run"], member[2]["task"]))
        for i, (path, state, meta) in enumerate(members):
            a = subject_of(kind, state, meta, images)
            yield from trained_pairs(a, state, path, meta, images)
            if i >= n_parents: continue
            for name, child, verdict, how in derivations(kind, state, members[i - 1][1], i):
                if child is None: continue
                direction = "a → b" if how in ONE_WAY else ""
                yield Pair(a, subject_of(kind, child, meta, images), name, verdict, how, direction)


def read_models(folder):
    "Read the independent models of a set"
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        state, meta = load_tensors(path)
        if "how" not in meta: found[path] = {name: v.clone() for name, v in state.items()}, meta
    return found


def shapes_but_head(state):
    return tuple(v.shape for v in state.values() if v.ndim > 1)[:-1]


def more_subjects(folders, known):
    "Read models that were trained elsewhere; those with the layers of a known architecture get its name"
    kinds = {shapes_but_head(subject.model.state): subject.kind for subject in known}
    found = {}
    for folder in folders:
        if not folder.exists(): print(f"skipped: {folder} does not exist", flush=True)
        files = [path for path in sorted(folder.rglob("task*_run*")) if path.suffix in (".pt", ".safetensors")]
        for path in files:
            model = read_model(path)
            task, run = [int("".join(filter(str.isdigit, word))) for word in path.stem.split("_")]
            own = path.relative_to(folder.parent).with_suffix("").as_posix()
            kind = kinds.setdefault(shapes_but_head(model.state), own.rpartition("/")[0])
            found[own] = Subject(model, None, kind, f"{folder.name} {task}", model.meta.get("seed"))
    return found


def choose_pairs(subjects, n):
    "Choose pairs of names: all of one architecture, then others at random; models of one seed are not independent"
    names = list(subjects)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i] if not one_seed(subjects[a], subjects[b])]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    order.sort(key=lambda k: subjects[pairs[k][0]].kind != subjects[pairs[k][1]].kind)
    return [pairs[k] for k in order[:n]]


def one_seed(a, b):
    "Tell whether two models record the same seed"
    return a.seed is not None and a.seed == b.seed


def times(rows):
    return rows.groupby("kind").seconds.median().round(3).to_dict()


def kept(path, make):
    "Return the table in a file, or make and write it"
    if path.exists(): return pd.read_csv(path, keep_default_na=False)
    rows = make()
    rows.to_csv(path, index=False)
    return rows


def measure_pairs(subjects, n, seconds, path):
    "Measure independent pairs that are not in a table yet, and add them to it"
    known = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["a", "b"])
    done = set(zip(known.a, known.b))
    names = list(subjects)
    pairs = [pair for pair in choose_pairs(subjects, n) if pair not in done]
    places = [(names.index(a), names.index(b)) for a, b in pairs]
    found = measure_independent(list(subjects.values()), places, seconds)
    found.insert(0, "a", [a for a, _ in pairs[:len(found)]])
    found.insert(1, "b", [b for _, b in pairs[:len(found)]])
    rows = pd.concat([known, found]) if len(known) else found
    rows.to_csv(path, index=False)
    return rows


def measure(folder, out, more, n_pairs, n_parents, seconds):
    "Measure a set and write its record"
    start = time.process_time()
    models = read_models(folder)
    images = noise_images(64, size=SIDE)
    rows = kept(out.with_suffix(".related.csv"), lambda: measure_related(related_pairs(models, images, n_parents)))
    print(f"{len(rows)} related pairs, {time.process_time() - start:.0f} s", flush=True)
    by_name = {path.stem: subject_of(meta["kind"], state, meta, images) for path, (state, meta) in models.items()}
    others = more_subjects(more, by_name.values())
    by_name |= others
    independent = measure_pairs(by_name, n_pairs, seconds, out.with_suffix(".independent.csv"))
    print(f"{len(independent)} independent pairs, {time.process_time() - start:.0f} s", flush=True)
    subjects = list(by_name.values())
    kinds = {}
    for subject in subjects[:len(models)]: kinds[subject.kind] = kinds.get(subject.kind, 0) + 1
    for name in others: kinds[name.split("/")[0]] = kinds.get(name.split("/")[0], 0) + 1
    described = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    about = dict(
        models=len(subjects),
        tasks=len({(subject.kind, subject.task) for subject in subjects}),
        data=["cifar100"],
        recipe=["brief"],
        seeds=sorted({subject.seed for subject in subjects if subject.seed is not None}),
    )
    how = f"{described}; {SIDE}×{SIDE} pixels in {folder.name}; {len(rows)} related pairs"
    settings = dict(name=folder.name, how=how, seed=0, n_parents=n_parents)
    fields = lineage_fields(rows, independent) | dict(seconds=times(rows))
    record = dict(model_set=about, settings=settings) | sources_field(LineageRecord) | fields | provenance()
    LineageRecord.from_dict(record).write(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--more", type=Path, nargs="+", default=[], help="folders of other independent models")
    parser.add_argument("--pairs", type=int, default=10_000, help="independent pairs")
    parser.add_argument("--parents", type=int, default=3, help="models of each kind that others are derived from")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop independent pairs after this time")
    args = parser.parse_args()
    with one_thread():
        if args.what == "train": return train(args.folder)
        measure(args.folder, args.out, args.more, args.pairs, args.parents, 60*args.minutes)


if __name__ == "__main__": main()
