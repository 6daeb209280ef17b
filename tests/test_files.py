"""Files as they are on a disk: a bit that flips in any kind of them, headers that lie, fields of another type"""
import json
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lps.core.files import (MAX_TENSORS, checked, load_tensors, mark_complete, marker_file, not_as_marked, printable,
                       read_header, read_json, read_marker, read_safetensors, read_tensor_file, save_tensors,
                       write_json)
from lps.models.read import read_model
from lps.index.index import ModelIndex
from lps.methods.registry import fit_method, load_fitted, save_fitted
from lps.models.modelset import load_modelset, pack


def tiny(seed):
    "Two small layers"
    g = torch.Generator().manual_seed(seed)
    return {"conv1.weight": torch.randn(1, 1, 2, 2, generator=g), "fc.weight": torch.randn(1, 1, generator=g)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "One small file of each kind"
    root = tmp_path_factory.mktemp("written")
    for i in range(2): save_tensors(root/f"zoo/m{i}.safetensors", tiny(i), dict(task=i))
    models = load_modelset(root/"zoo")
    save_tensors(root/"model.safetensors", tiny(0), dict(task=0))
    pack(models, root/"packed.safetensors", ("conv1",))
    fitted = fit_method(models, "lps", n_filters=1, epochs=1, milestones=())
    save_fitted(root/"net.safetensors", fitted)
    torch.save(tiny(0), root/"archive.pt")
    return root


@pytest.mark.parametrize("name, step", [("model", 1), ("packed", 5), ("net", 5)])
def test_each_bit_of_a_file_that_flips_is_noticed(written, name, step):
    "All bits of the smallest file; every fifth of the others, which have the same reader and the same seal"
    whole = (written/f"{name}.safetensors").read_bytes()
    path, unnoticed = written/"flipped.safetensors", []
    for bit in range(0, 8*len(whole), step):
        data = bytearray(whole)
        data[bit//8] ^= 1 << bit % 8
        path.write_bytes(data)
        try: read_tensor_file(path)
        except ValueError: continue
        unnoticed.append(bit)
    assert not unnoticed


READERS = dict(model=load_tensors, packed=load_modelset, net=load_fitted)


@pytest.mark.parametrize("name", READERS)
def test_every_reader_compares_the_seal(written, name):
    data = bytearray((written/f"{name}.safetensors").read_bytes())
    data[-1] ^= 1
    (written/"flipped.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="flipped.safetensors is damaged: it does not hold what was written to it"):
        READERS[name](written/"flipped.safetensors")


def test_each_bit_of_an_archive_that_flips_is_noticed_or_changes_no_weight(written):
    "PyTorch's archives have a check sum of each entry; what has none there is of no account"
    whole, tensors = (written/"archive.pt").read_bytes(), tiny(0)
    path = written/"flipped.pt"
    for bit in range(0, 8*len(whole), 5):
        data = bytearray(whole)
        data[bit//8] ^= 1 << bit % 8
        path.write_bytes(data)
        try: state = read_model(path).state
        except ValueError: continue
        assert state.keys() == tensors.keys()
        assert all(tensor.equal(tensors[key]) for key, tensor in state.items()), bit


def test_each_bit_of_a_marker_that_flips_is_noticed_or_changes_no_model(written, tmp_path):
    save_tensors(tmp_path/"m.safetensors", tiny(0), dict(task=0))
    mark_complete(tmp_path/"m.safetensors")
    marker = marker_file(tmp_path/"m.safetensors")
    whole = marker.read_bytes()
    sha256 = read_marker(tmp_path/"m.safetensors")["sha256"]
    for bit in range(8*len(whole)):
        data = bytearray(whole)
        data[bit//8] ^= 1 << bit % 8
        marker.write_bytes(data)
        if not_as_marked(tmp_path/"m.safetensors") is None:
            assert read_marker(tmp_path/"m.safetensors")["sha256"] == sha256


def without_seal(data):
    "The bytes of a model's file as they were before there were seals"
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for key in ("seal", "sealed"): del header["__metadata__"][key]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def test_a_file_from_before_there_were_seals_still_opens(written, tmp_path):
    (tmp_path/"old.safetensors").write_bytes(without_seal((written/"model.safetensors").read_bytes()))
    state, meta = load_tensors(tmp_path/"old.safetensors")
    assert meta["task"] == 0 and all(state[key].equal(tensor) for key, tensor in tiny(0).items())


def broken(path, kind):
    "A safetensors file with one of the broken headers"
    return with_header(path, BROKEN_HEADERS[kind], b"" if "without values" in kind else bytes(8))


def with_header(path, text, body=b""):
    "A safetensors file with any header"
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(shape=(2,), dtype="F32", start=0, end=8):
    "The entry of one tensor"
    return dict(a=dict(dtype=dtype, shape=shape, data_offsets=[start, end]))


BROKEN_HEADERS = {
    "no JSON": b'{"a": ',
    "no text": b"{\xff}",
    "nested too deeply": b'{"a":' + b"["*100_000,
    "a tensor without fields": b'{"a": {}}',
    "a tensor that is a number": b'{"a": 3}',
    "metadata that is a list": b'{"__metadata__": [1]}',
    "metadata that is no text": b'{"__metadata__": {"task": 3}}',
    "an unknown type": json.dumps(entry(dtype="Q9")).encode(),
    "a shape that is a text": json.dumps(entry(shape="2")).encode(),
    "a negative size": json.dumps(entry(shape=[-2])).encode(),
    "a size beyond all files": json.dumps(entry(shape=[2**62], end=2**64)).encode(),
    "a tensor larger than its bytes": json.dumps(entry(shape=[3])).encode(),
    "bytes that are not there": json.dumps(entry(shape=[20], end=80)).encode(),
    "bytes that no tensor has": json.dumps(entry(shape=[1], end=4)).encode(),
    "two tensors in the same bytes": json.dumps(entry() | dict(b=entry()["a"])).encode(),
    "an end before its start": json.dumps(entry(start=8, end=0)).encode(),
    "axes beyond all numbers, without values": json.dumps(entry(shape=[16, 0, 2**62, 2**62], end=0)).encode(),
    "a float as offset": json.dumps(entry(start=.5)).encode(),
}


@pytest.mark.parametrize("kind", BROKEN_HEADERS)
def test_a_broken_header_is_a_value_error(tmp_path, kind):
    path = broken(tmp_path/"x.safetensors", kind)
    for read in (read_safetensors, load_tensors, load_modelset, load_fitted, ModelIndex.load, read_model):
        with pytest.raises(ValueError): read(path)


SIZES = ["a negative size", "a size beyond all files", "a tensor larger than its bytes", "bytes that are not there",
         "bytes that no tensor has", "an end before its start", "axes beyond all numbers, without values"]


@pytest.mark.parametrize("kind", SIZES)
def test_sizes_are_compared_with_the_file_before_a_tensor_is_read(tmp_path, kind):
    path = broken(tmp_path/"x.safetensors", kind)
    with pytest.raises(ValueError, match="truncated|not a safetensors file"): read_header(path)


def test_more_metadata_than_can_be_read_is_not_written(tmp_path):
    save_tensors(tmp_path/"old.safetensors", dict(weight=torch.ones(2)), {})
    before = (tmp_path/"old.safetensors").read_bytes()
    with pytest.raises(ValueError, match="8000000 can be read: shorten them"):
        save_tensors(tmp_path/"old.safetensors", dict(weight=torch.ones(2)), dict(note="x"*9_000_000))
    assert (tmp_path/"old.safetensors").read_bytes() == before


def test_an_unbroken_header_is_none_of_these(tmp_path):
    path = with_header(tmp_path/"x.safetensors", json.dumps(entry()).encode(), bytes(8))
    assert read_safetensors(path)[0]["a"].tolist() == [0, 0]


def test_a_header_of_too_many_tensors_is_refused(tmp_path):
    empty = dict(dtype="F32", shape=[0], data_offsets=[0, 0])
    header = {f"{i}": empty for i in range(MAX_TENSORS + 1)}
    with pytest.raises(ValueError, match="20001 tensors, 20000 are allowed"):
        read_header(with_header(tmp_path/"x.safetensors", json.dumps(header).encode()))


PLAIN = st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=4)
JSON = st.recursive(PLAIN, lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(max_size=4), of, max_size=3))


@given(value=JSON)
def test_any_header(tmp_path_factory, value):
    "What is taken names tensors that fill their bytes"
    path = with_header(tmp_path_factory.getbasetemp()/"any.safetensors", json.dumps(value).encode(), bytes(8))
    try: header = read_header(path)
    except ValueError: return
    assert not header.tensors or max(one.data_offsets[1] for one in header.tensors.values()) == 8


@given(field=st.sampled_from(["dtype", "shape", "data_offsets"]), value=JSON)
def test_any_entry_of_a_tensor(tmp_path_factory, field, value):
    header = entry()
    header["a"][field] = value
    path = with_header(tmp_path_factory.getbasetemp()/"entry.safetensors", json.dumps(header).encode(), bytes(8))
    try: tensors, _ = read_safetensors(path)
    except ValueError: return
    assert tensors["a"].numel()*tensors["a"].itemsize == 8


@dataclass
class Fields:
    "A field of each kind that files have"
    number: int
    text: str
    share: float
    numbers: list[int] | None = None


RIGHT = dict(number=1, text="a", share=.5, numbers=[1, 2])


@given(field=st.sampled_from(sorted(RIGHT)), value=JSON)
def test_a_field_is_what_its_schema_says_or_refused(field, value):
    try: found = checked(RIGHT | {field: value}, Fields, "x.json")
    except ValueError as e:
        assert str(e).startswith(f"x.json: field '{field}") and str(e) == printable(e)
        return
    assert type(found.number) is int and type(found.text) is str and type(found.share) is float
    assert found.numbers is None or all(type(number) is int for number in found.numbers)


@given(value=JSON)
def test_any_json_is_read_as_it_was_written(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp()/"any.json"
    try: write_json(path, value)
    except ValueError: return  # half of a surrogate pair
    assert repr(read_json(path)) == repr(json.loads(json.dumps(value)))
    if isinstance(value, dict): return
    with pytest.raises(ValueError, match="any.json holds"): read_json(path, Fields)


@given(text=st.text())
def test_what_is_shown_has_no_control_characters(text):
    shown = printable(text)
    assert shown.isprintable() and (shown == text or not text.isprintable())


@given(numbers=st.lists(st.floats(width=32), min_size=1, max_size=5), name=st.text(max_size=5))
def test_a_model_comes_back_as_it_was(tmp_path_factory, numbers, name):
    path, state = tmp_path_factory.getbasetemp()/"back.safetensors", {name: torch.tensor(numbers)}
    try: save_tensors(path, state, dict(task=0, note=name))
    except ValueError: return  # half of a surrogate pair
    except Exception as e:
        assert name == "__metadata__", e
        return
    again, meta = load_tensors(path)
    assert meta["note"] == name and list(again) == [name]
    pairs = zip(again[name].tolist(), numbers, strict=True)
    assert all(a == b or math.isnan(a) and math.isnan(b) for a, b in pairs)
