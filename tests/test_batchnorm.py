"""Batch normalisation in one pass: what torch gives in float32, and torch itself wherever the fast way does not fit"""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lps.core.jobs import one_thread
from lps.zoo.batchnorm import FusedResNet, bn_relu
from lps.nets.resnet import ResNet
from lps.zoo.tasks import load_images, pair_classes, task_images
from lps.zoo.recipe import Recipe
from lps.zoo.train import train_model


def step(dtype, shape, shortcut, seed=0):
    "Output, running statistics and all gradients of one step; the numbers are ones that bfloat16 holds"
    g = torch.Generator().manual_seed(seed)
    def maps(shift=0.0):
        return (torch.randn(shape, generator=g) + shift).bfloat16().to(dtype).to(memory_format=torch.channels_last)
    x, res, grad, bn = maps(1.5).requires_grad_(), maps().requires_grad_(), maps(), nn.BatchNorm2d(shape[1])
    with torch.no_grad(): bn.weight.uniform_(.5, 1.5, generator=g); bn.bias.uniform_(-.5, .5, generator=g)
    y = bn_relu(bn, x, res if shortcut else None)
    y.backward(grad)
    out = dict(
        y=y,
        x=x.grad,
        weight=bn.weight.grad,
        bias=bn.bias.grad,
        running_mean=bn.running_mean,
        running_var=bn.running_var,
    )
    return out | ({"shortcut": res.grad} if shortcut else {}), bn


@pytest.mark.parametrize("shape", [(8, 16, 32, 32), (8, 32, 16, 16), (8, 64, 8, 8), (104, 16, 8, 8), (1, 128, 2, 2)])
@pytest.mark.parametrize("shortcut", [False, True])
def test_one_step_is_torchs(shape, shortcut):
    (ours, bn), (torchs, ref) = step(torch.bfloat16, shape, shortcut), step(torch.float32, shape, shortcut)
    for name, want in torchs.items():
        torch.testing.assert_close(
            ours[name].float(), want, rtol=2**-7, atol=2**-7 * want.abs().max().item(), msg=lambda m: f"{name}: {m}"
        )
    torch.testing.assert_close(bn.running_var, ref.running_var, rtol=1e-5, atol=1e-6)
    assert bn.num_batches_tracked == ref.num_batches_tracked == 1


CHANGES = {
    "float32": lambda x: x.float(),
    "channels first": lambda x: x.contiguous(),
    "too few numbers": lambda x: x[:, :, :1, :1].contiguous(memory_format=torch.channels_last),
    "12 channels": lambda x: x[:, :12].contiguous(memory_format=torch.channels_last)}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_where_it_does_not_fit_torch_does_it(change):
    x = change(torch.randn(4, 16, 4, 4).bfloat16().to(memory_format=torch.channels_last))
    bn = nn.BatchNorm2d(x.shape[1])
    assert torch.equal(bn_relu(copy.deepcopy(bn), x), F.relu(copy.deepcopy(bn)(x)))


def test_evaluation_mode_is_torchs_and_moves_no_statistics():
    x, bn = torch.randn(4, 16, 4, 4).bfloat16().to(memory_format=torch.channels_last), nn.BatchNorm2d(16).eval()
    assert torch.equal(bn_relu(bn, x), F.relu(bn(x))) and not bn.running_mean.any()


@pytest.mark.parametrize("shortcut", ["conv", "pad_end", "pad_both"])
def test_fused_network_is_the_network_in_float32(shortcut):
    net, x = ResNet(depth=8, width=4, shortcut=shortcut), torch.randn(6, 3, 16, 16)
    fused = FusedResNet(copy.deepcopy(net))
    assert torch.equal(net(x), fused(x)) and torch.equal(net.eval()(x), fused.eval()(x))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), fused.net.state_dict().values()))


def test_training_in_bfloat16_is_repeatable_and_learns():
    images = load_images("digits")
    task = task_images(images, pair_classes(10)[0])
    recipe = Recipe(
        "bf16", epochs=4, lr=0.1, milestones=(3,), batch_size=32, pad=1, flip=False, depth=8, precision="bfloat16"
    )
    with one_thread(): (a, metrics), (b, _) = [train_model(task, task, recipe, seed=3) for _ in range(2)]
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert metrics["precision"] == "bfloat16" and metrics["train_accuracy"] > .9 and type(a) is ResNet
