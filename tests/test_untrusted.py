"""Files of strangers: names that lead elsewhere, keys that are slow to hash, claims, bombs, broken servers"""
import pickle
import zipfile

import pytest
import torch

from lps.core.files import digest, read_header, read_json, save_tensors, write_json
from lps.index.share import from_pretrained, save_pretrained
from lps.models.checkpoint import read_checkpoint
from lps.models.modelset import load_modelset, pack
from lps.models.read import read_model
from lps.models.web import open_model


def tiny(seed=0):
    "Weights of a network of one convolution"
    g = torch.Generator().manual_seed(seed)
    return {"conv1.weight": torch.randn(2, 3, 3, 3, generator=g), "fc.weight": torch.randn(2, 2, generator=g)}


def zoo(folder, n=2):
    "A folder with models"
    for i in range(n): save_tensors(folder/f"m{i}.safetensors", tiny(i), dict(task=i))
    return load_modelset(folder)


# Names from a file are single parts of a path

NAMES = "../out.safetensors", "/tmp/lps-out.safetensors", "a/b.safetensors", "..", r"..\x", "C:x.safetensors", "\0"


def packed_with(folder, name):
    "A packed set that names one of its models so"
    models = zoo(folder/"zoo")
    path = pack(models, folder/"packed.safetensors").path
    state, meta = {"conv1.weight": models.stack("conv1")}, {}
    claims = dict(sha256="0"*64, digest="0"*32)
    metas = [dict(file=file, task=i) | claims for i, file in enumerate([name, "b"])]
    save_tensors(path, state, meta | dict(packed=dict(common={}, models=metas, stem="conv1")))
    return path


def sharded(folder, name):
    "A model folder whose index names a shard so"
    save_tensors(folder/"good.safetensors", tiny(), {})
    write_json(folder/"model.safetensors.index.json", dict(weight_map={"conv1.weight": name, "fc.weight": name}))
    return folder


def shared_with(folder, name):
    "A shared model set that names one of its models so"
    save_pretrained(pack(zoo(folder/"zoo"), folder/"x.safetensors"), folder/"shared")
    packed_with(folder/"other", name).replace(folder/"shared/models.safetensors")
    return folder/"shared"


PLACES = {
    "packed set": (packed_with, load_modelset),
    "packed set, query": (packed_with, lambda path: load_modelset(path)[0]),
    "shared set": (shared_with, from_pretrained),
    "shards": (sharded, read_model),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", PLACES)
def test_a_name_that_leads_elsewhere_is_refused_when_it_is_read(tmp_path, place, name):
    make, read = PLACES[place]
    source = make(tmp_path/"in", name)
    with pytest.raises(ValueError, match="no file beside it"): read(source)


def test_a_shared_set_is_written_below_its_folder(tmp_path):
    "What was read has names without a folder: it is written where the user says, and nowhere else"
    models = zoo(tmp_path/"zoo")
    save_pretrained(models, tmp_path/"shared")
    save_pretrained(from_pretrained(tmp_path/"shared"), tmp_path/"again")
    assert {path.name for path in tmp_path.iterdir()} == {"zoo", "shared", "again"}
    assert sorted(path.name for path in (tmp_path/"again/models").iterdir()) == ["m0.safetensors", "m1.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_shards_on_the_web_are_single(monkeypatch, name):
    listed = dict(weight_map={"conv1.weight": name})
    monkeypatch.setattr("lps.models.web.remote_json", lambda url: listed if url.endswith("index.json") else None)
    def missing(url, download): raise FileNotFoundError(url)
    monkeypatch.setattr("lps.models.web.open_remote", missing)
    with pytest.raises(ValueError, match="no file beside it"): open_model("org/name")


# A pickle takes limited time and memory, in another process

def nested(depth=60):
    "Operations that put a tuple on the stack, which holds another one twice, and so on: its hash takes 2**60 steps"
    return b"K\x01\x85q\x00" + b"h\x00h\x00\x86q\x00"*depth


MAPPINGS = {
    "DICT": b"(" + nested() + b"K\x02d.",
    "SETITEM": b"}" + nested() + b"K\x02s.",
    "SETITEMS": b"}(" + nested() + b"K\x02u.",
    "ADDITEMS": b"\x8f(" + nested() + b"\x90.",
    "FROZENSET": b"(" + nested() + b"\x91.",
    "set": b"cbuiltins\nset\n(](" + nested() + b"etR.",
    "Counter": b"ccollections\nCounter\n(](" + nested() + b"etR.",
    "OrderedDict": b"ccollections\nOrderedDict\n(]((" + nested() + b"K\x02tetR.",
    "stub": b"ca\nb\n)\x81(" + nested() + b"K\x02u.",
    "EMPTY_SET": b"](" + b"\x8f"*4_000_000 + b"e.",
    "EMPTY_DICT": b"](" + b"}"*4_000_000 + b"e.",
    "MARK": b"("*4_000_000 + b".",
    "long string": b"X\xff\xff\xff\x7f",
    "bytearray": b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.",
    "long memo": b"Nr\xff\xff\xff\x7f.",
}


def write_pickle(path, operations, is_zip):
    "A file of PyTorch with a pickle in it"
    pickled = b"\x80\x02" + operations
    start = b"".join(pickle.dumps(value, 2) for value in (0x1950a86a20f9469cfc6c, 1001, {}))
    if not is_zip: return path.write_bytes(start + pickled)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/version", "3")
        archive.writestr("x/data.pkl", pickled)


@pytest.mark.parametrize("kind, is_zip", [*((kind, True) for kind in MAPPINGS), ("DICT", False), ("SETITEMS", False)])
def test_a_pickle_that_takes_too_much_is_refused(tmp_path, kind, is_zip):
    write_pickle(tmp_path/"x.pt", MAPPINGS[kind], is_zip)
    with pytest.raises(ValueError, match="x.pt: "): read_model(tmp_path/"x.pt")
    torch.save(tiny(), tmp_path/"good.pt")
    assert read_model(tmp_path/"good.pt").digest == digest(tiny())  # the next file is read


def test_an_archive_with_two_pickles_is_refused(tmp_path):
    torch.save(tiny(), tmp_path/"x.pt")
    with zipfile.ZipFile(tmp_path/"x.pt", "a") as archive: archive.writestr("y/data.pkl", b"\x80\x02}.")
    with pytest.raises(ValueError, match="two entries of one name, or two data.pkl"): read_model(tmp_path/"x.pt")


def test_a_reader_that_ends_is_replaced(tmp_path):
    from lps.models import pickles
    torch.save(tiny(), tmp_path/"good.pt")
    for _ in range(2):
        assert read_checkpoint(tmp_path/"good.pt").state.keys() == tiny().keys()
        pickles._processes[0].running.kill()
        pickles._processes[0].running.wait()


# Claims decide nothing

def test_a_claimed_digest_is_not_believed(tmp_path):
    save_tensors(tmp_path/"a.safetensors", tiny(0), dict(task=0))
    save_tensors(tmp_path/"b.safetensors", tiny(1), dict(task=1, lacks=["layer1"], digest=digest(tiny(0))))
    models = load_modelset(tmp_path)
    assert models.digests == [digest(tiny(i)) for i in range(2)] == [model.digest for model in models]
    assert read_model(tmp_path/"b.safetensors").digest == digest(tiny(1))
    packed = load_modelset(packed_with(tmp_path/"in", "a"))
    assert packed.digests == [digest(packed[i].state) for i in range(2)] != ["0"*32]*2


# Headers and JSON

@pytest.mark.parametrize("text", [
    b'{"a":[' + b"[],"*7_000_000 + b"[]]}",
    b'{"a":[' + b"[],"*2_000_000 + b"[]]}",
    b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b"[],"*2_000_000 + b"0]}}",
    b'{"__metadata__":{"a":' + b"[]}}",
])
def test_a_header_that_takes_too_much_is_refused(tmp_path, text):
    "Its memory and time are measured in test_bounds.py"
    (tmp_path/"x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="too large|the entry of a|no texts"): read_header(tmp_path/"x.safetensors")


def test_a_large_json_file_is_refused(tmp_path):
    (tmp_path/"x.json").write_bytes(b"[" + b"[],"*3_000_000 + b"[]]")
    with pytest.raises(ValueError, match="x.json has more than 8000000 bytes"): read_json(tmp_path/"x.json")
