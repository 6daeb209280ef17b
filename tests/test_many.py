"""Many networks trained as one: each gets the batches, gradients and fate that it would have alone"""
import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from fastai.callback.core import Callback
from torch.utils._python_dispatch import TorchDispatchMode

import lps.zoo.many as many
import lps.zoo.train as single
from lps.zoo.many import FusedModels, MultiLoader, SummedLoss, accuracies, each, train_models
from lps.core.files import load_tensors
from lps.core.jobs import one_thread
from lps.nets.resnet import ResNet
from lps.zoo.tasks import augment, channel_stats, load_images, pair_classes, task_images
from lps.zoo.train import BatchLoader, Diverged, KeepEpochs, accuracy, train_model
from lps.zoo.recipe import init_model, recipes

TINY = replace(recipes["digits"], name="tiny", epochs=3, milestones=(2,), depth=8, width=4, batch_size=64)
SEEDS = [11, 12, 13]


@pytest.fixture(autouse=True)
def on_one_thread():
    with one_thread(): yield


@pytest.fixture(scope="module")
def tasks():
    "Three tasks on digits, with as many training images, and validation images of different number"
    train, test = load_images("digits"), load_images("digits", "test")
    pairs = pair_classes(10)[:3]
    return [
        (tuple(v[:150] for v in task_images(train, p)), tuple(v[: 40 + i] for v in task_images(test, p)))
        for i, p in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def stats(): return channel_stats(load_images("digits"))


def sgd(model): return torch.optim.SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=1e-2)


def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("shortcut", ["conv", "pad_end", "pad_both"])
@pytest.mark.parametrize("M", [1, 3])
def test_a_fused_step_is_the_serial_step(shortcut, M):
    torch.manual_seed(0)
    nets = [ResNet(8, 4, n_classes=3, shortcut=shortcut) for _ in range(M)]
    fused, opts = FusedModels(nets), [sgd(n) for n in nets]
    loss, opt = SummedLoss(fused), sgd(fused)
    for n in (12, 5):
        xb, yb = torch.randn(n, M, 3, 16, 16), torch.randint(0, 3, (n, M))
        losses = [F.cross_entropy(net(xb[:, m]), yb[:, m]) for m, net in enumerate(nets)]
        total = loss(fused(xb), yb)
        torch.testing.assert_close(total, sum(losses)), torch.testing.assert_close(
            loss.each, torch.stack(losses).detach()
        )
        for l, o in zip([*losses, total], [*opts, opt]): l.backward(); o.step(); o.zero_grad()
    for m, (net, back) in enumerate(zip(nets, fused.unfuse(), strict=True)):
        for k, v in net.state_dict().items():
            torch.testing.assert_close(
                back.state_dict()[k], v, rtol=1e-4, atol=2e-6, msg=lambda s: f"{k} of network {m}: {s}"
            )
        for p, q in zip(net.parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(
                each(opt.state[q]["momentum_buffer"], M)[m],
                opts[m].state[p]["momentum_buffer"].view_as(each(q, M)[m]),
                rtol=1e-3,
                atol=1e-5,
            )


def test_taking_apart_gives_back_every_bit_and_draws_nothing():
    nets = [ResNet(8, 4, shortcut="conv") for _ in range(3)]
    for i, n in enumerate(nets):
        for _ in range(i): n(torch.randn(4, 3, 8, 8))
    before = torch.random.get_rng_state()
    back = FusedModels(nets).unfuse()
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(nets, back, strict=True):
        assert (
            same(a, b) and list(a.state_dict()) == list(b.state_dict()) and not b.training and b.fc.weight.requires_grad
        )
        assert all(v.is_contiguous() for v in b.state_dict().values())
    with torch.no_grad(): back[0].conv1.weight.zero_()
    assert nets[0].conv1.weight.any() and back[1].conv1.weight.any()


CHANGES = [dict(), dict(pad=0), dict(flip=True), dict(pad=4, flip=True), dict(pad=0, flip=True)]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_batches_are_those_of_the_models_alone(tasks, change):
    recipe = replace(TINY, **change)
    trains = [tasks[i][0] for i in (0, 1, 0)]
    stats = [((.1*i,), (.3 + .1*i,)) for i in range(3)]
    def generators(): return [torch.Generator().manual_seed(s) for s in SEEDS]
    many_dl, gens = MultiLoader(trains, recipe, stats, g := generators()), generators()
    alone = [BatchLoader(*t, recipe, s, g1) for t, s, g1 in zip(trains, stats, gens)]
    assert len(many_dl.images) == 300 and len(many_dl) == len(alone[0])
    for _ in range(2):
        for (xb, yb), *singles in zip(many_dl, *alone, strict=True):
            assert xb.flatten(1, 2).is_contiguous(memory_format=torch.channels_last)
            for m, (x, y) in enumerate(singles): assert torch.equal(xb[:, m], x) and torch.equal(yb[:, m], y)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(g, gens))


def test_colour_images_are_cut_out_alike():
    x, y = torch.randint(0, 256, (20, 3, 9, 12), dtype=torch.uint8), torch.arange(20)
    recipe, one = replace(TINY, pad=4, flip=True, batch_size=20), ((0.,)*3, (1/255,)*3)
    (xb, yb), = MultiLoader([(x, y)], recipe, one, [torch.Generator().manual_seed(1)])
    order = torch.randperm(20, generator=(g := torch.Generator().manual_seed(1)))
    assert torch.equal(yb[:, 0], order) and torch.equal(xb[:, 0].round().to(torch.uint8), augment(x[order], 4, True, g))


@pytest.fixture
def in_double(monkeypatch):
    "Train in float64: rounding cannot grow to anything in so few steps, so whatever differs is an error"
    for module in (single, many): monkeypatch.setattr(module, "init_model", lambda *a: init_model(*a).double())
    def doubled(f): return lambda *a: f(*a).double()
    monkeypatch.setattr(single, "normalise", doubled(single.normalise))
    monkeypatch.setattr(many, "_normalise", doubled(many._normalise))


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("given", [True, False])
def test_a_training_is_the_serial_training(tasks, stats, in_double, M, given):
    recipe = replace(TINY, flip=True)
    together = train_models(tasks[:M], recipe, SEEDS[:M], stats if given else None, "cpu")
    for t, s, (net, metrics) in zip(tasks, SEEDS, together):
        alone, m = train_model(*t, recipe, s, stats if given else None)
        for k, v in alone.state_dict().items(): torch.testing.assert_close(net.state_dict()[k], v, rtol=1e-8, atol=1e-9)
        assert metrics.keys() == m.keys() and {**metrics, "seconds": 0} == {**m, "seconds": 0}


def test_in_float32_and_bfloat16_models_learn_as_alone(tasks, stats):
    for precision in ("float32", "bfloat16"):
        recipe, before = (
            replace(TINY, epochs=8, milestones=(6,), batch_size=32, precision=precision),
            torch.random.get_rng_state(),
        )
        together = train_models(tasks, recipe, SEEDS, stats, "cpu")
        alone = [train_model(*t, recipe, s, stats)[1] for t, s in zip(tasks, SEEDS)]
        assert torch.equal(before, torch.random.get_rng_state())
        assert all(m["precision"] == precision and m["train_accuracy"] > .85 for _, m in together), together
        assert all(abs(m["train_accuracy"] - a["train_accuracy"]) < .1 for (_, m), a in zip(together, alone))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_mean_accuracy_is_that_of_serial_runs_within_two_standard_errors(tasks, stats, precision):
    recipe, seeds = replace(TINY, precision=precision), range(8)
    side_by_side = torch.tensor(
        [m["val_accuracy"] for _, m in train_models([tasks[0]] * 8, recipe, list(seeds), stats)], dtype=torch.double
    )
    serial = torch.tensor(
        [train_model(*tasks[0], recipe, s, stats)[1]["val_accuracy"] for s in seeds], dtype=torch.double
    )
    assert (side_by_side.mean() - serial.mean()).abs() <= 2*serial.std()/8**.5, (side_by_side, serial)
    assert .6 < serial.mean() < 1 and serial.std() > 0


def test_accuracies_of_unequal_numbers_of_images(tasks, stats):
    nets = [init_model(s, TINY, 1).eval() for s in SEEDS]
    xys = [tuple(v[:n] for v in t[0]) for t, n in zip(tasks, (150, 7, 126))]
    assert accuracies(FusedModels(nets), xys, stats) == [accuracy(n, *xy, stats) for n, xy in zip(nets, xys)]


class Spoil(Callback):
    "NaN in one network, before a batch or in what no batch sees"
    def __init__(self, *models, epoch=1, where="weight"): self.models, self.at, self.where = models, epoch, where
    def spoil(self, v): each(v.data, self.model.M)[list(self.models)] = float("nan")
    def before_batch(self):
        if self.where == "weight" and (self.epoch, self.iter) == (self.at, 1):
            self.spoil(self.model.nets.layer2[0].conv1.weight)
    def after_batch(self):
        if self.where == "statistic" and (self.epoch, self.iter) == (self.at, 2):
            self.spoil(self.model.nets.bn1.running_var)


@pytest.fixture(scope="module")
def sound(tasks, stats):
    "The three models, nothing spoilt"
    with one_thread(): return train_models(tasks, TINY, SEEDS, stats, "cpu")


@pytest.mark.parametrize("where, words", [
    ("weight", "the loss is not finite in epoch 1, batch 1"),
    ("statistic", "a weight or statistic is not finite after epoch 1")])
def test_one_that_diverges_leaves_the_others_alone(tasks, stats, sound, where, words):
    class Log(Callback):
        def after_batch(self): assert torch.isfinite(self.loss)
        def after_epoch(self): seen.append(sorted(self.model.diverged()))
    seen = []
    spoilt = train_models(tasks, TINY, SEEDS, stats, "cpu", [Spoil(1, where=where), Log()])
    assert isinstance(spoilt[1], Diverged) and str(spoilt[1]) == words and seen == [[], [1], [1]]
    assert (
        all(same(spoilt[m][0], sound[m][0]) for m in (0, 2))
        and spoilt[0][1]["val_accuracy"] == sound[0][1]["val_accuracy"]
    )


def test_when_all_diverge_training_ends(tasks, stats):
    class Count(Callback):
        def before_epoch(self): epochs.append(self.epoch)
    epochs = []
    wild = train_models(tasks, replace(TINY, lr=1e18), SEEDS, stats, "cpu", [Count()])
    assert epochs == [0] and all(isinstance(r, Diverged) and "epoch 0" in str(r) for r in wild)


class CutOff(Callback):
    def before_epoch(self):
        if self.epoch == 2: raise InterruptedError("here the machine fails")


@pytest.mark.parametrize("spoilt", [(), (2,)])
def test_resumed_is_uninterrupted(tmp_path, tasks, stats, spoilt):
    file, kept, log = tmp_path/"state.safetensors", [], []
    class Log(Callback):
        def before_train(self): log.append(self.epoch)
    args = dict(stats=stats, device="cpu", every=1, keep=(1, 2), kept=lambda n, r: kept.append((n, r)))
    straight = train_models(tasks, TINY, SEEDS, cbs=[Spoil(*spoilt, epoch=0)], **args)
    assert [n for n, _ in kept] == [1, 2]
    with pytest.raises(InterruptedError):
        train_models(tasks, TINY, SEEDS, cbs=[Spoil(*spoilt, epoch=0), CutOff()], checkpoint=file, **args)
    state, meta = load_tensors(file)
    assert meta["epoch"] == 2 and all(v.isfinite().all() for v in state.values())
    resumed = train_models(tasks, TINY, SEEDS, cbs=[Log()], checkpoint=file, **args)
    assert log == [2] and [n for n, _ in kept] == [1, 2]*2
    for m, (a, b) in enumerate(zip(straight, resumed)):
        if m in spoilt:
            assert str(a) == str(b) and isinstance(b, Diverged) and isinstance(kept[0][1][m], Diverged)
        else:
            assert (
                same(a[0], b[0])
                and a[1]["val_accuracy"] == b[1]["val_accuracy"]
                and kept[0][1][m][1]["val_accuracy"] <= 1
            )
    log.clear()
    train_models(tasks, TINY, [1, 2, 3], cbs=[Log()], checkpoint=file, stats=stats, device="cpu")
    assert log == [0, 1, 2], "a checkpoint of other models was taken up"


def test_a_kept_network_is_what_it_is_alone(tasks, stats, in_double):
    kept, alone = {}, {}
    train_models(tasks, TINY, SEEDS, stats, "cpu", keep=(2,), kept=lambda n, r: kept.update({n: r}))
    train_model(
        *tasks[1], TINY, SEEDS[1], stats, [KeepEpochs((2,), lambda n, net: alone.update({n: copy.deepcopy(net)}))]
    )
    for k, v in alone[2].state_dict().items():
        torch.testing.assert_close(kept[2][1][0].state_dict()[k], v, rtol=1e-8, atol=1e-9)


class Waits(TorchDispatchMode):
    "Counts how often a number is fetched from a tensor, for which a GPU would have to be waited for"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        return func(*args, **(kwargs or {}))


def test_no_batch_waits_for_the_device(tasks, stats):
    def waits(batch_size):
        with Waits() as w: train_models(tasks, replace(TINY, epochs=1, batch_size=batch_size), SEEDS, stats, "cpu")
        return w.n
    assert waits(75) == waits(10)


def test_what_cannot_be_trained_together_is_said(tasks, stats):
    gens = [torch.Generator()]*2
    (x, y), valid = tasks[0]
    for bad, words in [
            ([(x, y), (x[:20], y[:20])], "model 1 has 20 training images, model 0 has 150"),
            ([(x, y), (x[:, :, :7], y)], r"model 1 are \(1, 7, 8\), of model 0 \(1, 8, 8\)"),
            ([(x, y[:20])], "150 images and 20 labels"),
            ([(x[:0], y[:0])], "model 0 has no images"),
            ([(x, y)], "1 models, but 2 generators"),
            ([], "0 models")]:
        with pytest.raises(ValueError, match=words): MultiLoader(bad, TINY, stats, gens)
    for nets, words in [
            ([], "0 networks"),
            ([ResNet(8, 4), ResNet(14, 4)], "network 1 is .*14.*network 0 is .*8"),
            ([ResNet(8, 4), ResNet(8, 4, shortcut="pad_end")], "pad_end")]:
        with pytest.raises(ValueError, match=words): FusedModels(nets)
    constant = (torch.zeros_like(x), y), valid
    for how, words in [
            (dict(tasks=[constant]), "channel 0 .* is 0 in every pixel"),
            (dict(device="meta"), "unknown device 'meta'"),
            (dict(seeds=[2**70]), "give a whole number"),
            (dict(until=4), "recipe 'tiny' has 3"),
            (dict(every=0), "every 0 epochs: at least 1")]:
        with pytest.raises(ValueError, match=words):
            train_models(**dict(tasks=tasks[:1], recipe=TINY, seeds=[1], device="cpu") | how)
    with pytest.raises(ValueError, match="3 tasks, but 2 seeds"): train_models(tasks, TINY, [1, 2], stats, "cpu")
    with pytest.raises(ValueError, match="pass a function"): train_models(tasks, TINY, SEEDS, stats, "cpu", keep=(1,))
    with pytest.raises(ValueError, match="20 training images"):
        train_models([tasks[0], ((x[:20], y[:20]), valid)], TINY, [1, 2], device="cpu")


def test_on_a_machine_with_a_gpu_a_single_training_stays_on_the_cpu(tasks, stats, monkeypatch):
    "fastai moves a model to the GPU unless its batches say where they are"
    for module in ("fastai.callback.core", "fastai.learner"):
        monkeypatch.setattr(f"{module}.default_device", lambda *a: torch.device("meta"))
    net, _ = train_model(*tasks[0], replace(TINY, epochs=1), 0, stats)
    (other, _), = train_models(tasks[:1], replace(TINY, epochs=1), [0], stats, "cpu")
    assert net.conv1.weight.device.type == other.conv1.weight.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_on_a_gpu_models_are_what_they_are_on_a_cpu(tasks, stats, precision):
    recipe = replace(TINY, epochs=1, precision=precision)
    cpu, gpu = train_models(tasks, replace(recipe, precision="float32"), SEEDS, stats, "cpu"), train_models(
        tasks, recipe, SEEDS, stats, "cuda"
    )
    for (a, _), (b, m) in zip(cpu, gpu):
        assert (
            m["precision"] == (precision if precision != "auto" else "bfloat16") and b.conv1.weight.device.type == "cpu"
        )
        if precision == "float32": torch.testing.assert_close(a.conv1.weight, b.conv1.weight, rtol=1e-3, atol=1e-4)
        else: assert F.cosine_similarity(a.conv1.weight.flatten(), b.conv1.weight.flatten(), 0) > .95
    spoilt = train_models(tasks, recipe, SEEDS, stats, "cuda", [Spoil(1, epoch=0)])
    assert isinstance(spoilt[1], Diverged) and not any(isinstance(spoilt[m], Diverged) for m in (0, 2))


@pytest.fixture
def zoo_gpu(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT/"benchmarks"), *sys.path])
    import zoo_gpu
    return zoo_gpu


def test_every_network_of_the_gpu_benchmark_has_the_serial_gradients(zoo_gpu):
    nets, xb, yb = (
        [init_model(s, TINY).double() for s in SEEDS],
        torch.randn(5, 3, 3, 16, 16).double(),
        torch.randint(0, 2, (5, 3)),
    )
    models = [cls(nets) for cls in (FusedModels, zoo_gpu.ChannelsFirst, zoo_gpu.Patches)]
    for m, net in enumerate(nets): F.cross_entropy(net(xb[:, m]), yb[:, m]).backward()
    for model in models:
        SummedLoss(model)(model(xb), yb).backward()
        for m, (net, back) in enumerate(zip(nets, model.unfuse())):
            for p, q in zip(net.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(each(q.grad, 3)[m].view_as(p), p.grad)
            for k, v in net.state_dict().items(): torch.testing.assert_close(back.state_dict()[k], v)


def test_gpu_benchmark_runs_at_a_small_size(zoo_gpu, tmp_path, capsys):
    zoo_gpu.main(
        '--device cpu --models 2 --images 12 --batch-size 8 --depth 8 --width 4 --repeats 1 --epochs 1 --workers 0'
        f' --out {tmp_path/"r.json"}'.split()
    )
    r = json.loads((tmp_path/"r.json").read_text())
    assert set(r["checks"]) == set(zoo_gpu.CANDIDATES) - zoo_gpu.ON_CUDA and not [
        v for v in r["checks"].values() if "failed" in v
    ]
    for name, c in r["checks"].items():
        assert c["isolated"] and c["step_difference"] < (0.3 if "bfloat16" in name else 0.05), (name, c)
    table = r["models"]["2"]
    assert set(table) == {"fastai", "lean", *r["checks"]} and all(
        v["images_per_second"]["median"] > 0 and v["over_fastai"]["min"] > 0 for v in table.values()
    )
    minutes = zoo_gpu.MODELSET500/table["fused_tf32"]["images_per_second"]["median"]/60
    assert (
        table["fused_tf32"]["minutes"]["median"] == pytest.approx(minutes, rel=0.01)
        and "minutes for ModelSet500" in capsys.readouterr().out
    )


def test_gpu_benchmark_goes_on_when_a_candidate_fails(zoo_gpu):
    def full(*_): raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
    turns = [
        zoo_gpu.turn(
            dict(fastai=lambda *_: 100.0, lean=lambda *_: 200.0, fused=lambda *_: 900.0, patches=full),
            8,
            zoo_gpu.Setup(torch.device("cpu")),
        )
        for _ in range(2)
    ]
    out = zoo_gpu.rows(turns)
    assert out["patches"] == dict(failed="CUDA out of memory.") and out["fused"]["over_fastai"] == dict(
        median=9, min=9, max=9
    )
    zoo_gpu.show(dict(patches=dict(failed="no such kernel")), {8: out})
