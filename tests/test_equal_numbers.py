"""Equal inputs give equal numbers: embeddings of a small fixed model set are those that were stored

To store them again after a change that is meant to move them: python tests/test_equal_numbers.py"""
import json
import tempfile
from pathlib import Path

import pytest
import torch

import lps.methods.probes  # noqa: F401  it registers its methods
import lps.methods.signatures  # noqa: F401
from lps.core.files import save_tensors
from lps.methods.registry import embed_models, fit_method
from lps.models.modelset import load_modelset
from lps.nets.resnet import ResNet

STORED = Path(__file__).with_name("equal_numbers.json")
SETTINGS = {
    "lps": dict(epochs=5, milestones=(3, 4), n_filters=8),
    "stem-signature": {},
    "two-spectra-probes": dict(n_images=16),
}


def write_models(folder: Path):
    "Twelve networks with random weights: three tasks, whose stems differ in scale, with four networks each"
    for task in range(3):
        for run in range(4):
            torch.manual_seed(10*task + run)
            net = ResNet(depth=8, width=4)
            state = net.state_dict()
            for name, tensor in state.items():
                if name.endswith("running_var"): tensor.uniform_(.5, 2)
                elif name.endswith(("bias", "running_mean")): tensor.normal_(0, .1)
            state["conv1.weight"] *= 1 + task
            meta = dict(task=task, run=run, shortcut="conv")
            save_tensors(folder/f"task{task}_run{run}.safetensors", state, meta)


def embeddings(folder: Path) -> dict[str, list]:
    "The embedding of every model by each method, seed 0"
    write_models(folder)
    models, found = load_modelset(folder), {}
    for method, settings in SETTINGS.items():
        fitted = fit_method(models, method, seed=0, **settings)
        rows = embed_models(fitted, models)[:, :8]
        found[method] = [[round(value, 6) for value in row] for row in rows.tolist()]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return embeddings(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("method", SETTINGS)
def test_embeddings_are_those_that_were_stored(found, method):
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    torch.testing.assert_close(torch.tensor(found[method]), torch.tensor(stored[method]), atol=2e-4, rtol=0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        STORED.write_text(json.dumps(embeddings(Path(folder)), indent=1) + "\n", encoding="utf-8")
