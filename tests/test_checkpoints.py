"""Checkpoints as people have them: the situations of public issue reports, and variants of their kinds"""

import io
import json
import subprocess
import sys
import tarfile
import warnings
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from torch import nn

from lps.index.gather import find_models
from lps.models.checkpoint import read_checkpoint
from lps.models.fold import fold
from lps.models.folders import is_model_folder
from lps.models.inspect import inspect_model
from lps.models.read import Reading, read_model
from lps.nets.architectures import logits_of, stem_of
from lps.nets.named import roles_of
from lps.nets.resnet import ResNet


def tiny(seed=0, **kwargs):
    torch.manual_seed(seed)
    return ResNet(depth=8, width=4, **kwargs).eval()


@pytest.fixture(scope="module")
def net():
    return tiny()


@pytest.fixture(scope="module")
def sd(net):
    return net.state_dict()


def reads(tmp_path, content, like, name="x.pt", which=None):
    "Assert that a file is read as the network `like`"
    torch.save(content, tmp_path / name)
    model = read_model(tmp_path / name, Reading(which=which))
    assert model.digest == read_model(dict(like)).digest
    return model


def refused(place, words, reading=None):
    "Assert that a source is refused in one line with these words"
    with pytest.raises(ValueError) as said:
        read_model(place, reading or Reading())
    text = str(said.value)
    assert words in text and "\n" not in text and len(text) < 400, text


# 1, 2, 3: tensors of another kind, weights in parts, weights with scales


class Sub(torch.Tensor):
    pass


def labelled(tensor):
    "A plain tensor with an attribute, which is pickled as a subclass is"
    tensor = tensor.clone()
    tensor.note = "x"
    return tensor


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.as_subclass(Sub),
        lambda w: w.to_sparse(),
        labelled,
        lambda w: nn.Parameter(w.clone()),
        lambda w: w.to(memory_format=torch.channels_last),
        lambda w: w.flatten(1).T.contiguous().T.reshape(w.shape),
    ],
    ids=["subclass", "sparse", "attribute", "parameter", "channels last", "transposed"],
)
def test_tensors_of_other_kinds_are_read(tmp_path, sd, change):
    reads(tmp_path, {**sd, "conv1.weight": change(sd["conv1.weight"])}, sd)


def test_sparse_rows_are_read(tmp_path, sd):
    reads(tmp_path, {**sd, "fc.weight": sd["fc.weight"].to_sparse_csr()}, sd)


def test_quantised_tensors_are_dequantised(tmp_path, sd):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = torch.quantize_per_tensor(sd["conv1.weight"], 0.01, 0, torch.qint8)
        scales, zeros = torch.full((4,), 0.01), torch.zeros(4)
        rows = torch.quantize_per_channel(sd["conv1.weight"], scales, zeros, 0, torch.qint8)
    for weight in (whole, rows):
        torch.save({**sd, "conv1.weight": weight}, tmp_path / "x.pt")
        torch.testing.assert_close(read_model(tmp_path / "x.pt").state["conv1.weight"], whole.dequantize())


@pytest.mark.parametrize(
    "weight, words",
    [
        (torch.ones(4, 3, 3, 3, device="meta"), "conv1.weight"),
        (np.ones(3), "conv1.weight"),
        ("x", "conv1.weight"),
        (torch.ones(4, 3, 3, 3, dtype=torch.complex64), "conv1.weight"),
        ([1.0, 2.0], "conv1.weight"),
    ],
)
def test_a_weight_that_cannot_be_read_refuses_the_file(tmp_path, sd, weight, words):
    torch.save({**sd, "conv1.weight": weight}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", words)


def with_parts(wrap):
    "A network whose first layer stores its weight in parts"
    net = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrap(net.conv1)
    with torch.no_grad():
        net.train()(torch.rand(2, 3, 8, 8))
    net.eval()(torch.rand(2, 3, 8, 8))
    return net


def prune(layer):
    from torch.nn.utils.prune import random_unstructured

    random_unstructured(layer, "weight", 0.5)


new = nn.utils.parametrizations
PARTS = {
    "weight norm": (new.weight_norm, "weight norm"),
    "old weight norm": (nn.utils.weight_norm, "weight norm"),
    "weight norm of the whole": (lambda layer: new.weight_norm(layer, dim=None), "weight norm"),
    "weight norm of inputs": (lambda layer: new.weight_norm(layer, dim=1), "weight norm"),
    "spectral norm": (new.spectral_norm, "spectral norm"),
    "old spectral norm": (nn.utils.spectral_norm, "spectral norm"),
    "pruning": (prune, "a pruning mask"),
}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_weights_in_parts_are_folded(tmp_path, kind, prefix):
    wrap, words = PARTS[kind]
    net = with_parts(wrap)
    torch.save({f"{prefix}{name}": v for name, v in net.state_dict().items()}, tmp_path / "x.pt")
    found = inspect_model(tmp_path / "x.pt")
    assert found.model.stem == "conv1" and found.folded == {"conv1.weight": words}
    torch.testing.assert_close(found.model.state["conv1.weight"], net.conv1.weight.detach())


def test_parts_of_an_unknown_kind_are_refused(tmp_path):
    torch.save(with_parts(lambda layer: new.orthogonal(layer)).state_dict(), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "conv1.weight is stored in parts of an unknown kind")


def test_batch_norm_inside_of_a_convolution_is_folded(sd):
    net = tiny()
    state = {
        name.replace("bn1.", "conv1.bn.", 1) if name.startswith("bn1.") else name: v for name, v in sd.items()
    }
    state |= {
        "conv1.activation_post_process.min_val": torch.tensor(torch.inf),
        "conv1.weight_fake_quant.scale": torch.ones(1),
    }
    folded, notes = fold(state)
    assert set(notes) == {"observers", "conv1.weight"}
    assert "conv1.bn.weight" not in folded and "conv1.activation_post_process.min_val" not in folded
    x = torch.rand(2, 3, 8, 8)
    expected = net.bn1(net.conv1(x))
    found = nn.functional.conv2d(x, folded["conv1.weight"], folded["conv1.bias"], padding=1)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(), (1,), (8,), (8, 1, 1, 1), (2, 1, 1, 1), (4, 3, 1, 1)])
@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale", ".scale"])
def test_float8_weights_are_multiplied_by_their_scale(shape, suffix):
    weight = torch.randn(8, 3, 3, 3).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.5
    state, notes = fold({"conv1.weight": weight, f"conv1.weight{suffix}": scale})
    times = scale
    if scale.ndim == 1 and len(scale) > 1:
        times = scale[:, None, None, None]
    elif scale.ndim == 4 and len(scale) < 8:
        times = scale.repeat_interleave(8 // len(scale), 0)
    torch.testing.assert_close(state["conv1.weight"], weight.float() * times)
    assert list(state) == ["conv1.weight"] and "float8" in notes["conv1.weight"]


def test_blocks_of_float8_may_be_cut_off():
    weight = torch.randn(200, 300).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3) + 0.5
    found = fold({"fc.weight": weight, "fc.weight_scale_inv": scale})[0]["fc.weight"]
    assert found[127, 127] / weight[127, 127].float() == pytest.approx(float(scale[0, 0]), rel=1e-3)
    assert found[199, 299] / weight[199, 299].float() == pytest.approx(float(scale[1, 2]), rel=1e-3)


def test_a_float8_weight_without_a_scale_says_so(tmp_path, sd):
    torch.save({**sd, "conv1.weight": sd["conv1.weight"].to(torch.float8_e5m2)}, tmp_path / "x.pt")
    assert "no scale was found" in inspect_model(tmp_path / "x.pt").folded["conv1.weight"]


def test_int8_needs_scale_and_zero_point(tmp_path, sd):
    q = torch.randint(-100, 100, (4, 3, 3, 3), dtype=torch.int8)
    scale, zero = torch.tensor(0.02), torch.tensor(3)
    state = {**sd, "conv1.weight": q, "conv1.weight_scale": scale}
    save_file(state | {"conv1.weight_zero_point": zero}, tmp_path / "x.safetensors")
    torch.testing.assert_close(
        read_model(tmp_path / "x.safetensors").state["conv1.weight"], (q.float() - 3) * 0.02
    )
    save_file(state, tmp_path / "y.safetensors")
    refused(tmp_path / "y.safetensors", "weights are int8: conv1.weight")


# 4: the stem


@pytest.mark.parametrize(
    "shapes, stem",
    [
        (
            {
                "conv1.weight": (16, 4, 3, 3),
                "l.weight": (16, 16, 3, 3),
                "dw.weight": (16, 1, 3, 3),
                "fc.weight": (4, 16),
            },
            "conv1",
        ),
        ({"dw.weight": (16, 1, 3, 3), "l.weight": (16, 16, 3, 3), "x.weight": (16, 4, 3, 3)}, "x"),
        ({"a.weight": (16, 6, 3, 3), "b.weight": (16, 1, 3, 3), "c.weight": (32, 16, 1, 1)}, "a"),
        ({"a.weight": (64, 1, 7, 7), "b.weight": (64, 64, 3, 3)}, "a"),
        ({"z.weight": (16, 16, 3, 3), "a.weight": (16, 1, 3, 3), "b.weight": (32, 16, 3, 3)}, "a"),
        ({"a.weight": (16, 3, 3, 3), "a.bias": (3,), "b.weight": (16, 3, 3, 3), "b.bias": (16,)}, "b"),
        ({"up.weight": (64, 3, 2, 2), "in.weight": (64, 3, 7, 7), "mid.weight": (64, 64, 3, 3)}, "in"),
        (
            {"layer1.weight": (128, 4, 3, 3), "conv1.weight": (64, 3, 7, 7), "z.weight": (128, 64, 1, 1)},
            "conv1",
        ),
        ({"patch_embed.proj.weight": (192, 10, 16, 16), "head.weight": (10, 192)}, "patch_embed.proj"),
        ({"head.weight": (10, 192)}, None),
    ],
)
def test_the_stem_reads_the_image(shapes, stem):
    assert stem_of(shapes) == stem


class Odd(nn.Module):
    "A network whose stem is registered last, after a depthwise and a transposed convolution"

    def __init__(self, channels):
        super().__init__()
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, channels, 3, padding=1)
        self.fc = nn.Linear(8, 3)
        self.enter = nn.Conv2d(channels, 8, 3, padding=1)

    def forward(self, x):
        x = self.dw(self.enter(x)).relu()
        return self.fc(x.mean((2, 3)) + self.up(x).mean())


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_a_module_shows_its_stem_on_a_probe_image(channels):
    found = inspect_model(Odd(channels), Reading(size=(channels, 16, 16)))
    assert found.model.stem == "enter" and "probe image, sure" in found.stem


# 5, 17: outputs

Pair = namedtuple("Pair", "features logits")


@dataclass
class Result:
    logits: torch.Tensor
    features: torch.Tensor


z, features, maps = torch.randn(2, 5), torch.randn(2, 8), torch.randn(2, 4, 3, 3)


@pytest.mark.parametrize(
    "output",
    [
        z,
        {"logits": z},
        OrderedDict(out=z, aux=torch.randn(2, 5)),
        [maps, z],
        (z, None),
        Pair(features, z),
        Result(z, features),
        {"a": z},
        dict(x=(z,)),
        z[..., None, None],
        dict(out=dict(logits=z), features=features),
    ],
)
def test_logits_are_found_in_outputs(output):
    assert torch.equal(logits_of(output), z)


@pytest.mark.parametrize(
    "output, words",
    [
        ((z, features), "(2, 5), 1 (2, 8): which are the logits is unclear"),
        ([z, z], "unclear"),
        (maps, "not logits"),
        (dict(a=z, b=z), "unclear"),
        (dict(a=maps), "unclear"),
        (None, "NoneType"),
        ("x", "str"),
        (z[0, 0], "not logits"),
        (torch.randn(2, 7, 5), "not logits"),
        ([], "no tensor"),
    ],
)
def test_ambiguous_outputs_are_refused(output, words):
    with pytest.raises(ValueError) as said:
        logits_of(output)
    assert words in str(said.value) and "\n" not in str(said.value)


def test_the_head_decides_between_outputs():
    assert torch.equal(logits_of((features, z), classes=5), z)


class Small(nn.Module):
    "A network with any number of outputs, which returns them in any form"

    def __init__(self, outputs, form):
        super().__init__()
        self.conv, self.fc, self.form = nn.Conv2d(3, 6, 3), nn.Linear(6, outputs), form

    def forward(self, x):
        features = self.conv(x).relu().mean((2, 3))
        return self.form(self.fc(features), features)


def one(z, f):
    return z


def flat(z, f):
    return z[:, 0]


def pair(z, f):
    return z, f


@pytest.mark.parametrize("outputs, form", [(1, one), (1, flat), (4, pair), (12, one)])
def test_networks_with_other_outputs_are_run(outputs, form):
    net = Small(outputs, form).eval()
    model = read_model(net)
    x = torch.rand(3, 3, 32, 32)
    logits = net.fc(net.conv(x).relu().mean((2, 3))).detach()
    found = model.outputs(x)
    if outputs > 1:
        return torch.testing.assert_close(found, logits)
    torch.testing.assert_close(found.softmax(1)[:, 1:], logits.sigmoid())


def test_a_network_without_a_head_says_so():
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="has no head"):
        read_model(trunk).outputs(torch.rand(2, 3, 16, 16))


# 6, 9, 16: names and formats


@pytest.mark.parametrize("name", ["best.safetensors", "x.pth.tar", "x.bin", "noname", "x.pkl"])
@pytest.mark.parametrize("write", [torch.save, save_file], ids=["pickle", "safetensors"])
def test_the_content_decides(tmp_path, sd, name, write):
    folder = tmp_path / "m"
    folder.mkdir()
    write(sd, folder / name)
    assert read_model(folder / name).digest == read_model(folder).digest == read_model(sd).digest
    items, bad = find_models(folder)
    assert len(items) == 1 and not bad


@pytest.mark.parametrize(
    "change",
    [
        lambda n: f"module.{n}",
        lambda n: f"_orig_mod.{n}",
        lambda n: f"model._orig_mod.module.{n}",
        lambda n: n.replace("layer1.", "layer1._checkpoint_wrapped_module."),
        lambda n: f"ema.model.{n}",
        lambda n: n.replace("layer2.0.", "layer2.0._fsdp_wrapped_module."),
        lambda n: f"_forward_module.model.{n}",
        lambda n: n.replace("layer1.", "layer1.module."),
        lambda n: f"_fsdp_wrapped_module.{n}",
    ],
)
def test_wrappers_leave_no_trace(tmp_path, sd, change):
    reads(tmp_path, {change(name): v for name, v in sd.items()}, sd)


def test_an_averaged_model_is_unwrapped(tmp_path, net, sd):
    reads(tmp_path, torch.optim.swa_utils.AveragedModel(net).state_dict(), sd)


# 10, 11, 12: state dicts under any key; several networks


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: dict(model=None, ema=tiny(), updates=10, optimizer=None),
        lambda sd: {"any key": sd},
        lambda sd: dict(module=sd, buffer_names=[], ds_version="0.14"),
        lambda sd: (sd, 0.5),
        lambda sd: [0.5, dict(net=sd)],
        lambda sd: dict(a=dict(b=dict(c=sd))),
        lambda sd: {0: sd},
        lambda sd: dict(epoch=1, arch="resnet20", state_dict=sd),
        lambda sd: dict(net=sd, optimizer=torch.optim.SGD(tiny().parameters(), 0.1).state_dict()),
        lambda sd: dict(acc=np.float64(0.5), lr=np.float32(0.1), model=sd),
    ],
)
def test_state_dicts_are_found(tmp_path, sd, wrap):
    reads(tmp_path, wrap(sd), sd)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: dict(model=a, model_ema=b),
        lambda a, b: dict(student=a, teacher=b, optimizer={}),
        lambda a, b: dict(G=a, G_ema=b),
        lambda a, b: dict(online=a, target=b),
        lambda a, b: dict(state_dict=a, ema=dict(shadow=b)),
        lambda a, b: below("model", a) | below("ema.model", b),
        lambda a, b: below("student.net", a) | below("teacher.net", b),
        lambda a, b: below("encoder_q", a) | below("encoder_k", b),
        lambda a, b: dict(x=below("online_model", a) | below("ema_model", b)),
    ],
)
def test_averages_and_teachers_come_first(tmp_path, sd, wrap):
    other = tiny(1).state_dict()
    model = reads(tmp_path, wrap(other, sd), sd)
    found = read_checkpoint(tmp_path / "x.pt")
    assert len(found.networks) == 1
    key = next(iter(found.networks))
    assert (
        read_model(tmp_path / "x.pt", Reading(which=key)).digest == read_model(other).digest != model.digest
    )
    refused(tmp_path / "x.pt", "holds no network called 'generator'", Reading(which="generator"))


def below(prefix, state):
    return {f"{prefix}.{name}": v for name, v in state.items()}


def test_two_networks_in_safetensors_are_told_apart(tmp_path, sd):
    save_file(below("student", tiny(1).state_dict()) | below("teacher", sd), tmp_path / "x.safetensors")
    found = inspect_model(tmp_path / "x.safetensors")
    assert found.model.digest == read_model(sd).digest and list(found.networks) == ["student"]


# 13, 18: values


def test_only_weights_and_statistics_must_be_finite(tmp_path, sd):
    more = {
        "conv1.activation_post_process.min_val": torch.tensor(torch.inf),
        "mask": torch.full((4, 4), -torch.inf),
    }
    more["attn.bias"] = torch.full((1, 1, 4, 4), -torch.inf)
    torch.save({**sd, **more}, tmp_path / "x.pt")
    read_model(tmp_path / "x.pt")
    for name in ("conv1.weight", "fc.bias", "bn1.running_var", "layer1.0.bn1.running_mean"):
        torch.save({**sd, name: torch.full_like(sd[name], torch.nan)}, tmp_path / "y.pt")
        refused(tmp_path / "y.pt", f"{name} holds NaN")


def test_negative_variances_are_named(tmp_path, sd):
    torch.save({**sd, "bn1.running_var": torch.tensor([1.0, -1.2, 1, 1])}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "bn1.running_var is negative (min −1.2)")


# 14: types that the library does not load


def raw_safetensors(path, entries):
    "Write a safetensors file with tensors of any type: name → (type, shape, bytes)"
    header, body = {}, b""
    for name, (dtype, shape, data) in entries.items():
        header[name] = dict(dtype=dtype, shape=shape, data_offsets=[len(body), len(body) + len(data)])
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize("dtype, n", [("F4", 8), ("F8_E8M0", 16), ("F6_E2M3", 12)])
def test_types_that_are_not_read(tmp_path, sd, dtype, n):
    plain = {
        name: ("F32", list(v.shape), v.numpy().tobytes()) for name, v in sd.items() if v.is_floating_point()
    }
    raw_safetensors(tmp_path / "x.safetensors", plain | {"extra": (dtype, [16], bytes(n))})
    assert read_model(tmp_path / "x.safetensors").stem == "conv1"
    if dtype == "F8_E8M0":
        return
    raw_safetensors(tmp_path / "y.safetensors", plain | {"conv9.weight": (dtype, [16], bytes(n))})
    refused(tmp_path / "y.safetensors", f"conv9.weight has the type {dtype}")


# 15: shared storage


def test_shared_storage_counts_once(tmp_path):
    shared = nn.Conv2d(96, 96, 3)
    torch.save(nn.Sequential(nn.Conv2d(3, 96, 3), *[shared] * 8).state_dict(), tmp_path / "x.pt")
    assert len(read_model(tmp_path / "x.pt").state) == 18
    views = {
        f"{i}.weight": shared.weight.detach().reshape(96, -1) if i % 2 else shared.weight for i in range(8)
    }
    torch.save(views, tmp_path / "y.pt")
    assert len(read_model(tmp_path / "y.pt").state) == 8


# 19 to 23: what is not read, in one line


def legacy_tar(path):
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            entry = tarfile.TarInfo(name)
            entry.size = 8
            archive.addfile(entry, io.BytesIO(bytes(8)))


def other_tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"), io.BytesIO())


REFUSED = {
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
        "a Git LFS pointer",
        "git lfs pull",
    ),
    "web page": (b"<!DOCTYPE html><html>not found</html>", "a web page", "download the file itself"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "a gzip archive", "gunzip"),
    "empty": (b"", "an empty file", "failed"),
    "gguf": (b"GGUF" + bytes(20), "a GGUF file", "checkpoint"),
    "hdf5": (b"\x89HDF\r\n" + bytes(20), "HDF5", "torch.save"),
    "old tar": (legacy_tar, "written by PyTorch before 0.2", "torch.save"),
    "tar": (other_tar, "a tar archive", "tar xf"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.pth.tar"])
def test_other_files_are_named_with_the_cure(tmp_path, kind, name):
    content, *words = REFUSED[kind]
    if callable(content):
        content(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    for word in words:
        refused(tmp_path / name, word)


def lora(sd):
    return {
        "base_model.model.fc.lora_A.weight": torch.ones(8, 64),
        "base_model.model.fc.lora_B.weight": torch.ones(2, 8),
    }


KINDS = {
    "lora": (lora, "a LoRA adapter of rank 8"),
    "flat": (lambda sd: {"_flat_param": torch.ones(99)}, "flat parameters of FSDP"),
    "wrapped flat": (
        lambda sd: {"_fsdp_wrapped_module.flat_param_0": torch.ones(9)},
        "flat parameters of FSDP",
    ),
    "gptq": (
        lambda sd: {"fc.qweight": torch.ones(4, 4, dtype=torch.int32), "fc.scales": torch.ones(1, 4)},
        "GPTQ",
    ),
    "bitsandbytes": (
        lambda sd: {"fc.weight": torch.ones(8, 1, dtype=torch.uint8), "fc.weight.absmax": torch.ones(1)},
        "bitsandbytes",
    ),
    "zero 3": (
        lambda sd: dict(module={n: torch.zeros(1) for n in sd}, ds_version="0.14"),
        "run the zero_to_fp32.py",
    ),
    "zero 3, empty": (lambda sd: {n: torch.zeros(0) for n in sd}, "zero_to_fp32.py"),
    "optimizer": (lambda sd: torch.optim.Adam(tiny().parameters()).state_dict(), "the state of an optimiser"),
    "scheduler": (lambda sd: dict(last_epoch=3, _step_count=4, base_lrs=[0.1]), "learning rate scheduler"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_tensors_are_named(tmp_path, sd, kind):
    make, words = KINDS[kind]
    torch.save(make(sd), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", words)


def test_torchscript_is_refused_with_a_cure(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    refused(tmp_path / "x.pt", "a TorchScript archive: save its state_dict()")


# 7, 8, 21 to 23: folders


def write(folder, files, sd):
    "Write a folder: name → text, or None for weights"
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        elif content is not None:
            torch.save(content, path)
        elif name.endswith(".safetensors"):
            save_file(sd, path)
        else:
            torch.save(sd, path)


OPT = dict(state={}, param_groups=[])
FOLDERS = {
    "diffusers part": {
        "config.json": "{}",
        "diffusion_pytorch_model.safetensors": None,
        "diffusion_pytorch_model.fp16.safetensors": None,
    },
    "pipeline": {
        "model_index.json": '{"unet": ["diffusers", "U"], "vae": ["diffusers", "V"]}',
        "unet/config.json": "{}",
        "unet/diffusion_pytorch_model.safetensors": None,
        "vae/config.json": "{}",
        "vae/diffusion_pytorch_model.safetensors": None,
    },
    "transformers": {
        "config.json": '{"image_size": 32}',
        "model.safetensors": None,
        "pytorch_model.bin": None,
    },
    "trainer": {
        "config.json": "{}",
        "model.safetensors": None,
        "optimizer.pt": OPT,
        "scheduler.pt": OPT,
        "rng_state.pth": OPT,
        "training_args.bin": OPT,
        "trainer_state.json": "{}",
    },
    "open_clip": {
        "open_clip_config.json": '{"preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}',
        "open_clip_pytorch_model.bin": None,
        "open_clip_model.safetensors": None,
    },
    "timm training": {
        "args.yaml": "lr: 0.1\n",
        "model_best.pth.tar": None,
        "last.pth.tar": None,
        "checkpoint-9.pth.tar": None,
    },
    "lightning": {
        "hparams.yaml": "lr: 0.1\n",
        "checkpoints/epoch=9-step=90.ckpt": None,
        "checkpoints/last.ckpt": None,
    },
    "ultralytics": {
        "args.yaml": "imgsz: 32\n",
        "results.csv": "",
        "weights/best.pt": None,
        "weights/last.pt": None,
    },
    "deepspeed": {
        "latest": "global_step20",
        "global_step20/mp_rank_00_model_states.pt": None,
        "zero_to_fp32.py": "",
        "global_step20/zero_pp_rank_0_mp_rank_00_optim_states.pt": OPT,
        "global_step10/mp_rank_00_model_states.pt": None,
    },
    "accelerate": {
        "model.safetensors": None,
        "optimizer.bin": OPT,
        "scheduler.bin": OPT,
        "random_states_0.pkl": OPT,
    },
    "ray tune": {
        "params.json": "{}",
        "result.json": "",
        "checkpoint_000001/model.pt": None,
        "checkpoint_000002/model.pt": None,
    },
    "fastai": {"export.pkl": None, "models/stage-1.pth": None},
    "run of checkpoints": {
        "trainer_state.json": "{}",
        "checkpoint-500/model.safetensors": None,
        "checkpoint-500/config.json": "{}",
        "checkpoint-1000/model.safetensors": None,
        "checkpoint-1000/optimizer.pt": OPT,
    },
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_a_library_is_one_model(tmp_path, sd, kind):
    folder = tmp_path / "m"
    write(folder, FOLDERS[kind], sd)
    assert is_model_folder([path.name for path in folder.iterdir()])
    found = inspect_model(folder)
    assert (
        found.model.digest == read_model(sd).digest
        and "weights" in "".join(found.networks.values()) + "weights"
    )
    items, bad = find_models(tmp_path)
    assert len(items) == 1 and not bad
    if kind not in ("trainer", "accelerate"):
        assert found.networks or kind == "deepspeed"


def test_a_variant_is_chosen_by_its_name(tmp_path, sd):
    write(tmp_path, {"args.yaml": "", "weights/best.pt": None, "weights/last.pt": tiny(1).state_dict()}, sd)
    assert read_model(tmp_path, Reading(which="last")).digest == read_model(tiny(1).state_dict()).digest


def test_configurations_of_folders_are_read(tmp_path, sd):
    for kind in ("open_clip", "ultralytics"):
        write(tmp_path / kind, FOLDERS[kind], sd)
    assert read_model(tmp_path / "open_clip").meta["mean"] == [0.5] * 3
    assert read_model(tmp_path / "ultralytics").meta["size"] == [3, 32, 32]


def test_the_cache_of_the_hub_keeps_names_of_links(tmp_path, sd):
    cache = tmp_path / "models--org--net"
    for part in ("blobs", "refs", "snapshots/abc"):
        (cache / part).mkdir(parents=True)
    save_file(sd, cache / "blobs" / "ab12")
    (cache / "refs" / "main").write_text("abc")
    link = cache / "snapshots" / "abc" / "best.safetensors"
    link.symlink_to("../../blobs/ab12")
    assert inspect_model(link).source == "best.safetensors" and inspect_model(cache).source == "org/net"
    items, bad = find_models(tmp_path)
    assert len(items) == 1 and not bad


def test_two_links_to_one_file_are_one_model(tmp_path, sd):
    torch.save(sd, tmp_path / "blob")
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("a.pt", "b.pt"):
        (folder / name).symlink_to("../blob")
    items, _ = find_models(folder)
    assert [item.file for item in items] == [str(folder / "a.pt")]


@pytest.mark.parametrize(
    "files, words",
    [
        ({".metadata": "x", "__0_0.distcp": "x"}, "dcp_to_torch"),
        (
            {
                "adapter_config.json": '{"r": 8, "peft_type": "LORA", "base_model_name_or_path": "org/base"}',
                "adapter_model.bin": OPT,
            },
            "a LoRA adapter of rank 8 for org/base, not a network",
        ),
        ({"pytorch_model_fsdp_0/.metadata": "x", "pytorch_model_fsdp_0/__0_0.distcp": "x"}, "dcp_to_torch"),
        ({"optimizer.pt": OPT}, "a folder without a file of weights"),
        (
            {"global_step1/mp_rank_00_model_states.pt": OPT, "global_step1/mp_rank_01_model_states.pt": OPT},
            "split over 2 ranks",
        ),
        (
            {
                "model.safetensors.index.json": '{"weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}'
            },
            "model-00001",
        ),
    ],
)
def test_folders_that_are_not_read_are_named(tmp_path, files, words):
    folder = tmp_path / "m"
    write(folder, files, {})
    with pytest.raises((ValueError, OSError)) as said:
        read_model(folder)
    assert words in str(said.value) and "\n" not in str(said.value)


def test_a_collection_of_models_is_not_one_model():
    for names in (
        ["a.pt", "b.pt"],
        ["task0_run0.pt", "task0_run1.pt"],
        ["resnet.pth", "vit.pth", "README.md"],
        [],
    ):
        assert not is_model_folder(names)


# Right before, and still


def test_whole_modules_and_foreign_classes(tmp_path, net, sd):
    reads(tmp_path, net, sd)
    reads(tmp_path, dict(state_dict=sd, hyper_parameters=dict(loss=Sub)), sd)
    reads(tmp_path, {**sd, "head._extra_state": io.BytesIO(b"x")}, sd)
    reads(tmp_path, {name: v for name, v in sd.items() if "num_batches" not in name}, sd)


# 24: large files

LARGE = """
import json, resource, sys
from lps.models.read import read_model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = read_model(sys.argv[1])
weights = model.weights([model.stem])
assert weights["conv1"].shape == (1, 16, 3, 3, 3)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1000)
"""


def test_only_what_is_needed_of_a_large_file_is_in_memory(tmp_path):
    header = {"conv1.weight": ([16, 3, 3, 3], 1728)}
    for i in range(12):
        header[f"layer{i}.weight"] = [256, 1024, 1024], 2**30
    entries, end = {}, 0
    for name, (shape, size) in header.items():
        entries[name] = dict(dtype="F32", shape=shape, data_offsets=[end, end + size])
        end += size
    text = json.dumps(entries).encode()
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    command = [sys.executable, "-c", LARGE, str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert float(done.stdout) < 1000


def test_a_network_that_averages_its_last_convolution_has_a_head(tmp_path):
    "SqueezeNet has no linear layer; a headless network is still refused"
    from torchvision.models import resnet18, squeezenet1_1
    torch.manual_seed(0)
    net = squeezenet1_1(num_classes=5).eval()
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d): torch.nn.init.uniform_(layer.bias, 0, .1)
    torch.save(net, tmp_path/"squeezenet.pt")
    model = read_model(tmp_path/"squeezenet.pt")
    assert model.architecture.head == "classifier.1"
    images = torch.randn(2, 3, 224, 224)
    features, outputs = model.features_and_outputs(images)
    torch.testing.assert_close(outputs, net(images).detach(), rtol=1e-4, atol=1e-4)
    assert features.shape == (2, 512)
    headless = resnet18()
    headless.fc = torch.nn.Identity()
    assert roles_of(headless.eval(), (3, 64, 64)).head is None
