#!/usr/bin/env python3
"""Images per second of training many ResNet20s at the same time on one GPU, against plain fastai loops on the same
GPU.

    python benchmarks/zoo_gpu.py [--models 8 32 100] [--repeats 5] [--epochs 3]

All train ResNet20s on 1000 random 32x32x3 images a task, in batches of 128, with random crop, mirroring and SGD; ten
models share a task.
  fastai               what one writes first: PNG files, `ImageDataLoaders` with loading workers, item transforms
                       CropPad, RandomCrop, FlipItem,
                       then Normalize by batch, a `Learner` with its default callbacks (only the progress bar is
                       off), float32, one model
  lean                 images in memory, a torchvision-style dataset that transforms one PIL image at a time,
                       fastai's `DataLoader`, one model
  fused_float32        `lps.zoo.many`: one network with grouped convolutions, channels last, TF32 off
  fused_tf32           the same with TF32
  fused_tf32_nchw      the same with TF32, channels first
  fused_bfloat16       the same with bfloat16 autocast, channels last: what `train_models` does on a GPU
  fused_bfloat16_nchw  the same with bfloat16 autocast, channels first
  patches_tf32         each convolution as one batched matrix product over models, on unfolded patches; TF32
  patches_bfloat16     the same with bfloat16 autocast
  graphs_tf32          independent networks, each with its step captured in a CUDA graph, replayed on eight streams;
                       TF32
  graphs_bfloat16      the same with bfloat16 autocast
The sides run in turn, ratios are taken within each turn. An epoch is timed from before its first batch (loading
workers start, random numbers
are drawn) to the end of its last on the GPU; validation is not timed, nor is the first epoch, in which kernels are
chosen and captured.
`minutes` is what 500 models x 160 epochs x 1000 images take at that rate. `step_difference` is how far the first
step of each candidate is from
the step of the networks one by one in float32, relative to its length, for the worst of four models (one pixel that
rounding takes over the edge of
a ReLU can make that a percent); `isolated` records whether NaN in one model left the other three unchanged. Writes
benchmarks/results/zoo_gpu.json. With --device cpu it only shows that it works: no graphs, no file.
"""
import argparse, copy, gc, tempfile, time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.vision.augment import CropPad, FlipItem, Normalize, RandomCrop
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from torch import nn
from zoo_cpu import STATS, PerItem, spread

from lps.zoo.many import FusedModels, ManyLinear, MultiLoader, cuda_math, each, many_learner
from lps.core.files import provenance, write_json
from lps.nets.resnet import ResNet
from lps.zoo.recipe import Recipe, init_model, recipes
from lps.zoo.train import StopIfDiverged, make_learner

MODELSET500 = 500*160*1000


@dataclass
class Setup:
    "Training data and device of all sides"
    device: torch.device
    recipe: Recipe = recipes["paper"]
    images: int = 1000
    epochs: int = 3   # timed, after one that is not
    workers: int = 8  # for loading, in the two plain loops
    root: str = ""    # folder with the images of the plain loop

    def task(self, t=0):
        g = torch.Generator().manual_seed(t)
        return torch.randint(0, 256, (self.images, 3, 32, 32), dtype=torch.uint8, generator=g), torch.randint(
            0, 2, (self.images,), generator=g
        )

    def nets(self, M): return [init_model(m, self.recipe) for m in range(M)]

    def loader(self, M):
        tasks = [self.task(t) for t in range(-(-M//10))]
        return MultiLoader(
            [tasks[m // 10] for m in range(M)],
            self.recipe,
            STATS,
            [torch.Generator().manual_seed(m) for m in range(M)],
            self.device,
        )

    def write_files(self):
        "The images of one task as PNG files, one folder a class; the validation set is two of them"
        for i, (x, y) in enumerate(zip(*self.task())):
            for split in ("train", "valid") if i < 2 else ("train",):
                (folder := Path(self.root)/split/f"class{y}").mkdir(parents=True, exist_ok=True)
                Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder/f"{i}.png")


class Clock(Callback):
    "Images per second of all epochs but the first"
    order = 99
    def __init__(self, setup, M=1): self.setup, self.images, self.seconds = setup, M*setup.images, []
    def now(self):
        if self.setup.device.type == "cuda": torch.cuda.synchronize()
        return time.perf_counter()
    def before_train(self): self.start = self.now()
    def after_train(self): self.seconds.append(self.now() - self.start)
    @property
    def rate(self): return self.images*len(self.seconds[1:])/sum(self.seconds[1:])


def plain_fit(dls, setup, **kwargs):
    net = ResNet(setup.recipe.depth, setup.recipe.width).to(setup.device)
    learn = Learner(dls, net, opt_func=partial(SGD, mom=.9), lr=.1, wd=1e-4, cbs=(clock := Clock(setup)), **kwargs)
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1 + setup.epochs)
    return clock.rate


def fastai_loop(setup, M):
    return plain_fit(
        ImageDataLoaders.from_folder(
            setup.root,
            bs=setup.recipe.batch_size,
            num_workers=setup.workers,
            device=setup.device,
            item_tfms=[CropPad(40), RandomCrop(32), FlipItem()],
            batch_tfms=Normalize.from_stats(*STATS, cuda=setup.device.type == "cuda"),
        ),
        setup,
    )


def lean_loop(setup, M):
    dl = DataLoader(
        PerItem(*setup.task()), bs=setup.recipe.batch_size, shuffle=True, num_workers=setup.workers, device=setup.device
    )
    return plain_fit(DataLoaders(dl, []), setup, loss_func=nn.CrossEntropyLoss())


class ChannelsFirst(FusedModels):
    "The fused network in torch's usual memory order"
    def __init__(self, nets): super().__init__(nets); self.to(memory_format=torch.contiguous_format)
    def forward(self, x): return self.nets(x.flatten(1, 2).contiguous())


class PatchConv(nn.Conv2d):
    "A grouped convolution as one batched matrix product over the groups; maps are `(M·C, n, H, W)`"
    def forward(self, x):
        M, (k, _), (s, _) = self.groups, self.kernel_size, self.stride
        x = F.pad(x, (self.padding[0],)*4)
        h, w = ((v - k)//s + 1 for v in x.shape[2:])
        patches = torch.stack(
            [x[..., i : i + s * (h - 1) + 1 : s, j : j + s * (w - 1) + 1 : s] for i in range(k) for j in range(k)], 1
        )
        return (each(self.weight, M).flatten(2) @ patches.view(M, -1, x.shape[1]*h*w)).view(-1, x.shape[1], h, w)


class PatchNorm(nn.BatchNorm1d):
    def forward(self, x): return super().forward(x.flatten(1)[None]).view_as(x)


class PatchLinear(ManyLinear):
    def forward(self, x): return super().forward(x.t())


class Patches(FusedModels):
    "The fused network with its models and channels in front, so that patches need no transposing"
    def __init__(self, nets):
        super().__init__(nets)
        self.to(memory_format=torch.contiguous_format)
        for m in self.nets.modules():
            m.__class__ = {nn.Conv2d: PatchConv, nn.BatchNorm2d: PatchNorm, ManyLinear: PatchLinear}.get(
                type(m), type(m)
            )
    def forward(self, x): return self.nets(x.flatten(1, 2).transpose(0, 1).contiguous())


def together(nets, dl, setup, epochs=1, clock=None, model=FusedModels, precision="float32", tf32=False):
    "Train the networks as one, by one `Learner`"
    net = model(nets).to(setup.device)
    with cuda_math(tf32):
        many_learner(net, dl, replace(setup.recipe, precision=precision), [clock] if clock else []).fit(epochs)
    return net.unfuse()


class Graphed:
    "One network whose training step, for each size of batch, is a CUDA graph"
    def __init__(self, net, batches, recipe, precision):
        self.net = net.cuda().to(memory_format=torch.channels_last).train()
        self.opt, self.precision, self.graphs = (
            torch.optim.SGD(net.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay),
            precision,
            {},
        )
        before = copy.deepcopy(net.state_dict())
        for x, y in batches: self.capture(x.clone(memory_format=torch.channels_last), y.clone())
        net.load_state_dict(before)
        for s in self.opt.state.values(): s["momentum_buffer"].zero_()

    def step(self, x, y):
        self.opt.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.precision == "bfloat16", cache_enabled=False):
            pred = self.net(x)
        F.cross_entropy(pred.float(), y).backward()
        self.opt.step()

    def capture(self, x, y):
        (side := torch.cuda.Stream()).wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3): self.step(x, y)
        torch.cuda.current_stream().wait_stream(side)
        self.opt.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): self.step(x, y)
        self.graphs[len(x)] = graph, x, y

    def __call__(self, x, y):
        graph, x0, y0 = self.graphs[len(x)]
        x0.copy_(x), y0.copy_(y)
        graph.replay()


def graphs(nets, dl, setup, epochs=1, clock=None, precision="float32", tf32=False, n_streams=8):
    "Train the networks apart, each by its own graphs, several at the same time on streams"
    with cuda_math(tf32):
        sizes = {len(yb): (xb, yb) for xb, yb in dl}
        models, streams = [
            Graphed(net, [(xb[:, m], yb[:, m]) for xb, yb in sizes.values()], setup.recipe, precision)
            for m, net in enumerate(nets)
        ], [torch.cuda.Stream() for _ in range(n_streams)]
        for _ in range(epochs):
            if clock: clock.before_train()
            for xb, yb in dl:
                main = torch.cuda.current_stream()
                for s in streams: s.wait_stream(main)
                for m, model in enumerate(models):
                    with torch.cuda.stream(streams[m % n_streams]): model(xb[:, m], yb[:, m])
                for s in streams: main.wait_stream(s)
            if clock: clock.after_train()
    return [m.net.cpu().to(memory_format=torch.contiguous_format).eval() for m in models]


CANDIDATES = dict(
    fused_float32=together,
    fused_tf32=partial(together, tf32=True),
    fused_tf32_nchw=partial(together, model=ChannelsFirst, tf32=True),
    fused_bfloat16=partial(together, precision="bfloat16"),
    fused_bfloat16_nchw=partial(together, model=ChannelsFirst, precision="bfloat16"),
    patches_tf32=partial(together, model=Patches, tf32=True),
    patches_bfloat16=partial(together, model=Patches, precision="bfloat16"),
    graphs_tf32=partial(graphs, tf32=True),
    graphs_bfloat16=partial(graphs, precision="bfloat16"),
)
ON_CUDA = {"graphs_tf32", "graphs_bfloat16"}


class OneBatch(list):
    "A loader of one batch"
    def __init__(self, batch, device): super().__init__([batch]); self.device = device


def candidate_rate(fit, setup, M):
    fit(setup.nets(M), setup.loader(M), setup, 1 + setup.epochs, clock := Clock(setup, M))
    return clock.rate


def weights(net): return torch.cat([p.detach().flatten() for p in net.parameters()])


def first_steps(setup, M=4):
    "A batch for M networks, the networks, and the networks after one step, each by itself in float32"
    xb, yb = next(iter(setup.loader(M)))
    alone = [copy.deepcopy(net).to(setup.device, memory_format=torch.channels_last) for net in setup.nets(M)]
    with cuda_math():
        for m, net in enumerate(alone):
            make_learner(
                net, OneBatch((xb[:, m], yb[:, m]), setup.device), replace(setup.recipe, precision="float32")
            ).remove_cb(StopIfDiverged).fit(1)
    return OneBatch((xb, yb), setup.device), setup.nets(M), [net.cpu() for net in alone]


def check(fit, batch, before, alone, setup):
    "Compare the first step with separate steps, and check whether NaN stays in one model"
    after = fit(copy.deepcopy(before), batch, setup)
    difference = max(
        ((weights(a) - weights(b)).norm() / (weights(b) - weights(c)).norm()).item()
        for a, b, c in zip(after, alone, before)
    )
    (spoilt := copy.deepcopy(before))[1].layer1[0].conv1.weight.data[:] = float("nan")
    rest = fit(spoilt, batch, setup)
    same = [torch.allclose(weights(a), weights(b), rtol=1e-2, atol=1e-2) for a, b in zip(rest, after)]
    return dict(step_difference=float(f"{difference:.2g}"), isolated=all(v for m, v in enumerate(same) if m != 1))


def tried(f, *args):
    "Return the result of a function or the reason of its failure, so that the other candidates still run"
    try: return f(*args)
    except RuntimeError as e: return dict(failed=(str(e).splitlines() or [type(e).__name__])[0][:200])


def turn(sides, M, setup):
    "Rate of each side, or why there is none"
    rates = {}
    for name, side in sides.items():
        rates[name] = tried(side, setup, M)
        if setup.device.type == "cuda": gc.collect(), torch.cuda.empty_cache()
    return rates


def rows(turns):
    "Images per second, ratios to both plain loops and projected minutes; all with median, least and most"
    out = {}
    for name in turns[0]:
        rates = [t[name] for t in turns]
        if failed := [r for r in rates if isinstance(r, dict)]: out[name] = failed[0]; continue
        ratios = {
            f"over_{p}": spread([t[name] / t[p] for t in turns])
            for p in ("fastai", "lean")
            if not any(isinstance(t[p], dict) for t in turns)
        }
        out[name] = dict(
            images_per_second=spread(rates, 0), minutes=spread([MODELSET500 / r / 60 for r in rates], 1), **ratios
        )
    return out


def measure(setup, models, repeats):
    "Checks of all candidates, and for each number of models the rows of the table"
    with tempfile.TemporaryDirectory() as root:
        (setup := replace(setup, root=root)).write_files()
        todo = {k: f for k, f in CANDIDATES.items() if setup.device.type == "cuda" or k not in ON_CUDA}
        steps = first_steps(setup)
        checks = {k: tried(check, f, *steps, setup) for k, f in todo.items()}
        sides = dict(fastai=fastai_loop, lean=lean_loop) | {k: partial(candidate_rate, f) for k, f in todo.items()}
        return checks, {M: rows([turn(sides, M, setup) for _ in range(repeats)]) for M in models}


def show(checks, table):
    for k, v in checks.items():
        print(
            f"{k:20}"
            + (
                v.get("failed")
                or f"step differs by {v['step_difference']:<8} {'isolated' if v['isolated'] else 'NaN SPREADS'}"
            )
        )
    for M, sides in table.items():
        print(f"\n{M} models{'images/s':>24}{'over fastai':>14}{'(range)':>18}{'minutes for ModelSet500':>26}")
        for k, v in sides.items():
            if "failed" in v: print(f"{k:20}{v['failed']}"); continue
            r = v.get("over_fastai", dict.fromkeys(("median", "min", "max"), float("nan")))
            print(
                f"{k:20}{v['images_per_second']['median']:>12.0f}{r['median']:>14.2f}{r['min']:>10.2f} to"
                f" {r['max']:<8.2f}{v['minutes']['median']:>20.1f}"
            )


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda", help="cuda, or cpu to see that the script works")
    p.add_argument("--models", type=int, nargs="+", default=[8, 32, 100], help="how many models at the same time")
    p.add_argument("--repeats", type=int, default=5, help="times that each side runs")
    p.add_argument("--epochs", type=int, default=3, help="timed epochs a run")
    p.add_argument("--images", type=int, default=1000, help="training images of a task")
    p.add_argument("--batch-size", type=int, default=128, help="images of a model in a batch")
    p.add_argument("--depth", type=int, default=20, help="layers of the ResNet")
    p.add_argument("--width", type=int, default=16, help="channels of its first stage")
    p.add_argument("--workers", type=int, default=8, help="loading processes of the plain loops")
    p.add_argument(
        "--out", type=Path, help="results file; default: results/zoo_gpu.json beside this script, none on a CPU"
    )
    a = p.parse_args(argv)
    device = torch.device(a.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        p.error("torch sees no GPU here: --device cpu shows that the script works, at a small size")
    recipe = replace(recipes["paper"], batch_size=a.batch_size, depth=a.depth, width=a.width)
    checks, table = measure(Setup(device, recipe, a.images, a.epochs, a.workers), a.models, a.repeats)
    gpu = (
        dict(name=torch.cuda.get_device_name(), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
        if device.type == "cuda"
        else None
    )
    out = a.out or (Path(__file__).parent/"results"/"zoo_gpu.json" if gpu else None)
    what = (
        f"training images per second, ResNet{a.depth} of width {a.width}, batch {a.batch_size}, {a.images} random"
        " 32x32x3 images a task"
    )
    if out:
        write_json(
            out,
            dict(
                what=what,
                gpu=gpu,
                repeats=a.repeats,
                epochs=a.epochs,
                workers=a.workers,
                checks=checks,
                models=table,
                provenance=provenance(),
            ),
        )
    show(checks, table)


if __name__ == "__main__": main()
