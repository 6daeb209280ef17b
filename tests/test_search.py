"""The packed index, damaged or not, and queries: a copy, a permutation, a foreign checkpoint"""
import json
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lps.core.files import checked, load_tensors, save_tensors
from lps.models.model import Model
from lps.models.modelset import load_modelset
from lps.order_chain import permute, random_perms
from lps.nets.resnet import resnet_spec
from lps.nets.resnet import ResNet
from lps.core.files import digest
from lps.index.index import ModelIndex
from lps.index.store import Rows, StoreHeader, read_packed, seal_of, sealed_name, unpack_rows, write_packed
from lps.methods.registry import fit_method, load_fitted, save_fitted

CONFIG = ("layers", "tasks", "method", "kernels", "n_filters", "folded", "stem", "recipe", "magic")
FACTS = ("file", "task", "class_0", "class_1", "val_accuracy", "label", "sketch", "key")
HEADER = ("format", "width", "rows", "facts", "segments", "removed", "gone", "chain", "about", "seal")
ABOUT = ("method", "method_file", "calibration")
FIELDS = [("config", name) for name in CONFIG] + [("fact", name) for name in FACTS]
FIELDS += [("header", name) for name in HEADER] + [("about", name) for name in ABOUT]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(PLAIN, lambda x: st.lists(x, max_size=12) | st.dictionaries(st.text(max_size=5), x, max_size=3))

SPEC = resnet_spec(depth=8, width=4, shortcut="pad_end")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for i in range(12):
        torch.manual_seed(i)
        state = {
            k: v.half() if v.ndim > 1 else v
            for k, v in ResNet(depth=8, width=4, shortcut="pad_end").state_dict().items()
        }
        meta = dict(task=i // 3, run=i % 3, shortcut="pad_end") | (
            dict(classes=["a", "b"], val_accuracy=0.9) if i < 6 else {}
        )
        save_tensors(folder/f"m{i:02d}.safetensors", state, meta)
    return load_modelset(folder)


@pytest.fixture(scope="module", params=["lps", "lps-folded", "fc"])
def index(models, request):
    method, _, folded = request.param.partition("-")
    net = fit_method(
        models[models.manifest.task < 3],
        layers=("conv1", "layer2.0.conv1"),
        method=method,
        folded=bool(folded),
        epochs=2,
        milestones=(1,),
        n_filters=8,
    )
    return ModelIndex(net, models)


@pytest.fixture(scope="module")
def written(models, tmp_path_factory):
    "A packed index"
    path = tmp_path_factory.mktemp("index")/"index.zip"
    ModelIndex(fit_method(models, layers=("conv1",), epochs=2, milestones=(1,), n_filters=8), models).save(path)
    return path


def test_every_model_finds_its_permuted_copy(models, index):
    "To a method that aligns, the copy is the model itself; to the baseline it is another"
    copies = [Model(permute(m.state, SPEC, random_perms(SPEC, i)), {}) for i, m in enumerate(models)]
    found = [index.query(c, 1) for c in copies]
    similarity = np.array([f.similarity[1] for f in found])
    if index.fitted.method == "fc":
        assert (similarity < 1 - 1e-5).any()
        return
    assert [f.file[1] for f in found] == models.manifest.file.tolist()
    assert np.allclose(similarity, 1, atol=1e-5)


def test_a_copy_is_known_by_its_weights(models, index, tmp_path):
    "Under another name, another order of tensors, another precision, as a pickled state dict"
    state = models[4].state
    save_tensors(tmp_path/"renamed.safetensors", dict(reversed(state.items())), dict(task=9))
    torch.save(state, tmp_path/"a.pt")
    save_file({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, tmp_path/"plain.safetensors")
    files = [tmp_path/name for name in ("renamed.safetensors", "a.pt", "plain.safetensors")]
    for query in (models[4], *files, str(files[1])):
        assert index.query(query, 1, with_self=True).file[1] == "m04.safetensors"
        rest = index.query(query, 100)
        assert len(rest) == 11 and "m04.safetensors" not in rest.file.tolist()
        by_task = index.tasks(query)
        assert by_task.set_index("task").models[1] == 2 and by_task.models.sum() == 11
        assert index.tasks(query, with_self=True).models.sum() == 12


def test_duplicates_in_the_gallery_do_not_shorten_the_answer(models, index):
    twice = ModelIndex(index.fitted, models[[4, 4, 4, 0, 1, 2, 7]])
    assert len(twice.query(models[4], 3)) == 3 and len(twice.query(models[0], 6)) == 6
    assert len(ModelIndex(index.fitted, models[[4]]).query(models[4])) == 0
    assert len(ModelIndex(index.fitted, models[[4]]).tasks(models[4])) == 0


def test_a_set_asks_as_its_models_do(models, index):
    together = index.query(models[3:6], 4)
    for i in (3, 4, 5):
        alone = index.query(models[i], 4)
        pd.testing.assert_frame_equal(together.loc[models.manifest.file[i]], alone, atol=1e-6)
        assert alone.similarity.is_monotonic_decreasing and alone.index.tolist() == [1, 2, 3, 4]
    assert together.index.names == ["query", "rank"]
    assert index.tasks(models[3:6]).index.names == ["query", "rank"]


def test_save_and_load(models, index, tmp_path):
    path = tmp_path/"index.zip"
    index.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["index.zip"]
    again = ModelIndex.load(path)
    pd.testing.assert_frame_equal(again.query(models, 3), index.query(models, 3))
    pd.testing.assert_frame_equal(again.tasks(models), index.tasks(models))
    again.save(tmp_path/"again.zip")
    assert (tmp_path/"again.zip").read_bytes() == path.read_bytes()


def test_files_that_are_no_index(models, index, tmp_path):
    path = tmp_path/"index.zip"
    index.save(path)
    whole = path.read_bytes()
    for data in (whole[:len(whole)//2], whole[:100], b"", b"an index"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="index.zip is not a packed index"): ModelIndex.load(path)
    with pytest.raises(FileNotFoundError, match="lps index build"): ModelIndex.load(tmp_path/"none.zip")
    save_fitted(tmp_path/"net.safetensors", index.fitted)
    with pytest.raises(ValueError, match="is not a packed index"): ModelIndex.load(tmp_path/"net.safetensors")
    path.unlink()
    index.save(path)
    with pytest.raises(ValueError, match="index.zip"): load_fitted(path)


def test_an_index_of_an_older_version_is_refused_with_its_cure(index, tmp_path):
    save_tensors(tmp_path/"old.safetensors", dict(embedding=torch.zeros(1, 2)), dict(index={}))
    with pytest.raises(ValueError, match="old.safetensors is not a packed index.*build the index again"):
        ModelIndex.load(tmp_path/"old.safetensors")
    index.save(tmp_path/"old")
    header = checked(json.loads((tmp_path/"old/header.json").read_text()), StoreHeader, "header")
    header.format = "lps store 1"
    header.seal = seal_of(header)
    (tmp_path/"old/header.json").write_text(json.dumps(vars(header)))
    with pytest.raises(ValueError, match="has format 'lps store 1', this version reads 'lps index 2': build the"):
        ModelIndex.load(tmp_path/"old")


@pytest.mark.parametrize("name, compression, says", [
    ("../../escaped", zipfile.ZIP_STORED, "is not the name of a file"),
    ("/etc/passwd", zipfile.ZIP_STORED, "is not the name of a file"),
    ("sub/rows.f32", zipfile.ZIP_STORED, "is not the name of a file"),
    ("bomb.bin", zipfile.ZIP_DEFLATED, "is compressed"),
])
def test_a_hostile_archive_is_refused(written, tmp_path, monkeypatch, name, compression, says):
    "Its seal fits, for anyone can compute that"
    files = read_packed(written) | {name: bytes(1000)}
    if compression != zipfile.ZIP_STORED: monkeypatch.setattr(zipfile, "ZIP_STORED", compression)
    write_packed(tmp_path/"hostile.zip", files)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=says): ModelIndex.load(tmp_path/"hostile.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.zip"]


def test_queries_that_cannot_be_answered(models, index, tmp_path):
    state = models[0].state
    wide = r"\(6, 3, 3, 3\), its branch was built for \(4, 3, 3, 3\)"
    for bad, match in ((Model(ResNet(depth=8, width=6).state_dict(), {}), wide),
                       (Model(state | {"fc.bias": torch.tensor([0, torch.inf])}, {}), "fc.bias holds inf"),
                       (Model({"fc.weight": torch.zeros(2, 4)}, {}), "no layer 'conv1'.*known are fc")):
        for ask in (index.query, index.tasks):
            with pytest.raises(ValueError, match=match): ask(bad)
    with pytest.raises(ValueError, match="k is 0"): index.query(models[0], 0)
    (tmp_path/"text.pt").write_text("no weights")
    with pytest.raises(ValueError, match="text.pt"): index.query(tmp_path/"text.pt")
    with pytest.raises(ValueError, match="0 models"): ModelIndex(index.fitted, models[[]])
    assert digest(state) != digest(models[1].state)


@given(place=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_a_flipped_bit_in_an_index_is_refused(written, place, bit):
    spoiled = bytearray(written.read_bytes())
    spoiled[place % len(spoiled)] ^= 1 << bit
    path = written.with_name("flipped.zip")
    path.write_bytes(spoiled)
    with pytest.raises((ValueError, OSError), match="flipped.zip"): ModelIndex.load(path)


def changed(files, field, value, folder):
    "The files of an index with another value in one place; seals fit where they can"
    part, name = field
    header = json.loads(files["header.json"])
    if part == "fact":
        rows = unpack_rows(files, "index")
        facts = rows.facts(rows.places)
        facts[0][name] = value
        other = Rows(rows.width)
        other.append(rows.rows, rows.digests(rows.places), rows.labels(rows.places), facts)
        return files | other.files(**rows.about)
    if part == "config":
        method = folder/"method.safetensors"
        method.write_bytes(files[header["about"]["method_file"]])
        state, meta = load_tensors(method)
        meta["fitted"]["config"][name] = value
        save_tensors(method, state, {"fitted": meta["fitted"]})
        data = method.read_bytes()
        header["about"]["method_file"] = sealed_name(data)
        files = files | {sealed_name(data): data}
    elif part == "about": header["about"][name] = value
    else: header[name] = value
    try: header["seal"] = seal_of(checked(header, StoreHeader, "header")) if field != ("header", "seal") else value
    except ValueError: pass
    return files | {"header.json": json.dumps(header).encode()}


@given(field=st.sampled_from(FIELDS), value=JSON)
def test_wrong_values_in_an_index_are_refused_or_harmless(written, models, field, value):
    path = written.with_name("wrong.zip")
    write_packed(path, changed(read_packed(written), field, value, written.parent))
    try:
        index = ModelIndex.load(path)
        index.query(models[0], 2), index.tasks(models[0]), repr(index), index.answer(models[0]).to_dict()
        index.check(), index.manifest
    except (ValueError, OSError): pass


def test_a_query_that_overflows_is_refused(models, index):
    huge = {name: weight.float()*1e30 if weight.is_floating_point() else weight
            for name, weight in models[0].state.items()}
    for ask in (index.query, index.tasks):
        with pytest.raises(ValueError, match="no finite embedding"): ask(Model(huge, {}))
    with pytest.raises(ValueError, match="0 models"): index.query(models[[]])
    with pytest.raises(ValueError, match="0 models"): index.tasks(models[[]])
