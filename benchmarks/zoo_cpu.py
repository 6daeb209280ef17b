#!/usr/bin/env python3
"""Images per second of zoo training on a CPU, against a plain fastai loop on the same images.

    python benchmarks/zoo_cpu.py [--repeats 5] [--batches 6]

The plain loop is what one writes first: a torchvision-style dataset that crops, mirrors and normalises one PIL image at a time,
fastai's `DataLoader`, `Learner` with its own SGD, float32. Same ResNet20, same batch of 128, random 32x32x3 images.
Two comparisons, each alternating between the two sides, medians of the repeats:
  one process   one torch thread each, no worker processes for loading
  machine       two zoo processes of one thread each, against one plain loop with torch's default threads and two loading workers
Ours is also run in float32, to tell precision from the rest. Writes benchmarks/results/zoo_cpu.json.
"""
import argparse, contextlib, multiprocessing, os, statistics, time
from dataclasses import replace
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from functools import partial
from PIL import Image
from torch import nn
from torchvision import transforms as T

from lps.modelset import provenance, write_json
from lps.resnet import ResNet
from lps.zoo import BatchLoader, _start_worker, best_precision, init_model, make_learner, recipes

STATS = (.48, .45, .40), (.28, .27, .28)


class Clock(Callback):
    "Seconds between the first batch, which warms up, and the last"
    def after_batch(self):
        if self.iter == 0 and self.epoch == 0: self.n, self.start = 0, time.perf_counter()
        else: self.n += len(self.y); self.end = time.perf_counter()
    @property
    def rate(self): return self.n/(self.end - self.start)


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


def plain(batches, num_workers):
    "Images per second of the plain loop"
    dls = DataLoaders(DataLoader(PerItem(*data(batches)), bs=128, shuffle=True, num_workers=num_workers), [])
    learn = Learner(dls, ResNet(), loss_func=nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=.9), lr=.1, wd=1e-4, cbs=(clock := Clock()))
    with learn.no_logging(): learn.fit(1)
    return clock.rate


def ours(batches, precision='auto'):
    "Images per second of `train_model`'s loop"
    r = replace(recipes['paper'], precision=best_precision() if precision == 'auto' else precision)
    model = init_model(0, r).to(memory_format=torch.channels_last)
    make_learner(model, BatchLoader(*data(batches), r, STATS, torch.Generator().manual_seed(0)), r, [clock := Clock()]).fit(1)
    return clock.rate


SIDES = dict(plain=lambda batches, workers: plain(batches, workers), zoo=lambda batches, _: ours(batches),
             zoo_float32=lambda batches, _: ours(batches, 'float32'))


def serve(pipe, side, threads):
    "A process for one side: trains once at each word from the other end. A zoo process starts as `build` starts its workers"
    if side == 'plain': torch.set_num_threads(threads)
    else: _start_worker()
    pipe.send(SIDES[side](2, 0))
    while job := pipe.recv(): pipe.send(SIDES[side](*job))


@contextlib.contextmanager
def processes(*sides, threads=1):
    "A process for each side named, ready to train"
    ctx, pipes = multiprocessing.get_context('spawn'), []
    for s in sides:
        here, there = ctx.Pipe()
        ctx.Process(target=serve, args=(there, s, threads)).start()
        pipes.append(here)
    for p in pipes: p.recv()
    try: yield pipes
    finally:
        for p in pipes: p.send(None)


def rate(pipes, *job):
    "Images per second of these processes together"
    for p in pipes: p.send(job)
    return sum(p.recv() for p in pipes)


def spread(values): return dict(median=round(statistics.median(values), 1), min=round(min(values), 1), max=round(max(values), 1), n=len(values))


def compare(repeats, sides):
    "Run the sides in turn; medians, and ratios to the plain loop within each repeat"
    rows = [{k: f() for k, f in sides.items()} for _ in range(repeats)]
    out = {k: spread([r[k] for r in rows]) for k in sides}
    for k in list(sides)[1:]:
        ratios = [r[k]/r['plain'] for r in rows]
        out[f'{k} / plain'] = dict(median=round(statistics.median(ratios), 2), min=round(min(ratios), 2), max=round(max(ratios), 2))
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--repeats', type=int, default=5, help="times that each side runs")
    p.add_argument('--batches', type=int, default=6, help="timed batches of 128 images a run")
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'zoo_cpu.json')
    a = p.parse_args()
    threads, n = torch.get_num_threads(), a.batches
    with processes('plain', 'zoo', 'zoo_float32') as (p, z, f):
        one = compare(a.repeats, dict(plain=lambda: rate([p], n, 0), zoo=lambda: rate([z], n, 0), zoo_float32=lambda: rate([f], n, 0)))
    with processes('plain', 'zoo', 'zoo', threads=threads) as (p, *z):
        machine = compare(a.repeats, dict(plain=lambda: rate([p], n, 2), zoo=lambda: rate(z, n, 0)))

    result = dict(what="training images per second, ResNet20, batch 128, random 32x32x3 images", precision=best_precision(), plain_threads=threads,
                  one_process=one, machine=machine, load_average=[round(v, 2) for v in os.getloadavg()], provenance=provenance())
    write_json(a.out, result)
    for k in ('one_process', 'machine'):
        for name, v in result[k].items(): print(f"{k:12} {name:20} {v['median']:8} ({v['min']} to {v['max']})")


if __name__ == '__main__': main()
