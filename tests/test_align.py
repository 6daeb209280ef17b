"""Alignment: the same scores and gradients as eqs (5)-(8) written out, and never a tensor as large as all products"""
import os
import subprocess
import sys
import tracemalloc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lps.align
from lps.align import align_layer, frobenius_scores


def written_out(weight, second_order):
    return frobenius_scores(weight, second_order).amax(-3).sum(-1).sort(dim=-2, descending=True)[0]


def layer(seed=0, shape=(3, 8, 6, 3, 3), P=10, Q=4):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.double, requires_grad=True) for s in (shape, (P, Q, *shape[-2:]))]


@pytest.mark.parametrize("P, Q", [(1, 1), (10, 4), (32, 4), (50, 7)])
@pytest.mark.parametrize("k", [1, 3])
def test_scores_and_gradients_are_those_of_the_formula(P, Q, k):
    "Fewer second-order maps than are looked at together, just as many, several times as many and a rest"
    weight, second_order = layer(shape=(3, 8, 6, k, k), P=P, Q=Q)
    out, want = align_layer(weight, second_order), written_out(weight, second_order)
    torch.testing.assert_close(out, want)
    for got, ref in zip(*[torch.autograd.grad(o.square().sum(), (weight, second_order)) for o in (out, want)]):
        torch.testing.assert_close(got, ref)
    assert lps.align.WIDTH in range(32*4, 50*7)


def test_only_what_needs_a_gradient_gets_one():
    weight, second_order = layer()
    for one, other in ((weight, second_order), (second_order, weight)):
        both = torch.autograd.grad(align_layer(weight, second_order).square().sum(), (one, other))
        if one is weight: scores = align_layer(weight, second_order.detach())
        else: scores = align_layer(weight.detach(), second_order)
        alone = torch.autograd.grad(scores.square().sum(), one)
        assert torch.equal(both[0], alone[0])


@pytest.mark.parametrize("channels", [True, False])
def test_gradcheck(channels):
    weight, second_order = layer(shape=(2, 4, 3, 2, 2), P=5, Q=3)
    assert torch.autograd.gradcheck(lambda w, v: align_layer(w, v, align_channels=channels), (weight, second_order))


@pytest.mark.parametrize("shape, P, Q", [
    ((1, 64, 64, 3, 3), 20, 64), ((3, 8, 6, 1, 1), 1, 1), ((2, 5, 300, 3, 3), 7, 2),
])
def test_few_models_need_no_kernel_and_have_the_same_scores(monkeypatch, shape, P, Q):
    weight, second_order = [t.detach().float() for t in layer(shape=shape, P=P, Q=Q)]
    plain = align_layer(weight, second_order)
    monkeypatch.setattr(lps.align, "FEW", 0)
    compiled = align_layer(weight, second_order)
    torch.testing.assert_close(plain, compiled, rtol=1e-6, atol=1e-6*compiled.abs().max().item())


def test_a_query_imports_no_compiler():
    code = "import sys, torch; from lps.align import align_layer;"
    code += " align_layer(torch.randn(8, 6, 3, 3), torch.randn(4, 6, 3, 3));"
    code += " assert not {'numba', 'fastai', 'torchvision', 'sklearn', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("few", [0, lps.align.FEW])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_a_broken_number_shows_in_the_scores(monkeypatch, value, which, few):
    monkeypatch.setattr(lps.align, "FEW", few)
    tensors = [t.detach() for t in layer()]
    tensors[which].view(-1)[5] = value
    out = align_layer(*tensors, align_filters=False)
    broken = ~out.isfinite()
    assert broken.any() and not broken.all() and broken.sum() == (10 if which == 0 else 3*8)


def test_more_channels_than_a_byte_counts():
    weight = torch.randn(3, 300, 2, 2, dtype=torch.double, requires_grad=True)
    second_order = torch.randn(4, 5, 2, 2, dtype=torch.double, requires_grad=True)
    written_out = torch.einsum("ijuv,pquv->ijpq", weight, second_order).amax(1).sum(-1)
    scores = align_layer(weight, second_order, align_filters=False)
    assert torch.allclose(scores, written_out)
    grads = [torch.autograd.grad(s.square().sum(), (weight, second_order)) for s in (scores, written_out)]
    for got, want in zip(*grads): assert torch.allclose(got, want)


def test_products_of_a_large_layer_are_never_stored():
    weight, second_order = torch.randn(2, 64, 64, 3, 3, requires_grad=True), torch.randn(
        20, 64, 3, 3, requires_grad=True
    )
    with Largest():  # compiles the kernels and imports what the mode needs
        align_layer(weight, second_order).sum().backward()
    tracemalloc.start()
    try:
        with Largest() as largest: align_layer(weight, second_order).sum().backward()
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    products = 2*64*64*20*64
    assert largest.n < products/32 and peak < 4*products/16


class Largest(TorchDispatchMode):
    "The number of elements of the largest tensor that any operation gives"
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.n = max([self.n, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_shuffled_filters_and_channels_give_the_same_scores():
    weight, second_order = layer()
    g = torch.Generator().manual_seed(1)
    shuffled = weight[:, torch.randperm(8, generator=g)][:, :, torch.randperm(6, generator=g)]
    torch.testing.assert_close(align_layer(weight, second_order), align_layer(shuffled, second_order))
    unsorted = [align_layer(w, second_order, align_filters=False) for w in (weight, shuffled)]
    assert not torch.allclose(*unsorted)


def test_many_models_at_once_are_each_model_alone():
    weight, second_order = layer()
    torch.testing.assert_close(
        align_layer(weight, second_order), torch.stack([align_layer(w, second_order) for w in weight])
    )
    torch.testing.assert_close(align_layer(weight[None], second_order)[0], align_layer(weight, second_order))
    assert align_layer(weight[:0], second_order).shape == (0, 8, 10)


def test_copies_of_a_channel_share_its_gradient():
    weight, second_order = layer()
    with torch.no_grad(): weight[:, :, 1] = weight[:, :, 0]
    grads = [
        torch.autograd.grad(f(weight, second_order).square().sum(), (weight, second_order))
        for f in (align_layer, written_out)
    ]
    (got_w, got_v), (want_w, want_v) = grads
    torch.testing.assert_close(got_w[:, :, :2].sum(2), want_w[:, :, :2].sum(2))
    torch.testing.assert_close(got_v, want_v)


def test_columns_are_sorted_best_match_first():
    out = align_layer(*layer())
    assert (out[:, :-1] >= out[:, 1:]).all()


@pytest.mark.parametrize("weight, second_order, error, words", [
    (torch.zeros(8, 6, 3, 3), torch.zeros(4, 6, 5, 5), ValueError, "3×3.*5×5"),
    (torch.zeros(6, 3, 3), torch.zeros(4, 6, 3, 3), ValueError, "give"),
    (torch.zeros(8, 6, 3, 3).half(), torch.zeros(4, 6, 3, 3), TypeError, "float16.*float32.*cast"),
])
def test_what_does_not_fit_is_named(weight, second_order, error, words):
    with pytest.raises(error, match=words): align_layer(weight, second_order)


def test_without_channel_alignment_the_channels_must_be_as_many():
    with pytest.raises(ValueError, match="6 channels, second_order 4.*Q = C = 6"):
        align_layer(torch.zeros(8, 6, 3, 3), torch.zeros(4, 4, 3, 3), align_channels=False)


@pytest.mark.parametrize("shape, P, Q", [((8, 6, 0, 0), 4, 6), ((8, 0, 3, 3), 4, 6), ((0, 6, 3, 3), 4, 6),
                                         ((8, 6, 3, 3), 0, 6), ((8, 6, 3, 3), 4, 0), ((8, 0), 4, 6)])
@pytest.mark.parametrize("channels", [True, False])
def test_nothing_to_compare_is_refused_before_the_kernel(shape, P, Q, channels):
    second_order = torch.zeros(P, Q, *shape[2:])
    with pytest.raises(ValueError, match="need one or more"):
        align_layer(torch.zeros(shape), second_order, align_channels=channels)


@pytest.mark.parametrize("weight, words", [
    ([[1.0]], "weight is a list"),
    (torch.zeros(8, 6, 3, 3, device="meta"), "weight is meta"),
    (torch.zeros(8, 6).to_sparse(), "weight is torch.sparse_coo"),
])
def test_what_is_no_dense_tensor_is_refused(weight, words):
    with pytest.raises(TypeError, match=words): align_layer(weight, torch.zeros(4, 6, 3, 3))


@pytest.mark.parametrize("channels", [True, False])
def test_vmap_says_that_it_does_not_work(channels):
    def one(weight): return align_layer(weight, torch.zeros(4, 6, 3, 3), align_channels=channels)
    with pytest.raises(TypeError, match="torch.vmap, which is not supported.*leading axes"):
        torch.vmap(one)(torch.zeros(2, 8, 6, 3, 3))


BOUNDS = """
import itertools, torch
from lps.align import align_layer
torch.manual_seed(0)
for N, C, P, Q, k in itertools.product((1, 3), (1, 2, 257), (1, 5), (1, 3, 130), (1, 3)):
    weight = torch.randn(2, N, C, k, k, requires_grad=True)
    second_order = torch.randn(P, Q, k, k, requires_grad=True)
    scores = align_layer(weight, second_order)
    written_out = torch.einsum('bijuv,pquv->bijpq', weight, second_order).amax(2).sum(-1).sort(1, descending=True)[0]
    # two orders of summing up to 257 terms in float32, whose sum may be near zero
    torch.testing.assert_close(scores, written_out, rtol=1e-5, atol=1e-4)
    scores.sum().backward()
print('all shapes in bounds')
"""


def test_kernels_stay_in_bounds_over_the_range_of_shapes(tmp_path):
    "In a process of its own, compiled anew with numba's bounds checking"
    env = os.environ | dict(NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", BOUNDS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all shapes in bounds" in done.stdout
