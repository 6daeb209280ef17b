#!/usr/bin/env python3
"""Images per second of zoo training on a CPU, against two fastai loops on the same images.

    python benchmarks/zoo_cpu.py [--repeats 5] [--batches 6]

All train the same ResNet20 in batches of 128 random 32x32x3 images, with random crop, mirroring and SGD.
  fastai       what one writes first: PNG files, `ImageDataLoaders`, item transforms CropPad, RandomCrop, FlipItem,
               then Normalize by batch,
               a `Learner` with its default callbacks (only the progress bar is off), float32
  lean         images in memory, a torchvision-style dataset that transforms one PIL image at a time, fastai's
               `DataLoader` and `Learner`, float32
  zoo          the loop of `train_model` in the precision that it takes here; zoo_float32 tells precision from the
               rest
Two comparisons, the sides in turn, ratios within each turn:
  one_process  one torch thread each, no worker processes for loading; also by CPU time, which other load on the
  machine disturbs less
  machine      two zoo processes of one thread each, against one fastai loop with torch's default threads and two
               loading workers;
               left out (null) when other work has the machine, a load above 1 at the start: it slows a loop of
               several threads out of proportion
`core` is the share of a core that the zoo uses: its arithmetic, counted as 3 x 2 x 40.8 million operations an image
(the backward pass as twice the forward pass, convolutions only), over that of a matrix product of 2048 x 2048 in
the same precision; and where a step's time goes.
Writes benchmarks/results/zoo_cpu.json.
"""
import argparse, contextlib, multiprocessing, os, statistics, tempfile, time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
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
from torchvision import transforms as T

from lps.core.files import provenance, write_json
from lps.nets.resnet import ResNet
from lps.zoo.train import BatchLoader, make_learner
from lps.zoo.recipe import best_precision, init_model, recipes
from lps.core.jobs import start_worker

STATS = (.48, .45, .40), (.28, .27, .28)
FLOPS = 3*2*40.8e6
KINDS = dict(
    convolution=("aten::mkldnn_convolution", "aten::convolution_backward"),
    norm_and_relu=(
        "_BatchNormReLU",
        "_BatchNormReLUBackward",
        "aten::native_batch_norm",
        "aten::native_batch_norm_backward",
    ),
)


class Clock(Callback):
    "Wall and CPU time between the first training batch, which warms up, and the last"
    def after_batch(self):
        if not self.training: return
        now = time.perf_counter(), time.process_time()
        if self.iter == 0: self.n, self.start = 0, now
        else: self.n, self.end = self.n + len(self.y), now
    @property
    def rates(self): return [self.n/(b - a) for a, b in zip(self.start, self.end)]


class PerItem(torch.utils.data.Dataset):
    "One PIL image at a time, as torchvision's own data sets do"
    def __init__(self, x, y):
        self.x, self.y = x.permute(0, 2, 3, 1).numpy(), y
        self.tfm = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(*STATS)])
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.tfm(Image.fromarray(self.x[i])), self.y[i]


def data(batches):
    g = torch.Generator().manual_seed(0)
    n = 128*(batches + 1)
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g), torch.randint(0, 2, (n,), generator=g)


def write_files(root, batches):
    "The same images as PNG files, one folder a class; the validation set, which is not timed, is two of them"
    for i, (x, y) in enumerate(zip(*data(batches))):
        for split in ("train", "valid") if i < 2 else ("train",):
            (folder := Path(root)/split/f"class{y}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder/f"{i}.png")


def fit(dls, **kwargs):
    learn = Learner(dls, ResNet(), opt_func=partial(SGD, mom=.9), lr=.1, wd=1e-4, cbs=(clock := Clock()), **kwargs)
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1)
    return clock.rates


def fastai_loop(root, batches, num_workers):
    return fit(
        ImageDataLoaders.from_folder(
            root,
            bs=128,
            num_workers=num_workers,
            item_tfms=[CropPad(40), RandomCrop(32), FlipItem()],
            batch_tfms=Normalize.from_stats(*STATS),
        )
    )


def lean_loop(root, batches, num_workers):
    return fit(
        DataLoaders(DataLoader(PerItem(*data(batches)), bs=128, shuffle=True, num_workers=num_workers), []),
        loss_func=nn.CrossEntropyLoss(),
    )


def zoo_loop(root, batches, num_workers, precision=None):
    r = replace(recipes["paper"], precision=precision or best_precision())
    model = init_model(0, r).to(memory_format=torch.channels_last)
    make_learner(
        model, BatchLoader(*data(batches), r, STATS, torch.Generator().manual_seed(0)), r, [clock := Clock()]
    ).fit(1)
    return clock.rates


def peak(*_):
    "Operations per second of wall time and of CPU time, best of five products"
    a, best = torch.randn(2048, 2048, dtype=getattr(torch, best_precision())), [0, 0]
    for _ in range(5):
        start = time.perf_counter(), time.process_time()
        a @ a
        best = [
            max(v, 2 * 2048**3 / (now - s))
            for v, now, s in zip(best, (time.perf_counter(), time.process_time()), start)
        ]
    return best


def step_shares(*_):
    "Shares of a zoo step's CPU time, after a first step that loads the kernels"
    zoo_loop(None, 2, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p: zoo_loop(None, 4, 0)
    t = {e.key: e.self_cpu_time_total for e in p.key_averages()}
    shares = {k: sum(t.get(n, 0) for n in names)/sum(t.values()) for k, names in KINDS.items()}
    return {k: round(v, 3) for k, v in (shares | dict(other=1 - sum(shares.values()))).items()}


SIDES = dict(
    fastai=fastai_loop,
    lean=lean_loop,
    zoo=zoo_loop,
    zoo_float32=partial(zoo_loop, precision="float32"),
    peak=peak,
    step_shares=step_shares,
)


def serve(pipe, side, threads):
    """A process for one side: runs once at each word from the other end. A zoo process starts as `build` starts its
    workers
    """
    multiprocessing.set_start_method(
        None, force=True
    )  # loading workers start as they do by default, not as this process did
    if side in ("fastai", "lean"): torch.set_num_threads(threads)
    else: start_worker()
    while job := pipe.recv(): pipe.send(SIDES[side](*job))


@contextlib.contextmanager
def processes(*sides, threads=1):
    "A process for each side named"
    ctx, pipes = multiprocessing.get_context("spawn"), []
    for s in sides:
        here, there = ctx.Pipe()
        ctx.Process(target=serve, args=(there, s, threads)).start()
        pipes.append(here)
    try: yield pipes
    finally:
        for p in pipes:
            with contextlib.suppress(BrokenPipeError): p.send(None)


def ask(pipes, job):
    "Rates of these processes together, by wall time and by CPU time"
    for p in pipes: p.send(job)
    return [sum(v) for v in zip(*(p.recv() for p in pipes))]


def spread(values, digits=2):
    return {k: round(f(values), digits) for k, f in dict(median=statistics.median, min=min, max=max).items()}


def compare(repeats, sides):
    "The sides in turn, after one turn that warms up; a list of rates by side, for wall time and for CPU time"
    rows = [{k: ask(*v) for k, v in sides.items()} for _ in range(repeats + 1)][1:]
    return [{k: [r[k][i] for r in rows] for k in sides} for i in (0, 1)]


def table(rates):
    "Images per second, and ratios to both fastai loops"
    out = {k: spread(v, 1) for k, v in rates.items() if k != "peak"}
    for peer in ("fastai", "lean"):
        for k in ("zoo", "zoo_float32"):
            if k in rates: out[f"{k} / {peer}"] = spread([a/b for a, b in zip(rates[k], rates[peer])])
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=5, help="times that each side runs")
    p.add_argument("--batches", type=int, default=6, help="timed batches of 128 images a run")
    p.add_argument("--out", type=Path, default=Path(__file__).parent/"results"/"zoo_cpu.json")
    a, load = p.parse_args(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as root:
        write_files(root, a.batches)
        one, two, names = (root, a.batches, 0), (root, a.batches, 2), ("fastai", "lean", "zoo", "zoo_float32", "peak")
        with processes(*names) as pipes: wall, cpu = compare(a.repeats, {k: ([p], one) for k, p in zip(names, pipes)})
        machine = None
        if load < 1:
            with processes("fastai", "lean", "zoo", "zoo", threads=torch.get_num_threads()) as (f, l, *z):
                machine = table(compare(a.repeats, dict(fastai=([f], two), lean=([l], two), zoo=(z, one)))[0])
        with processes("step_shares") as (p,): p.send(one); shares = p.recv()

    core = dict(operations_per_image=FLOPS, matrix_product_gflops=spread([v/1e9 for v in cpu["peak"]], 0),
                zoo_gflops=spread([v*FLOPS/1e9 for v in cpu["zoo"]], 0),
                zoo_share=spread([v*FLOPS/b for v, b in zip(cpu["zoo"], cpu["peak"])]), step_shares=shares)
    tables = dict(one_process=table(wall), one_process_cpu_time=table(cpu), machine=machine)
    write_json(
        a.out,
        dict(
            what="training images per second, ResNet20, batch 128, random 32x32x3 images",
            precision=best_precision(),
            repeats=a.repeats,
            batches=a.batches,
            fastai_threads_on_machine=torch.get_num_threads(),
            **tables,
            core=core,
            load_at_start=round(load, 2),
            provenance=provenance()
        ),
    )
    for name, rows in tables.items():
        for k, v in (rows or {}).items(): print(f"{name:20} {k:20} {v['median']:8} ({v['min']} to {v['max']})")
    print(core)


if __name__ == "__main__": main()
