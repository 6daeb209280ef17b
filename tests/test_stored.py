"""Packed first layers with stored observations: methods that read whole networks give what the networks give"""
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_equal_numbers import write_models

from lps.core.files import load_tensors, save_tensors
from lps.methods.registry import embed_models, fit_many, fit_method, leading_method, observe_models
from lps.models.modelset import load_modelset

PACK = runpy.run_path(str(ROOT/"scripts/pack_zoo.py"))["pack_epoch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    write_models(folder/"whole")
    PACK(load_modelset(folder/"whole"), folder/"packed", 3, "toys")
    return folder


def test_whole_and_packed_networks_are_embedded_alike(folder):
    whole, packed = load_modelset(folder/"whole"), load_modelset(folder/"packed/epoch3.safetensors")
    assert packed.layers == ["conv1"] and leading_method(packed) == leading_method(whole) == "two-spectra-probes"
    for method, close in {"two-spectra-probes": 2e-3, "all-layer-signature": .02, "experts": .02}.items():
        z, stored = (embed_models(fit_method(models, method), models) for models in (whole, packed))
        assert stored.shape == z.shape
        torch.testing.assert_close(stored@stored.T, z@z.T, atol=close, rtol=0)


def test_parts_of_a_packed_set_keep_their_observations(folder):
    packed = load_modelset(folder/"packed/epoch3.safetensors")
    outputs = observe_models(packed, "two-spectra-probes")["outputs"]
    assert torch.equal(observe_models(packed[[7, 2]], "two-spectra-probes")["outputs"], outputs[[7, 2]])
    fitted = fit_many(packed, [dict(train=[0, 1, 4, 5], method="two-spectra-probes")])[0]
    alone = fit_method(packed[[0, 1, 4, 5]], "two-spectra-probes")
    assert torch.equal(embed_models(fitted, packed), embed_models(alone, packed))


def test_other_settings_need_whole_networks(folder):
    packed = load_modelset(folder/"packed/epoch3.safetensors")
    with pytest.raises(ValueError, match="no known architecture"):
        fit_method(packed, "two-spectra-probes", n_images=16)


@pytest.mark.parametrize("spoil, why", [
    (lambda tensors, about: about["digests"].reverse(), "of other models"),
    (lambda tensors, about: about["files"].pop(), "of other models"),
    (lambda tensors, about: tensors["layers"].fill_(torch.nan), "'layers' does not fit"),
    (lambda tensors, about: tensors.pop("outputs"), "'outputs' does not fit"),
    (lambda tensors, about: about.pop("methods"), "methods"),
])
def test_observations_of_other_models_are_refused(folder, tmp_path, spoil, why):
    tensors, meta = load_tensors(folder/"packed/observed/epoch3.safetensors")
    about = meta["observed"]
    spoil(tensors, about)
    (tmp_path/"epoch3.safetensors").write_bytes((folder/"packed/epoch3.safetensors").read_bytes())
    save_tensors(tmp_path/"observed/epoch3.safetensors", tensors, dict(observed=about))
    with pytest.raises(ValueError, match=rf"observed/epoch3\.safetensors: .*{why}"):
        load_modelset(tmp_path/"epoch3.safetensors")


def test_a_build_in_parts_packs_what_is_finished(tmp_path):
    "Nothing if the time is over at once; the next part packs all networks"
    script = ROOT/"scripts/build_part.py"
    options = "--images digits --recipe digits --models 1 --until 2 --keep 1 --device cpu --packed none".split()
    def part(seconds):
        command = [sys.executable, str(script), str(tmp_path/"build"), str(tmp_path/"out"), *options]
        done = subprocess.run([*command, "--seconds", str(seconds)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "time is over after 0 s" in part(0) and not (tmp_path/"out").exists()
    assert "all networks are packed" in part(250)
    packed = load_modelset(tmp_path/"out/epoch2.safetensors")
    assert len(packed) == 5 and set(packed.stored) == {"two-spectra-probes", "all-layer-signature"}
