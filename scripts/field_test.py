"""Try the index on a folder as practitioners have it: networks of timm and torchvision in several formats.

python scripts/field_test.py train FOLDER    trains 144 networks on CIFAR-100 (about 25 minutes of one core); resumes
"""
import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from lps.core.files import load_tensors, save_tensors
from lps.core.jobs import seeded
from lps.models.model import normalise
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
SEEDS = {"explore": (0,), "confirm": (1, 2)}


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
    return [(f, t, s) for seeds in SEEDS.values() for s in seeds for t in tasks for f in FAMILIES]


def train(folder):
    "Train what is missing"
    torch.set_num_threads(1)
    splits = load_splits("cifar100")
    (folder/"raw").mkdir(parents=True, exist_ok=True)
    for family, task, seed in names():
        path = folder/"raw"/f"{family}-{task}-{seed}.safetensors"
        if not path.exists(): train_one(path, family, task, seed, splits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train"])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    globals()[given.what](given.folder)
