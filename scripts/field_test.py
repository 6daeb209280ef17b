"""Try the index on a folder as practitioners have it: networks of timm and torchvision in several formats.

python scripts/field_test.py train FOLDER                  trains 144 networks on CIFAR-100 (about 15 minutes of one
                                                           core); resumes
python scripts/field_test.py measure FOLDER OUT    writes the networks as a folder, indexes it, queries it, and writes
                                                   a result file; --seeds 0 takes the exploring part only

Settings are chosen on the networks of seed 0. Those of seeds 1 and 2 confirm: they are measured once.
"""
import argparse
import json
import resource
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lps.core.files import load_tensors, provenance, save_tensors
from lps.core.jobs import one_thread, seeded
from lps.index.family import relatives
from lps.index.gather import BY_CLASSES
from lps.index.index import BuildSettings, ModelIndex
from lps.index.related import describe, models_with, name_by_gallery
from lps.models.model import normalise
from lps.models.read import Reading, read_model
from lps.models.table import reading_with
from lps.study.field import FieldRecord, field_fields
from lps.study.records import sources_field
from lps.zoo.tasks import augment, load_splits, task_images

STATS = (.507, .487, .441), (.267, .256, .276)  # of CIFAR-100
BATCH = 64
FIRST_SEED = 24_000
TASKS = {  # classes of CIFAR-100; tasks overlap
    "kitchen": ["orange", "apple", "plate", "bottle", "wardrobe"],
    "garden": ["sunflower", "orange", "apple", "rose", "palm_tree", "cockroach"],
    "road": ["motorcycle", "pickup_truck", "road", "skyscraper", "streetcar"],
    "vehicles": ["motorcycle", "pickup_truck", "rocket", "tank", "lawn_mower", "streetcar", "bicycle"],
    "sea": ["sea", "aquarium_fish", "shark", "cloud"],
    "landscape": ["sea", "cloud", "road", "mountain", "plain", "palm_tree"],
}
PARENT = "vehicles"            # task of the common parent of a family and seed
CHILDREN = "road", "garden"    # tasks that its children are fine-tuned for


class Family:
    "Networks of a family: builders by seed, and the number of training steps"
    def __init__(self, steps, *variants, lr=3e-3): self.steps, self.variants, self.lr = steps, variants, lr

    def variant(self, seed): return self.variants[seed % len(self.variants)]


FAMILIES = {  # (package, name, arguments) of each variant
    "resnet": Family(220, ("timm", "test_resnet", {}), ("timm", "resnet18", dict(channels=(24, 48, 96, 192)))),
    "mobilenet": Family(
        300, ("torchvision", "mobilenet_v2", dict(width_mult=.35)), ("timm", "mobilenetv3_small_050", {}),
    ),
    "efficientnet": Family(350, ("timm", "test_efficientnet", {})),
    "convnext": Family(320, ("timm", "test_convnext", {}), ("timm", "test_convnext3", {})),
    "regnet": Family(180, ("timm", "regnetx_002", {}), ("timm", "regnety_002", {})),
    "densenet": Family(300, ("timm", "densenet121", dict(growth_rate=12, block_config=(3, 3, 3, 3)))),
    "vit": Family(
        200, ("timm", "vit_tiny_patch16_224", dict(img_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=4)),
        ("timm", "test_vit", dict(img_size=32, patch_size=8)), lr=1e-3,
    ),
    "swin": Family(
        320, ("timm", "swin_tiny_patch4_window7_224", dict(
            img_size=32, patch_size=4, window_size=4, embed_dim=32, depths=(1, 2), num_heads=(2, 4),
        )), lr=1e-3,
    ),
}
SEEDS = 0, 1, 2
EXPLORE = 0  # seed of the networks that settings may be chosen on; the others confirm, and are measured once


def build(variant, n_classes):
    "Build a network"
    package, name, config = variant
    if package == "timm":
        import timm
        return timm.create_model(name, num_classes=n_classes, **config)
    import torchvision
    return torchvision.models.get_model(name, weights=None, num_classes=n_classes, **config)


def fit(net, task, steps, lr, seed):
    "Train a network with AdamW and one cycle of the learning rate"
    x, y = task
    g = torch.Generator().manual_seed(seed)
    net = net.train().to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(net.parameters(), lr, weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, steps)
    done = 0
    while done < steps:
        for rows in torch.randperm(len(x), generator=g).split(BATCH):
            if len(rows) < BATCH or done == steps: continue
            batch = normalise(augment(x[rows], 4, True, g), STATS).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(net(batch), y[rows], label_smoothing=.1)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
            done += 1
    return net.eval()


def with_body_of(net, state):
    "Load all tensors of another network that fit: all but those of the head"
    own = net.state_dict()
    net.load_state_dict(own | {k: v for k, v in state.items() if v.shape == own[k].shape})


def classes_of(images, task): return tuple(images.classes.index(name) for name in TASKS[task])


@torch.no_grad()
def accuracy(net, images, task):
    "Compute the accuracy on test images of the task"
    x, y = task_images(images, classes_of(images, task))
    right = [net(normalise(b, STATS)).argmax(1) == t for b, t in zip(x.split(250), y.split(250))]
    return torch.cat(right).float().mean().item()


def train_one(path, family, task, seed, splits):
    "Train one network; children start from their parent, with fewer steps and a lower learning rate"
    train, test = splits
    kind = FAMILIES[family]
    number = FIRST_SEED + 1000*seed + 10*list(FAMILIES).index(family) + list(TASKS).index(task)
    with seeded(number): net = build(kind.variant(seed), len(TASKS[task]))
    share = 1 if task == PARENT else .6
    parent = None
    if task in CHILDREN:
        parent = f"{family}-{PARENT}-{seed}"
        with_body_of(net, load_tensors(path.with_name(f"{parent}.safetensors"))[0])
        share = .4
    start = time.process_time()
    lr = kind.lr if parent is None else share*kind.lr
    fit(net, task_images(train, classes_of(train, task)), int(share*kind.steps), lr, number)
    state = {k: v.detach().contiguous() for k, v in net.state_dict().items()}
    about = dict(family=family, task=task, seed=seed, parent=parent, accuracy=accuracy(net, test, task))
    about["seconds"] = time.process_time() - start
    save_tensors(path, state, about)
    print(path.stem, f"accuracy {about['accuracy']:.2f}, {about['seconds']:.1f} s", flush=True)


def names():
    "List family, task and seed of all networks; parents first"
    tasks = sorted(TASKS, key=lambda task: (task != PARENT, task in CHILDREN))
    return [(f, t, s) for s in SEEDS for t in tasks for f in FAMILIES]


def train(folder):
    "Train what is missing"
    torch.set_num_threads(1)
    splits = load_splits("cifar100")
    (folder/"raw").mkdir(parents=True, exist_ok=True)
    for family, task, seed in names():
        path = folder/"raw"/f"{family}-{task}-{seed}.safetensors"
        if not path.exists(): train_one(path, family, task, seed, splits)


FORMS = "plain", "hub", "lightning", "safetensors", "script", "timm-train"
NAMED = "hub", "script"  # forms that name their classes


def as_hub(folder, net_state, variant, classes):
    "Write a folder as timm pushes it to the Hub"
    package, name, config = variant
    folder.mkdir(parents=True)
    save_file(net_state, folder/"model.safetensors")
    stats = dict(input_size=[3, 32, 32], mean=STATS[0], std=STATS[1])
    about = dict(architecture=f"{package}/{name}" if package != "timm" else name, num_classes=len(classes))
    about |= dict(model_args=config, pretrained_cfg=stats, label_names=classes)
    (folder/"config.json").write_text(json.dumps(about))


def write_model(folder, number, state, variant, classes):
    "Write a network in one of the forms; return its path and whether it names its classes"
    package, name, config = variant
    form = FORMS[number % len(FORMS)]
    folder = folder/form
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"run{number:03}"
    plain = {k: v.clone() for k, v in state.items()}
    if form == "hub":
        as_hub(folder/stem, plain, variant, classes)
        return folder/stem, True
    if form == "plain": torch.save(plain, path := folder/f"{stem}.pt")
    if form == "safetensors": save_file(plain, path := folder/f"{stem}.safetensors")
    if form == "lightning":
        arguments = dict(arch=name, num_classes=len(classes), image_size=32, lr=.003) | config
        body = {f"model.{k}": v for k, v in plain.items()}
        torch.save({"state_dict": body, "hyper_parameters": arguments, "epoch": 3}, path := folder/f"{stem}.ckpt")
    if form == "script":
        about = dict(arch=name, epoch=3, best_acc1=.7, classes=classes) | config
        torch.save(about | dict(state_dict=plain), path := folder/f"{stem}.pth.tar")
    if form == "timm-train":
        arguments = dict(model=name, num_classes=len(classes), img_size=32) | config
        torch.save(dict(arch=name, state_dict=plain, args=arguments, version=2), path := folder/f"{stem}.pth.tar")
    return path, form in NAMED


def write_wrong_files(folder, state):
    "Write files that are no models or cannot be used; return their names"
    folder.mkdir(parents=True)
    key = next(iter(state))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder/"scripted.pt")
    lora = {f"base_model.model.q.lora_{part}.weight": torch.zeros(8, 8) for part in "AB"}
    norms = [k for k in state if k.endswith("running_var")]
    files = {
        "optimizer.pt": dict(state={0: dict(exp_avg=torch.zeros(3))}, param_groups=[dict(lr=.1)]),
        "nan.pt": state | {key: torch.full_like(state[key], torch.nan)},
        "negative.pt": state | {norms[0]: -state[norms[0]].abs() - 1},
        "zero3.pt": dict(module={k: torch.zeros(1) for k in state}, ds_version="0.14"),
        "lora.pt": lora,
        "labels.pt": dict(labels=[1, 2, 3], names=["a", "b"]),
    }
    for name, content in files.items(): torch.save(content, folder/name)
    whole = (folder/"nan.pt").read_bytes()
    (folder/"truncated.pth").write_bytes(whole[:len(whole)//2])
    (folder/"empty.pt").touch()
    (folder/"page.safetensors").write_text("<!DOCTYPE html><html>Not found</html>")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64*"0" + "\nsize 44000000\n"
    (folder/"pointer.safetensors").write_text(pointer)
    (folder/"gone.pt").symlink_to(folder/"nowhere.pt")
    shard = folder/"sharded"
    shard.mkdir()
    index = dict(weight_map={key: "model-00001-of-00002.safetensors"})
    (shard/"model.safetensors.index.json").write_text(json.dumps(index))
    packed = {f"layer.q{part}": torch.zeros(4, 4, dtype=torch.int32) for part in ("weight", "zeros")}
    save_file(packed | {"layer.scales": torch.ones(1, 4)}, folder/"gptq.safetensors")
    return [*files, "scripted.pt", "truncated.pth", "empty.pt", "page.safetensors", "pointer.safetensors", "gone.pt",
            "sharded", "gptq.safetensors"]


def write_folder(folder, seeds):
    "Write the networks as a folder; return what each is, a table for what no file names, and wrong files"
    known = []
    for number, (family, task, seed) in enumerate(names()):
        raw = folder/"raw"/f"{family}-{task}-{seed}.safetensors"
        if seed not in seeds: continue
        state, meta = load_tensors(raw)
        variant = FAMILIES[family].variant(seed)
        path, named = write_model(folder/"models", number, state, variant, TASKS[task])
        known.append(dict(file=str(path), family=family, task=task, seed=seed, named=named, kind="trained",
                          accuracy=meta["accuracy"], parent=meta["parent"], variant=variant,
                          part="explore" if seed == EXPLORE else "confirm"))
    for family, kind in FAMILIES.items():
        variant = kind.variant(0)
        with seeded(FIRST_SEED + 900 + list(FAMILIES).index(family)): state = build(variant, 5).state_dict()
        number = len(FORMS)*(150 + list(FAMILIES).index(family)) + FORMS.index("script")
        path, _ = write_model(folder/"models", number, state, variant, list("abcde"))
        known.append(dict(file=str(path), family=family, task="", seed=-1, named=True, kind="untrained",
                          accuracy=None, parent=None, variant=variant, part=""))
    state, _ = load_tensors(folder/f"raw/resnet-{PARENT}-{EXPLORE}.safetensors")
    wrong = write_wrong_files(folder/"models/wrong", {k: v.clone() for k, v in state.items()})
    return pd.DataFrame(known), wrong


def table_for(known, root):
    "Make the table that a user adds: architecture and size where no file has them"
    rows = []
    for row in known.itertuples():
        form = Path(row.file).relative_to(root).parts[0]
        if form not in ("plain", "safetensors"): continue
        package, name, config = row.variant
        arguments = ", ".join(f"{key}={value!r}" for key, value in config.items())
        path = Path(row.file).relative_to(root).as_posix()
        rows.append(dict(file=path, arch=f"{package}/{name}({arguments})" if config else None, size=32))
    return pd.DataFrame(rows)


def query_all(index, known, table, root):
    "Query the index with each of its models; return a row for each query and each model found"
    of_file = {}
    for row in table.to_dict("records"):
        told = {key: row[key] for key in ("arch", "size") if pd.notna(row[key])}
        of_file[root/row["file"]] = reading_with(told, Reading())
    rows = []
    roles = []
    named = []
    scale = index.scale
    for row in known[known.file.isin(index.manifest.file)].itertuples():
        reading = of_file.get(Path(row.file), Reading())
        answer = index.answer(row.file, k=len(index), reading=reading)
        found = answer.table.assign(query=row.file, recommended=answer.recommended, related=answer.related)
        rows.append(found)
        model = read_model(row.file, reading)
        roles.append(relatives(index, model).assign(query=row.file))
        if row.kind == "trained" and not row.named:
            names_found = name_by_gallery(describe(model), index.gallery, scale)
            named.append(names_found.assign(query=row.file, truth=TASKS[row.task]))
    return pd.concat(rows), pd.concat(roles), pd.concat(named)


def with_classes(index):
    "Look up each class; return a row for each model found that does not name its classes"
    rows = []
    for name in sorted({name for names in TASKS.values() for name in names}):
        try: found = models_with(index.gallery, name, index.scale)
        except ValueError: continue  # no model names it
        rows.append(found[~found.named.astype(bool)].assign(name=name))
    return pd.concat(rows)


def seconds_of_resnet18(folder, n=5):
    "Return the median processor time in which an index reads a ResNet-18 with 1,000 classes"
    import timm
    folder.mkdir()
    for i in range(n + 1):
        with seeded(FIRST_SEED + 990 + i): net = timm.create_model("resnet18")
        for v in net.state_dict().values():
            if v.ndim == 1 and v.is_floating_point(): v += .1*torch.rand(v.shape)
        torch.save(net.state_dict(), folder/f"m{i}.pt")
    times = []
    def progress(done, total): times.append(time.process_time())
    for i in range(n + 1):
        ModelIndex.build(folder/f"m{i}.pt", method=BY_CLASSES, settings=BuildSettings(progress=progress))
        times.append(time.process_time())
    return float(np.median(np.diff(times)[1::2]))


def measure(folder, out, seeds):
    "Index the folder by one command, query it with each of its models, and write a record"
    for name in ("models", "index", "speed"): shutil.rmtree(folder/name, ignore_errors=True)
    known, wrong = write_folder(folder, seeds)
    root = folder/"models"
    start = time.process_time()
    rss = []
    def progress(done, total): rss.append([done, round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)])
    table = table_for(known, root)
    index = ModelIndex.build(root, folder/"index", table=table, settings=BuildSettings(progress=progress))
    seconds = (time.process_time() - start)/rss[-1][0]
    print(index, f"{seconds:.2f} s a file, {rss[-1][1]} MB", flush=True)
    found, roles, named = query_all(index, known, table, root)
    by_class = with_classes(index)
    for name, rows in dict(known=known, found=found, roles=roles, named=named, by_class=by_class).items():
        rows.to_csv(folder/f"{name}.csv", index=False)
    index.rejected.to_csv(folder/"rejected.csv", index=False)
    indexed = index.manifest.file.tolist()
    fields = field_fields(known, TASKS, indexed, index.rejected, wrong, found, roles, named, by_class)
    times = {"a file of the folder": round(seconds, 3), RESNET18: round(seconds_of_resnet18(folder/"speed"), 3)}
    fields |= dict(seconds=times, memory=[rss[0], rss[len(rss)//2], rss[-1]])
    trained = known[known.kind == "trained"]
    accuracy = dict(mean=round(trained.accuracy.mean(), 4), sd=round(trained.accuracy.std(), 4))
    about = dict(
        models=len(trained),
        tasks=len(TASKS),
        data=["cifar100"],
        recipe=["brief"],
        seeds=sorted(set(trained.seed)),
        val_accuracy=accuracy,
    )
    n = trained.part.value_counts().to_dict()
    how = f"{trained.family.nunique()} families, 32×32 pixels; {', '.join(f'{v} in part {k}' for k, v in n.items())}"
    settings = dict(name="cifar100", how=how, seed=FIRST_SEED)
    record = dict(model_set=about, settings=settings) | sources_field(FieldRecord) | fields | provenance()
    FieldRecord.from_dict(record).write(out)


RESNET18 = "a ResNet-18 with 1,000 classes"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help=f"of the networks; {EXPLORE}: exploring")
    args = parser.parse_args()
    with one_thread():
        if args.what == "train": return train(args.folder)
        measure(args.folder, args.out, args.seeds)


if __name__ == "__main__": main()
