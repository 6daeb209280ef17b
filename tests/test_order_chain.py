"""Any shuffle of all groups leaves the logits equal, before and after folding BN, for all kinds of networks"""
from itertools import product

import pytest
import torch

from lps.order_chain import PermutationSpec, inverse, permute, random_perms
from lps.nets.resnet import fold_bn, folded_resnet, resnet_spec
from lps.nets.architectures import net_from_state
from lps.nets.resnet import SHORTCUTS, ResNet, bn_of

CASES = [
    (d, w, s, seed) for d, w, s, seed in product((8, 20), (4, 16), SHORTCUTS, (0, 1)) if (d, w) != (20, 16) or seed == 0
]
IDS = [f"depth{d}-width{w}-{s}-seed{seed}" for d, w, s, seed in CASES]


def random_model(depth=8, width=4, shortcut="conv", seed=0):
    "A network in evaluation mode whose BN vectors and head are random, so that each of them matters"
    torch.manual_seed(seed)
    model = ResNet(depth, width, shortcut=shortcut).eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data.uniform_(.5, 1.5); m.bias.data.normal_(0, .3)
            m.running_mean.normal_(0, .3); m.running_var.uniform_(.5, 2)
    return model


def same(a, b): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def case(request):
    depth, width, shortcut, seed = request.param
    model, spec = random_model(depth, width, shortcut, seed), resnet_spec(depth, width, shortcut)
    with torch.no_grad(): logits = model(x := torch.randn(4, 3, 16, 16))
    assert logits.std(0).min() > 1e-3 * logits.abs().max()  # the images must not all look the same to it
    return model, spec, random_perms(spec, seed + 10), x, logits


@torch.no_grad()
def test_logits(case):
    model, spec, perms, x, logits = case
    state = model.state_dict()
    new = permute(state, spec, perms)
    assert list(new) == list(state) and all(
        new[k].dtype == v.dtype and new[k].shape == v.shape for k, v in state.items()
    )
    same(net_from_state(new, shortcut=model.shortcut)(x), logits)


@torch.no_grad()
def test_logits_folded(case):
    model, spec, perms, x, logits = case
    folded, net = fold_bn(model.state_dict()), folded_resnet(model)
    assert list(net.state_dict()) == list(folded) and all(
        torch.equal(net.state_dict()[k], v) for k, v in folded.items()
    )
    same(net(x), logits)
    net.load_state_dict(permute(folded, spec, perms))
    same(net(x), logits)


def test_inverse_and_folding_commute(case):
    model, spec, perms, *_ = case
    state = model.state_dict()
    back = permute(permute(state, spec, perms), spec, inverse(perms))
    assert all(torch.equal(back[k], v) for k, v in state.items())
    a, b = fold_bn(permute(state, spec, perms)), permute(fold_bn(state), spec, perms)
    assert list(a) == list(b)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-6, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_each_group_alone_and_each_axis_needed(shortcut):
    "A group alone keeps the logits; leave out any one axis that follows it, BN vectors included, and they change"
    model, spec, x = random_model(8, 8, shortcut), resnet_spec(8, 8, shortcut), torch.randn(4, 3, 16, 16)
    state, logits = model.state_dict(), model(x)
    for group, axes in spec.perm_to_axes.items():
        perms = {g: torch.arange(n) for g, n in spec.sizes.items()} | {group: torch.arange(spec.sizes[group]).roll(1)}
        same(torch.func.functional_call(model, permute(state, spec, perms), (x,)), logits)
        for name, axis in axes:
            if name not in state: continue
            less = spec.axes_to_perm | {
                name: tuple(None if i == axis else g for i, g in enumerate(spec.axes_to_perm[name]))
            }
            out = torch.func.functional_call(model, permute(state, PermutationSpec(spec.sizes, less), perms), (x,))
            assert (out - logits).abs().max() > 1e-3 * logits.abs().max(), (group, name, axis)


@torch.no_grad()
@pytest.mark.parametrize("shortcut", ("pad_end", "pad_both"))
def test_padding_ties_the_streams(shortcut):
    model, free, x = random_model(8, 8, shortcut), resnet_spec(8, 8, "conv"), torch.randn(4, 3, 16, 16)
    out = torch.func.functional_call(model, permute(model.state_dict(), free, random_perms(free, 0)), (x,))
    assert (out - model(x)).abs().max() > 1e-2


def test_groups():
    assert [len(resnet_spec(shortcut=s).sizes) for s in SHORTCUTS] == [12, 12, 14]
    assert len(resnet_spec(depth=32).sizes) == 18
    for s in SHORTCUTS:
        spec = resnet_spec(20, 16, s)
        assert sum(spec.sizes[g] for g in spec.axes_to_perm["fc.weight"][1]) == 64
        missing = set(ResNet(20, 16, shortcut=s).state_dict()) - set(spec.axes_to_perm)
        assert not missing
    with pytest.raises(ValueError, match="6n"): resnet_spec(18)
    with pytest.raises(ValueError, match="'pad' is unknown"): resnet_spec(shortcut="pad")


def test_head_as_convolution_and_float16():
    "A head of shape (2, 64, 1) and half-precision weights, as other people's checkpoints have them"
    spec, state = resnet_spec(8, 4), random_model(8, 4).state_dict()
    state = {k: v.half() if v.ndim > 1 else v for k, v in state.items()}
    perms = random_perms(spec, 0)
    as_conv = permute(state | {"fc.weight": state["fc.weight"][..., None]}, spec, perms)
    assert as_conv["fc.weight"].dtype == torch.float16
    assert torch.equal(as_conv["fc.weight"][..., 0], permute(state, spec, perms)["fc.weight"])
    assert {v.dtype for v in fold_bn(state).values()} == {torch.float32}


def test_input_is_left_alone():
    spec, state = resnet_spec(8, 4), random_model(8, 4).state_dict()
    before = {k: v.clone() for k, v in state.items()}
    for new in (permute(state, spec, random_perms(spec, 0)), fold_bn(state)):
        for v in new.values(): v.zero_()
    assert all(torch.equal(state[k], v) for k, v in before.items())


def test_fold_formula_with_eps():
    state, conv = random_model(8, 4).state_dict(), "layer2.0.downsample.0"
    g, b, m, v = (state[f"{bn_of(conv)}.{k}"] for k in ("weight", "bias", "running_mean", "running_var"))
    for eps in (1e-5, .1):
        folded, s = fold_bn(state, eps), g / (v + eps).sqrt()
        torch.testing.assert_close(folded[f"{conv}.weight"], s[:, None, None, None] * state[f"{conv}.weight"])
        torch.testing.assert_close(folded[f"{conv}.bias"], b - s*m)
    again = fold_bn(folded)
    assert list(again) == list(folded) and all(torch.equal(again[k], x) for k, x in folded.items())
    state["layer1.0.conv1.bias"] = torch.ones(4)
    torch.testing.assert_close(
        fold_bn(state)["layer1.0.conv1.bias"]
        - fold_bn({k: x for k, x in state.items() if k != "layer1.0.conv1.bias"})["layer1.0.conv1.bias"],
        state["layer1.0.bn1.weight"] / (state["layer1.0.bn1.running_var"] + 1e-5).sqrt(),
    )


def test_errors_name_both_values():
    spec, state = resnet_spec(8, 4), random_model(8, 4).state_dict()
    perms = random_perms(spec, 0)
    bad = {"no permutation for group 'stream2' of 8": {k: v for k, v in perms.items() if k != "stream2"},
           "'stream1' has 4 channels, its permutation 5": perms | {"stream1": torch.arange(5)},
           "2 different entries from 0 to 3": perms | {"stream1": torch.tensor([0, 0, 3, 3])},
           r"perms names \['stream9'\]": perms | {"stream9": torch.arange(4)}}
    for match, p in bad.items():
        with pytest.raises(ValueError, match=match): permute(state, spec, p)
    with pytest.raises(ValueError, match="'stem.weight' is not among"):
        permute({"stem.weight": torch.zeros(4)}, spec, perms)
    with pytest.raises(ValueError, match=r"axis 0 of 'conv1.weight' \(16, 3, 3, 3\).*4 channels"):
        permute(ResNet(8, 16).state_dict(), spec, perms)
    with pytest.raises(ValueError, match="follows 'stream1'"):
        PermutationSpec({"stream1": 4}, {"conv1.weight": ("stream1", None)})
