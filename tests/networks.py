"Small networks whose batch normalisation knows their task, and changes that leave what they answer as it is"
from pathlib import Path

import torch

from lps.core.files import save_tensors
from lps.models.modelset import ModelSet, load_modelset
from lps.order_chain import permute, random_perms
from lps.nets.resnet import resnet_spec
from lps.nets.resnet import ResNet

WIDTH = 4


def some_net(task, run, shortcut="conv"):
    "A small network with BN vectors that depend on its task and vary with its run"
    torch.manual_seed(100*task + run)
    net = ResNet(8, width=WIDTH, shortcut=shortcut).eval()
    for name, v in net.state_dict().items():
        if v.ndim == 1 and v.is_floating_point(): v.uniform_(.5, 1).add_(.3*task*(len(name) % 3))
    colour = torch.tensor([.5, .2, -.4]).roll(task) + .02*torch.randn(3)
    net.bn1.running_mean.copy_(net.conv1.weight.detach().sum((2, 3)) @ colour)
    return net


def write_models(folder: Path, runs: int) -> ModelSet:
    "Three tasks, so many networks each"
    for task in range(3):
        for run in range(runs):
            state = some_net(task, run).state_dict()
            save_tensors(folder/f"task{task}_run{run}.safetensors", state, dict(task=task, run=run, shortcut="conv"))
    return load_modelset(folder)


def shuffled(net):
    "All channels in another order"
    spec = resnet_spec(8, WIDTH, net.shortcut)
    state = permute(net.state_dict(), spec, random_perms(spec, 3))
    return state


def scaled(net):
    "Every channel, inner or of a stream, scaled by a number of its own, and scaled back where it is read"
    spec, state = resnet_spec(8, WIDTH, net.shortcut), {k: v.clone() for k, v in net.state_dict().items()}
    g = torch.Generator().manual_seed(1)
    scales = {group: torch.rand(n, generator=g)*2 + .3 for group, n in spec.sizes.items()}
    for name, axes in spec.axes_to_perm.items():
        if name not in state: continue
        of_bn = ".bn" in name or name.startswith("bn") or "downsample.1" in name
        if of_bn and name.endswith(("weight", "bias")): state[name] *= torch.cat([scales[g] for g in axes[0]])
        if len(axes) > 1 and axes[1]:
            read = torch.cat([scales[g] for g in axes[1]])
            state[name] /= read.view(1, -1, *(1,)*(state[name].ndim - 2))
    return state


def flipped(net):
    "Every filter multiplied by a number of any sign, with its BN made to fit"
    state = {k: v.clone() for k, v in net.state_dict().items()}
    g = torch.Generator().manual_seed(2)
    for bn in [name.removesuffix(".running_var") for name in state if name.endswith(".running_var")]:
        conv = bn.replace("bn", "conv").replace("downsample.1", "downsample.0")
        a = torch.randn(len(state[f"{bn}.weight"]), generator=g)
        a = a.sign()*(a.abs() + .5)
        state[f"{conv}.weight"] *= a[:, None, None, None]
        state[f"{bn}.running_mean"] *= a
        state[f"{bn}.running_var"] *= a**2
        state[f"{bn}.weight"] *= a.sign()
    return state


CHANGES = dict(shuffled=shuffled, scaled=scaled, flipped=flipped)
