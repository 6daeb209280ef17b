"""Checkpoints from elsewhere: what is taken in, what is listed with which reason, and what is never touched"""
import os
import warnings

import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import nn

from lps.core.files import load_tensors, mark_complete, save_tensors, write_json
from lps.models.checkpoint import read_checkpoint
from lps.models.names import own_names, rename
from lps.models.imports import import_models, read_table
from lps.methods.registry import fit_method
from lps.models.modelset import load_modelset
from lps.models.inspect import inspect_model
from lps.models.read import Reading, read_model
from lps.index.index import ModelIndex


def tiny(seed=0):
    "Weights of a network of one convolution"
    g = torch.Generator().manual_seed(seed)
    return {"conv1.weight": torch.randn(2, 3, 3, 3, generator=g), "fc.weight": torch.randn(2, 2, generator=g)}


@pytest.fixture
def src(tmp_path):
    "A folder with one good checkpoint"
    (tmp_path/"src").mkdir()
    torch.save(tiny(), tmp_path/"src/good.pt")
    return tmp_path/"src"


def taken_in(src, **settings):
    "The models of an import, and why other files were left out"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = import_models(src, src.parent/"dst", **settings)
    return models, dict(zip(models.rejected.file, models.rejected.reason))


def contents(folder): return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Nothing is lost

def finished_build(folder):
    "A folder as a build leaves it"
    save_tensors(folder/"good.safetensors", tiny(5), dict(task=0))
    mark_complete(folder/"good.safetensors")
    write_json(folder/"build.json", dict(seed=1))


def test_an_import_into_a_build_is_refused_and_changes_nothing(src, tmp_path):
    finished_build(tmp_path/"built")
    before = contents(tmp_path/"built")
    with pytest.raises(ValueError, match="built is the folder of a build: choose another folder"):
        import_models(src, tmp_path/"built")
    assert contents(tmp_path/"built") == before


@pytest.mark.parametrize("other", ["good.pth", "good.ckpt", "good.bin", "GOOD.pt", "good.safetensors"])
def test_two_files_of_one_stem_are_refused_before_a_byte_is_written(src, other):
    if other.endswith("safetensors"): safetensors.torch.save_file(tiny(1), src/other)
    else: torch.save(tiny(1), src/other)
    if len(list(src.iterdir())) < 2: pytest.skip("a disk that takes capitals for small letters")
    with pytest.raises(ValueError) as said: import_models(src, src.parent/"dst")
    assert "good.pt" in str(said.value) and other in str(said.value) and "rename one" in str(said.value)
    assert not (src.parent/"dst").exists()


def test_a_second_folder_with_a_file_of_that_name_is_refused(src, tmp_path):
    taken_in(src)
    before = contents(tmp_path/"dst")
    (tmp_path/"more").mkdir()
    torch.save(tiny(1), tmp_path/"more/good.pt")
    torch.save(tiny(2), tmp_path/"more/another.pt")
    with pytest.raises(ValueError, match=r"more/good.pt would be written to .*dst/good.safetensors"):
        import_models(tmp_path/"more", tmp_path/"dst")
    assert contents(tmp_path/"dst") == before


def test_what_does_not_fit_a_set_that_is_there_leaves_it_alone(src, tmp_path):
    taken_in(src)
    before = contents(tmp_path/"dst")
    (tmp_path/"more").mkdir()
    torch.save(tiny() | {"fc.weight": torch.zeros(9, 9)}, tmp_path/"more/wide.pt")
    torch.save(tiny(3), tmp_path/"more/fits.pt")
    with pytest.warns(UserWarning, match="wide.pt"): import_models(tmp_path/"more", tmp_path/"dst")
    after = contents(tmp_path/"dst")
    assert after.keys() == before.keys() | {"fits.safetensors"} and before.items() <= after.items()


# What is left out is said

@pytest.mark.parametrize("name, words", [
    (".hid.pt", "a hidden file"),
    ("weights.npz", ".npz is not read: save a state dict with torch.save or safetensors"),
    ("weights.h5", ".h5 is not read"),
    ("weights.onnx", ".onnx is not read"),
    ("weights.PKL", ".pkl is not read"),
])
def test_a_file_that_is_not_read_is_listed(src, name, words):
    (src/name).write_bytes(b"something else")
    models, why = taken_in(src)
    assert len(models) == 1 and list(why) == [name] and words in why[name]


@pytest.mark.parametrize("name", ["x.PT", "x.ckpt", "x.bin", "x.Pth", "x.SafeTensors"])
def test_files_of_every_known_ending_come_in(src, name):
    if name.lower().endswith("safetensors"): safetensors.torch.save_file(tiny(1), src/name)
    else: torch.save(tiny(1), src/name)
    models, why = taken_in(src)
    assert len(models) == 2 and not why


@pytest.mark.parametrize("name", [".hid.safetensors", "x.PT", "x.ckpt", "x.bin", "x.SafeTensors"])
def test_a_gallery_lists_what_it_does_not_read(src, name):
    taken_in(src)
    torch.save(tiny(1), src.parent/"dst"/name)
    with pytest.warns(UserWarning, match="left out 1 file"): models = load_modelset(src.parent/"dst")
    assert len(models) == 1 and models.rejected.file.tolist() == [name]


# One bad file, one line

def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2, 3, 3, 3), .1, 0, torch.qint8)


def wrong(tensor): return lambda: tiny() | {"conv1.weight": tensor()}


UNFIT = {
    "meta": (wrong(lambda: torch.ones(2, 3, 3, 3, device="meta")), "holds no values of conv1.weight"),
    "int8": (wrong(lambda: torch.ones(2, 3, 3, 3, dtype=torch.int8)), "int8"),
    "boolean": (wrong(lambda: torch.ones(2, 3, 3, 3, dtype=torch.bool)), "bool"),
    "complex": (wrong(lambda: torch.ones(2, 3, 3, 3, dtype=torch.complex64)), "complex"),
    "NaN": (wrong(lambda: torch.full((2, 3, 3, 3), torch.nan)), "conv1.weight holds NaN"),
    "integer keys": (lambda: {0: torch.ones(2)}, "names are no text"),
    "a list": (lambda: [torch.ones(2)], "holds no state dict"),
    "one tensor": (lambda: torch.ones(2), "holds no state dict"),
    "nothing": (dict, "holds no state dict (tensors by name), but an empty dict"),
    "another module": (lambda: nn.Linear(2, 2), "layer conv1.weight is missing"),
    "tensors that repeat": (wrong(lambda: torch.ones(1).expand(300_000, 27)), "tensors that repeat their numbers"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_an_unfit_file_is_listed_and_the_others_come_in(src, kind):
    make, words = UNFIT[kind]
    torch.save(make(), src/"unfit.pt")
    models, why = taken_in(src)
    assert len(models) == 1 and list(why) == ["unfit.pt"] and words in why["unfit.pt"]
    assert "\n" not in why["unfit.pt"] and len(why["unfit.pt"]) < 300


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_floating_point_numbers_of_every_width_come_in(src, dtype):
    torch.save({name: tensor.to(dtype) for name, tensor in tiny(1).items()}, src/"narrow.pt")
    models, why = taken_in(src)
    assert len(models) == 2 and not why
    expected = torch.stack([model.state["conv1.weight"].float() for model in models])
    assert models.weights(["conv1"])["conv1"].equal(expected)


def test_parameters_that_require_gradients_are_detached(src):
    torch.save({name: nn.Parameter(tensor) for name, tensor in tiny(1).items()}, src/"parameters.pt")
    models, why = taken_in(src)
    assert len(models) == 2 and not why
    assert models.weights(["conv1"])["conv1"].requires_grad is False


def make_odd(src, kind):
    "Something in a folder that looks like a checkpoint"
    path = src/f"{kind}.pt"
    if kind == "folder": path.mkdir()
    if kind == "dangling": path.symlink_to(src/"nowhere.pt")
    if kind == "looping": path.symlink_to(path)
    if kind == "pipe": os.mkfifo(path)
    if kind == "torchscript": torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    if kind == "too-long": (src/f"{'x'*245}.pt").write_bytes((src/"good.pt").read_bytes())


@pytest.mark.parametrize("kind, words", [
    ("folder", "no regular file"),
    ("dangling", "a link to nothing"),
    ("looping", "a link to nothing"),
    ("pipe", "no regular file"),
    ("torchscript", "a TorchScript archive: save its state_dict() instead"),
    ("too-long", "could not be written: File name too long"),
])
def test_an_odd_thing_is_listed_and_the_others_come_in(src, kind, words):
    if kind == "pipe" and not hasattr(os, "mkfifo"): pytest.skip("no pipes here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_odd(src, kind)
    models, why = taken_in(src)
    assert len(models) == 1 and len(why) == 1 and words in next(iter(why.values()))


def test_an_archive_that_names_a_place_beyond_all_files_is_listed(src):
    data = bytearray((src/"good.pt").read_bytes())
    at = data.index(b"PK\x01\x02") + 42  # where the first entry begins
    data[at:at + 4] = b"\xff\xff\xff\x7f"
    (src/"far.pt").write_bytes(data)
    _, why = taken_in(src)
    assert why == {"far.pt": "truncated or damaged"}


class Sub(torch.Tensor): pass


@pytest.mark.parametrize("make", [
    quantised, lambda: torch.ones(2, 3, 3, 3).to_sparse(), lambda: torch.ones(2, 3, 3, 3).as_subclass(Sub),
])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_other_layouts_and_classes_are_read(tmp_path, make, zipped):
    torch.save(tiny() | {"conv1.weight": make()}, tmp_path/"x.pt", _use_new_zipfile_serialization=zipped)
    weight = read_model(tmp_path/"x.pt").state["conv1.weight"]
    assert type(weight) is torch.Tensor and weight.allclose(torch.ones(2, 3, 3, 3))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_no_query(tmp_path, dtype):
    torch.save(tiny() | {"conv1.weight": torch.ones(2, 3, 3, 3, dtype=dtype)}, tmp_path/"x.pt")
    with pytest.raises(ValueError, match=f"weights are {str(dtype).removeprefix('torch.')}: conv1.weight"):
        read_model(tmp_path/"x.pt")


# Tables are checked whole

@pytest.mark.parametrize("rows, words", [
    ([dict(file="good.pt", task=0), dict(file="good.pt", task=1)], "the table has good.pt twice, again in row 2"),
    ([dict(file="good.pt", task=0, val_accuracy=93.5)], "row 1 of the table: val_accuracy is 93.5"),
    ([dict(file="good.pt", task=0, val_accuracy="good")], "row 1 of the table: val_accuracy is 'good'"),
    ([dict(file="good.pt", task=None)], "the table gives no task for good.pt"),
    ([dict(file="good.pt", task=float("inf"))], "row 1 of the table: task is inf"),
    ([dict(file="good.pt", task=1e19)], "row 1 of the table: task is 1e+19"),
    ([dict(file="good.pt", task=.5)], "row 1 of the table: task is 0.5"),
    ([dict(file="good.pt", task=0, lacks="conv1")], "the table has an unknown column 'lacks': known are file, task"),
    ([dict(file="good.pt", task=0, versions="x")], "the table has an unknown column 'versions'"),
    ([dict(file=None, task=0)], "row 1 of the table names no file"),
    ([dict(file="good.pt")], "the table gives no task for good.pt"),
])
def test_a_wrong_table_is_refused_before_anything_is_written(src, rows, words):
    with pytest.raises(ValueError) as said: import_models(src, src.parent/"dst", table=pd.DataFrame(rows))
    assert words in str(said.value) and not (src.parent/"dst").exists()


def test_a_table_is_a_table_in_any_of_its_forms(tmp_path):
    rows = {"good.pt": dict(file="good.pt", task=3, class_0="a")}
    assert read_table(pd.DataFrame(rows.values())) == rows
    for name, between in {"x.csv": ",", "x.tsv": "\t"}.items():
        cells = ["file", "task", "class_0"], ["good.pt", "3", "a"]
        (tmp_path/name).write_text("".join(f"{between.join(row)}\n" for row in cells))
        assert read_table(tmp_path/name) == rows


# Names are shown as they are

def test_control_characters_do_not_leave_a_checkpoint(src):
    odd = "\x1b[2Jx\n"
    torch.save({f"{odd}weight": torch.ones(2), "step": 3}, src/"keys.pt")
    torch.save(tiny() | {f"{odd}.weight": torch.tensor([torch.nan])}, src/"names.pt")
    (src/"\x1b[31mred.pt").write_text("hello")
    with pytest.warns(UserWarning) as said: models = import_models(src, src.parent/"dst")
    texts = [str(said[0].message), *models.rejected.reason]
    assert len(models.rejected) == 3 and all(text.isprintable() for text in texts)
    assert r"\x1b[2Jx\n" in " ".join(texts)
    for name in ("names.pt", "\x1b[31mred.pt"):
        with pytest.raises(ValueError) as said: read_model(src/name)
        assert str(said.value).isprintable()


# Wrappers are taken off, or said

@pytest.mark.parametrize("keys", [["state_dict"], ["model_state_dict"], ["state_dict_ema"], ["model_ema"], ["model"],
                                  ["net"], ["network"], ["weights"], ["model", "state_dict"]])
def test_state_dicts_in_dicts_are_found(tmp_path, keys):
    obj = tiny()
    for key in reversed(keys): obj = {key: obj, "epoch": 3, "optimizer": dict(lr=.1)}
    torch.save(obj, tmp_path/"x.pt")
    state = read_model(tmp_path/"x.pt").state
    assert list(state) == list(tiny()) and all(tensor.equal(tiny()[name]) for name, tensor in state.items())


def test_a_dict_without_weights_is_said_with_its_keys(tmp_path):
    torch.save({f"key{i}": i for i in range(9)}, tmp_path/"x.pt")
    with pytest.raises(ValueError) as said: read_model(tmp_path/"x.pt")
    assert str(said.value).endswith("but a dict with key0, key1, key2, key3, key4, key5, …")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
def test_prefixes_of_wrappers_are_taken_off(prefix):
    assert list(own_names({prefix + name: tensor for name, tensor in tiny().items()})) == list(tiny())


def test_a_prefix_of_some_names_only_stays():
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert list(own_names(state)) == list(state)


def test_a_name_map_may_name_what_is_under_a_prefix():
    state = {f"module.{name}": tensor for name, tensor in tiny().items()}
    assert list(own_names(state, {"fc.weight": "head.weight"})) == ["conv1.weight", "head.weight"]


@pytest.mark.parametrize("names, words", [
    ([("^.*$", "x")], "two tensors are both named x after renaming"),
    ([("(", "x")], "the name map has a wrong pattern"),
    ([("a", r"\3")], "the name map has a wrong pattern"),
])
def test_a_name_map_that_cannot_work_is_refused(names, words):
    with pytest.raises(ValueError, match=words): rename({"a": 0, "ab": 1}, names)


def test_long_lists_of_layers_are_cut(tmp_path):
    for i in range(2): save_tensors(tmp_path/f"zoo/m{i}.safetensors", tiny(i), dict(task=i))
    models = load_modelset(tmp_path/"zoo")
    index = ModelIndex(fit_method(models, "lps", n_filters=2, epochs=1, milestones=()), models)
    torch.save({f"block{i}.weight": torch.ones(2, 3, 3, 3) for i in range(500)}, tmp_path/"deep.pt")
    with pytest.raises(ValueError) as said: index.query(tmp_path/"deep.pt")
    assert "(500 layers)" in str(said.value) and len(str(said.value)) < 600
    assert "names= in Python, --names on the command line" in str(said.value)


# The first bytes decide the format, not the name

@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pth.tar", "x"])
@pytest.mark.parametrize("write", [torch.save, safetensors.torch.save_file])
def test_the_content_decides_the_format(tmp_path, name, write):
    write(tiny(), tmp_path/name)
    state = read_model(tmp_path/name).state
    assert state.keys() == tiny().keys() and all(state[key].equal(tensor) for key, tensor in tiny().items())


@pytest.mark.parametrize("start, words", [
    (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer.*run git lfs pull"),
    (b"\x89HDF", "an HDF5 file"), (b"GGUF", "a GGUF file"), (b"\x93NUMPY", "a NumPy file"),
])
def test_other_formats_are_named_with_the_cure(tmp_path, start, words):
    (tmp_path/"x.pt").write_bytes(start + bytes(600))
    with pytest.raises(ValueError, match=f"x.pt: {words}"): read_model(tmp_path/"x.pt")


# Of several networks in a file, one is read

@pytest.mark.parametrize("keys, read", [
    (("state_dict", "state_dict_ema"), "state_dict_ema"),
    (("model", "ema"), "ema"),
    (("student", "teacher"), "teacher"),
])
def test_an_average_and_a_teacher_come_first(tmp_path, keys, read):
    torch.save({key: tiny(i) for i, key in enumerate(keys)} | dict(optimizer=dict(lr=.1)), tmp_path/"x.pt")
    found = inspect_model(tmp_path/"x.pt")
    other, = set(keys) - {read}
    assert found.model.digest == read_model(tiny(keys.index(read))).digest and list(found.networks) == [other]
    assert read_model(tmp_path/"x.pt", Reading(which=other)).digest == read_model(tiny(keys.index(other))).digest
    with pytest.raises(ValueError, match="no network called 'x'"): read_model(tmp_path/"x.pt", Reading(which="x"))


# Whatever there is, its numbers are kept

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_are_those_of_torch(tmp_path, dtype, zipped):
    state = {name: tensor.to(dtype).transpose(0, 1) for name, tensor in tiny().items()}
    torch.save(state, tmp_path/"x.pt", _use_new_zipfile_serialization=zipped)
    theirs = torch.load(tmp_path/"x.pt", weights_only=True)
    ours = read_checkpoint(tmp_path/"x.pt").state
    assert all(ours[name].dtype == dtype and ours[name].equal(tensor) for name, tensor in theirs.items())


def test_an_import_keeps_precision_and_notes_its_source(src):
    torch.save({name: tensor.half() for name, tensor in tiny().items()}, src/"good.pt")
    models, _ = taken_in(src, meta=dict(data="digits"))
    state, meta = load_tensors(src.parent/"dst/good.safetensors")
    assert state["conv1.weight"].dtype == torch.float16 and meta["source"] == "good.pt" and meta["data"] == "digits"
    assert len(models) == 1
