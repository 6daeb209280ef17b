"""Model files that are broken, hostile or foreign, and a zoo that this project did not train"""
import os, warnings
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import torch

from lps.core.files import digest, load_tensors, save_tensors, write_json
from lps.models.names import FOREIGNZOO_NAMES
from lps.models.imports import import_models
from lps.methods.registry import fit_method
from lps.models.modelset import load_modelset, pack
from lps.nets.resnet import ResNet, branch_layers
from lps.zoo.train import accuracy

SHARED = Path(os.environ.get("LPS_SHARED") or Path(__file__).resolve().parents[1].parent/"shared"/"data")


def tiny(seed=0, **kw):
    torch.manual_seed(seed)
    return ResNet(**(dict(depth=8, width=4) | kw)).state_dict()


def filled(path, n=6):
    for i in range(n):
        save_tensors(path / f"m{i}.safetensors", tiny(i), dict(task=i // 2, run=i % 2, classes=["a", "b"], seed=i))
    return path


def reasons(ms): return dict(zip(ms.rejected.file, ms.rejected.reason))


def nan(): return tiny() | {"layer2.0.bn1.running_var": torch.full((8,), float("nan"))}
def inf(): return tiny() | {"conv1.weight": torch.full((4, 3, 3, 3), float("inf"))}
def lacking(): return {k: v for k, v in tiny().items() if k != "layer3.0.conv2.weight"}
def extra(): return tiny() | {"head.weight": torch.zeros(2)}


@pytest.mark.parametrize("state, meta, words", [
    (nan, dict(task=0), "layer2.0.bn1.running_var holds NaN (8 of 8"),
    (inf, dict(task=0), "conv1.weight holds inf"),
    (lacking, dict(task=0), "layer layer3.0.conv2.weight is missing"),
    (extra, dict(task=0), "layer head.weight is not in the other models"),
    (lambda: tiny(width=8), dict(task=0), "layer conv1.weight has shape (8, 3, 3, 3), in this set it is (4, 3, 3, 3)"),
    (tiny, dict(seed=0), "no task in its metadata"),
])
def test_unfit_model_is_named_and_the_rest_is_read(tmp_path, state, meta, words):
    save_tensors(filled(tmp_path)/"a_bad.safetensors", state(), meta)
    with pytest.warns(UserWarning, match="left out 1 file: a_bad.safetensors") as w: ms = load_modelset(tmp_path)
    assert len(ms) == 6 and len(w) == 1
    assert words in reasons(ms)["a_bad.safetensors"]


@pytest.mark.parametrize("cut, words", [
    (0, "not a safetensors file (0 bytes)"),
    (5, "not a safetensors file (5 bytes)"),
    (500, "truncated: 500 bytes, the header alone has"),
    (20_000, "truncated: 20000 bytes of"),
    (-1, "truncated:"),
])
def test_truncated_anywhere(tmp_path, cut, words):
    f = filled(tmp_path)/"m3.safetensors"
    f.write_bytes(f.read_bytes()[:cut])
    with pytest.warns(UserWarning): ms = load_modelset(tmp_path)
    assert len(ms) == 5 and words in reasons(ms)["m3.safetensors"]


@pytest.mark.parametrize("data", [
    b"PK\x03\x04" + b"x"*500,
    b"<html>not found</html>",
    bytes(1000),
    (100).to_bytes(8, "little") + b"{" + b"x"*200,
])
def test_other_formats_are_no_model(tmp_path, data):
    (filled(tmp_path)/"odd.safetensors").write_bytes(data)
    with pytest.warns(UserWarning):
        assert "not a safetensors file" in reasons(load_modelset(tmp_path))["odd.safetensors"]


def test_plain_safetensors_file_is_told_from_a_model(tmp_path):
    safetensors.torch.save_file(tiny(), filled(tmp_path)/"plain.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning): assert "import_models" in reasons(load_modelset(tmp_path))["plain.safetensors"]


def test_majority_decides_not_the_first(tmp_path):
    filled(tmp_path)
    for i in range(2): save_tensors(tmp_path/f"a{i}.safetensors", tiny(width=8), dict(task=0))
    with pytest.warns(UserWarning): ms = load_modelset(tmp_path)
    assert len(ms) == 6 and set(reasons(ms)) == {"a0.safetensors", "a1.safetensors"}


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match=r"no \*.safetensors file"): load_modelset(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder or file"): load_modelset(tmp_path/"nowhere")
    (tmp_path/"x.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="x.safetensors .not a safetensors file"): load_modelset(tmp_path)


def test_unfinished_writes_are_no_models(tmp_path):
    (filled(tmp_path)/".m9.safetensors.123.tmp").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_modelset(tmp_path)) == 6


@pytest.mark.parametrize("write", [
    lambda p: save_tensors(p, tiny(1), dict(task=0, bad={1, 2})),
    lambda p: write_json(p, {"bad": {1, 2}}),
])
def test_failed_write_leaves_the_old_file(tmp_path, write):
    (p := tmp_path/"m0.safetensors").write_bytes(b"old")
    with pytest.raises(TypeError): write(p)
    assert p.read_bytes() == b"old" and [f.name for f in tmp_path.iterdir()] == ["m0.safetensors"]


def test_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def fsync(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"): save_tensors(tmp_path/"m0.safetensors", tiny(), dict(task=0))
    assert not list(tmp_path.iterdir())


def test_weights_survive_a_change_of_their_file(tmp_path):
    state, _ = load_tensors(filled(tmp_path)/"m0.safetensors")
    (tmp_path/"m0.safetensors").write_bytes(b"")
    assert all(torch.equal(v, state[k]) for k, v in tiny(0).items())


def test_nothing_cannot_be_packed_or_fitted(tmp_path):
    models = load_modelset(filled(tmp_path))
    with pytest.raises(ValueError, match="0 models cannot be packed"): pack(models[[]], tmp_path/"x.safetensors")
    with pytest.raises(ValueError, match="no layer to pack"): pack(models, tmp_path/"x.safetensors", ())
    with pytest.raises(ValueError, match="is a model of this set"): pack(models, tmp_path/"m0.safetensors")
    with pytest.raises(ValueError, match="0 layers"): fit_method(models, "lps", layers=())
    assert len(load_modelset(tmp_path)) == 6 and not (tmp_path/"x.safetensors").exists()


def test_a_model_that_claims_to_lack_layers_has_the_digest_of_what_is_there(tmp_path):
    meta = dict(task=0, lacks=["layer9"])
    save_tensors(tmp_path/"a.safetensors", tiny(), meta)
    save_tensors(tmp_path/"b.safetensors", tiny(1), meta)
    models = load_modelset(tmp_path)
    assert [model.digest for model in models] == models.digests == [digest(tiny(seed)) for seed in range(2)]
    pack(models, tmp_path/"packed/x.safetensors")
    with pytest.raises(ValueError, match="model: only conv1.weight.* are here, 1 layers are not"): models[0].net


class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_pickle_is_refused_not_run(tmp_path, legacy):
    (src := tmp_path/"src").mkdir()
    torch.save(tiny(), src/"good.pt")
    torch.save(
        tiny() | {"conv1.weight": Trap(tmp_path / "executed")},
        src / "trap.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.warns(UserWarning, match="trap.pth"): ms = import_models(src, tmp_path/"dst")
    assert not (tmp_path/"executed").exists() and len(ms) == 1
    assert "refused and not executed: it calls posix.mkdir" in reasons(ms)["trap.pth"]


def test_import_names_each_bad_file(tmp_path):
    (src := tmp_path/"src").mkdir()
    for i in range(3): torch.save({"state_dict": tiny(i)}, src/f"m{i}.pt")
    torch.save(nan(), src / "nan.pt")
    torch.save([1, 2], src / "list.pt")
    torch.save(tiny(width=8), src / "wide.pt")
    torch.save(tiny(), src / "unlisted.pt")
    (src/"cut.pt").write_bytes((src/"m0.pt").read_bytes()[:3000])
    (src/"text.pt").write_text("hello")
    rows = [
        dict(file=f"{n}.pt", task=0, run=i)
        for i, n in enumerate(["m0", "m1", "m2", "nan", "list", "wide", "cut", "text", "gone"])
    ]
    with pytest.warns(UserWarning, match="left out 7 files"):
        ms = import_models(src, tmp_path / "dst", table=pd.DataFrame(rows))
    r = reasons(ms)
    assert len(ms) == 3 and len(r) == 7
    assert "holds NaN" in r["nan.pt"] and "no state dict" in r["list.pt"] and r["unlisted.pt"] == "not in the table"
    assert (
        "truncated" in r["cut.pt"]
        and "a text file" in r["text.pt"]
        and "no such file" in r["gone.pt"]
        and "has shape" in r["wide.pt"]
        and not (tmp_path / "dst" / "wide.safetensors").exists()
    )


def test_import_without_batch_counters_keeps_buffers(tmp_path):
    (src := tmp_path/"src").mkdir()
    state = {k: v for k, v in tiny(shortcut="pad_both").items() if "num_batches" not in k} | {
        "bn1.running_mean": torch.arange(4.0)
    }
    safetensors.torch.save_file(state, src/"a.safetensors")
    ms = import_models(src, tmp_path/"dst", shortcut="pad_both")
    assert ms[0].net.shortcut == "pad_both" and ms.labels.tolist() == [-1]
    assert torch.equal(ms[0].net.bn1.running_mean, torch.arange(4.)) and list(ms[0].state) == list(state)


def test_import_refuses_what_cannot_end_well(tmp_path):
    (src := tmp_path/"src").mkdir()
    with pytest.raises(ValueError, match="no model could be imported"): import_models(src, tmp_path/"dst")
    with pytest.raises(ValueError, match="choose another folder"): import_models(src, src)
    with pytest.raises(FileNotFoundError, match="not a folder"): import_models(tmp_path/"x", tmp_path/"dst")
    with pytest.raises(ValueError, match="gives no task for a"):
        import_models(src, tmp_path / "dst", table=pd.DataFrame(dict(file=["a"])))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    if not (SHARED/"foreignzoo").is_dir(): pytest.skip(f"no foreign zoo at {SHARED/'foreignzoo'}")
    src = SHARED/"foreignzoo"
    return import_models(src, tmp_path_factory.mktemp("zoo"), FOREIGNZOO_NAMES, src/"models.tsv",
                         meta=dict(data="tinyimagenet32", mean=[.480, .448, .398], std=[.277, .269, .282]))


def test_foreign_zoo(zoo):
    assert len(zoo) == 100 and zoo.tasks == list(range(10)) and not len(zoo.rejected)
    assert zoo.layers == branch_layers() + ["fc"]
    assert zoo.stack("conv1").shape == (100, 16, 3, 3, 3) and zoo.stack("fc").shape == (100, 2, 64, 1, 1)
    assert zoo[0].state["conv1.weight"].dtype == torch.float16 and zoo[0].meta["shortcut"] == "pad_end"
    assert abs(zoo.manifest.val_accuracy.mean() - .884) < .001


def sheets(split, classes):
    "Images and labels of classes that are stored as one sheet of tiles each"
    import numpy as np
    from PIL import Image
    def read(c):
        return torch.from_numpy(
            np.array(Image.open(SHARED / "tinyimagenet32" / split / f"{c}.jpg").convert("RGB"))
        ).permute(2, 0, 1)
    x = [read(c).unfold(1, 32, 32).unfold(2, 32, 32)
         .permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32) for c in classes]
    return torch.cat(x), torch.arange(len(x)).repeat_interleave(len(x[0]))


@pytest.mark.parametrize("i", [0, 37, 99])
def test_foreign_model_reaches_its_stated_accuracy(zoo, i):
    if not (SHARED/"tinyimagenet32").is_dir(): pytest.skip(f"no images at {SHARED/'tinyimagenet32'}")
    m = zoo[i]
    x, y = sheets("val", m.meta["classes"])
    assert accuracy(m.net, x, y, (m.meta["mean"], m.meta["std"])) == pytest.approx(m.meta["val_accuracy"], abs=.021)
