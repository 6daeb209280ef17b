"""Settings of PyTorch around a call: results are the same, whatever the caller has set"""
import contextlib

import pytest
import torch

from lps.align import align_layer
from lps.core.files import save_tensors
from lps.index.index import ModelIndex
from lps.lineage.compare import compare
from lps.methods.registry import embed_models, fit_method, score_models
from lps.models.modelset import load_modelset, pack
from lps.models.inspect import inspect_model
from lps.models.read import read_model
from lps.nets.resnet import ResNet


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try: yield
    finally: torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try: yield
    finally: torch.set_default_device(None)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device": lambda: default_device("meta"),
    "no gradients": lambda: torch.set_grad_enabled(False),
    "inference": lambda: torch.inference_mode(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Six networks of three tasks, a checkpoint, and a fitted method"
    folder = tmp_path_factory.mktemp("settings")
    about = dict(mean=[.5]*3, std=[.25]*3, classes=["a", "b"])
    for i in range(6):
        torch.manual_seed(i)
        save_tensors(folder/f"zoo/m{i}.safetensors", ResNet(8, 4).state_dict(), dict(task=i//2, run=i % 2) | about)
    torch.save(ResNet(8, 4).state_dict(), folder/"query.pt")
    return folder


FAST = dict(n_filters=3, epochs=1, milestones=())
IMAGES = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def fitted_lps(folder): return fit_method(load_modelset(folder/"zoo"), "lps", **FAST)


def index_of(folder, method="stem-signature"):
    models = load_modelset(folder/"zoo")
    return ModelIndex(fit_method(models, method), models)


CALLS = {
    "read": lambda folder: read_model(folder/"query.pt").state["conv1.weight"],
    "inspect": lambda folder: inspect_model(folder/"query.pt").architecture,
    "module": lambda folder: read_model(NET).digest,
    "outputs": lambda folder: load_modelset(folder/"zoo").outputs(IMAGES),
    "features": lambda folder: load_modelset(folder/"zoo").features(IMAGES),
    "weights": lambda folder: load_modelset(folder/"zoo").stack("conv1", folded=True),
    "lps": lambda folder: embed_models(fitted_lps(folder), load_modelset(folder/"zoo")),
    "lps scores": lambda folder: score_models(fitted_lps(folder), load_modelset(folder/"zoo")),
    "signature": lambda folder: embed_models(index_of(folder).fitted, load_modelset(folder/"zoo")),
    "chain": lambda folder: index_of(folder, "chain").embedding,
    "probes": lambda folder: index_of(folder, "probes").embedding,
    "query": lambda folder: index_of(folder).query(folder/"query.pt", 3).similarity.tolist(),
    "answer": lambda folder: index_of(folder, "probes").answer(folder/"query.pt", 3).table.file.tolist(),
    "compare": lambda folder: compare(load_modelset(folder/"zoo")[0], read_model(folder/"query.pt")).verdict,
    "pack": lambda folder: pack(load_modelset(folder/"zoo"), folder/"packed.safetensors").digests,
    "align": lambda folder: align_layer(load_modelset(folder/"zoo").stack("conv1"), WEIGHTS)[0],
}
WEIGHTS = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
NET = ResNet(8, 4)


@pytest.fixture(scope="module")
def usual(folder): return {name: call(folder) for name, call in CALLS.items()}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CALLS)
def test_settings_around_a_call_change_nothing(folder, usual, name, setting):
    with SETTINGS[setting](): found = CALLS[name](folder)
    expected = usual[name]
    if not isinstance(expected, torch.Tensor): assert found == expected
    else: assert found.dtype == expected.dtype and found.device.type == "cpu" and torch.equal(found, expected)
