"""Files of strangers: names that lead elsewhere, keys that are slow to hash, claims, bombs, broken servers"""
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lps.core.files import check_name, digest, read_header, read_json, save_tensors, write_json
from lps.index.family import read_row
from lps.index.index import ModelIndex
from lps.index.share import from_pretrained, save_pretrained
from lps.models import pickles
from lps.models.checkpoint import read_checkpoint
from lps.models.names import rename
from lps.models.config import normalisation
from lps.models.table import read_table
from lps.models.modelset import load_modelset, pack
from lps.models.read import Reading, read_model
from lps.models.web import open_model
from lps.nets.named import network_builder
from lps.zoo.tasks import images_below, read_image


def tiny(seed=0):
    "Weights of a network of one convolution"
    g = torch.Generator().manual_seed(seed)
    return {"conv1.weight": torch.randn(2, 3, 3, 3, generator=g), "fc.weight": torch.randn(2, 2, generator=g)}


def zoo(folder, n=2):
    "A folder with models"
    for i in range(n): save_tensors(folder/f"m{i}.safetensors", tiny(i), dict(task=i))
    return load_modelset(folder)


# Names from a file are single parts of a path

ABSOLUTE = f"{tempfile.gettempdir()}/lps-out.safetensors"
NAMES = "../out.safetensors", ABSOLUTE, "a/b.safetensors", "..", r"..\x", "C:x.safetensors", "\0"


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


def test_files_that_take_all_memory_leave_it_to_the_next_one(tmp_path):
    write_pickle(tmp_path/"x.pt", MAPPINGS["EMPTY_SET"], is_zip=True)
    torch.save(tiny(), tmp_path/"good.pt")
    for _ in range(3):
        with pytest.raises(ValueError, match="too much memory|too long"): read_model(tmp_path/"x.pt")
        assert read_model(tmp_path/"good.pt").digest == digest(tiny())


def test_limits_are_lifted_after_a_refusal(tmp_path):
    "Else nothing is left for the next file"
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"): pytest.skip("the limits of another process are read on Linux")
    torch.save([1, 2], tmp_path/"x.pt")
    with pytest.raises(ValueError, match="no state dict"): read_model(tmp_path/"x.pt")
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU):
        soft, hard = resource.prlimit(pickles._processes[0].running.pid, kind)
        assert soft == hard


def test_many_values_beside_the_weights_are_passed_over(tmp_path):
    vocabulary = {f"word{i}": i for i in range(150_000)}
    torch.save(dict(state_dict=tiny(), vocabulary=vocabulary, samples=list(vocabulary)), tmp_path/"x.pt")
    assert read_model(tmp_path/"x.pt").digest == digest(tiny())


def test_a_reader_that_ends_is_replaced(tmp_path):
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


# Images

def bomb(path, side=13_000, mode="RGB"):
    "A small file of many pixels"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (side, side)).save(path)


def test_an_image_of_too_many_pixels_is_left_out(tmp_path):
    bomb(tmp_path/"x.png", 4001, "L")
    bomb(tmp_path/"deep.tif", 2001, "F")
    for file in tmp_path.iterdir():
        pixels, why = read_image(file, 8)
        assert pixels is None and "are read: make it smaller" in why


def test_many_small_files_of_many_pixels_are_left_out(tmp_path):
    for i in range(8): bomb(tmp_path/f"{i}.png", 2000, "L")
    with pytest.warns(UserWarning, match="more than 100 times the bytes of their files"):
        assert 1 <= len(images_below(tmp_path)) < 8


def test_a_file_that_another_program_would_draw_is_left_out(tmp_path):
    "PIL starts Ghostscript for PostScript, whatever the name of the file"
    Image.new("RGB", (4, 4)).save(tmp_path/"x.eps")
    (tmp_path/"x.eps").rename(tmp_path/"x.png")
    assert read_image(tmp_path/"x.png")[0] is None and "cannot identify" in read_image(tmp_path/"x.png")[1]


# Tables and name maps

def test_a_table_with_a_byte_order_mark_and_a_class_called_na(tmp_path):
    (tmp_path/"x.csv").write_bytes("\ufefffile,task,class_0,class_1\na.pt,3,NA,null\n".encode())
    assert read_table(tmp_path/"x.csv") == {"a.pt": dict(file="a.pt", task=3, class_0="NA", class_1="null")}


@pytest.mark.parametrize("cell", ["1_2", "１２", "0x10", "nan"])
def test_a_run_is_a_plain_number(tmp_path, cell):
    (tmp_path/"x.csv").write_text(f"file,run\na.pt,{cell}\n")
    with pytest.raises(ValueError, match="row 1 of the table: run is"): read_table(tmp_path/"x.csv")


def test_a_slow_pattern_is_refused():
    names = [("(a|a)*$", "x")]
    with pytest.raises(ValueError, match="takes too long, at aaaa"): rename({"a"*60 + "b": 0}, names)


def test_names_that_are_each_a_bit_slow_are_refused_together(monkeypatch):
    monkeypatch.setattr("lps.models.names.SECONDS", .5)
    state = {"a"*16 + f"b{i}": 0 for i in range(20_000)}
    with pytest.raises(ValueError, match="takes too long, at aaaa"): rename(state, [("(a|a)*$", "x")])


# What a user gives is used or refused

@pytest.mark.parametrize("given, words", [
    (dict(size=2048), "size is 2048: give a side from 1 to 1024"),
    (dict(size=0), "size is 0"),
    (dict(stats=([123.7]*3, [58.4]*3)), "divided by 255"),
    (dict(stats=([.5]*3, [0]*3)), "deviations must be above 0"),
    (dict(stats=([.5]*3, [float("nan")]*3)), "deviations must be above 0"),
    (dict(stats=([.5]*3, [.2]*2)), "as many means as deviations"),
    (dict(stats=([.5]*4, [.2]*4)), "stats are those of 4 channels, the network reads 3"),
])
def test_a_wrong_size_or_normalisation_is_refused(given, words):
    with pytest.raises(ValueError, match=words): read_model(tiny(), Reading(**given))


def test_normalisation_for_bytes_in_a_configuration_is_converted():
    stats = normalisation([("config.json", dict(mean=[127.5]*3, std=[51]*3))])
    assert stats == ([.5]*3, [.2]*3, "config.json")


# Nothing that is read changes what is read next

class Net(torch.nn.Module):
    "A network without an entry in the registry"
    def __init__(self):
        super().__init__()
        self.stem, self.answer = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2)

    def forward(self, x): return self.answer(self.stem(x).relu().mean((2, 3)))


class Wrapper(torch.nn.Module):
    "Normalises images, and holds a network as `module`"
    def __init__(self, net):
        super().__init__()
        self.module = net
        self.register_buffer("mean", torch.full((1, 3, 1, 1), .5))

    def forward(self, x): return self.module(x - self.mean)


def outputs(model): return model.outputs(torch.linspace(-1, 1, 3*8*8).view(1, 3, 8, 8))


def test_a_second_instance_of_a_class_leaves_the_first_alone():
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(Net().eval())
    first = read_model(nets[0])
    before, digest_before = outputs(first), first.digest
    second = read_model(nets[1])
    assert torch.equal(outputs(first), before) and first.digest == digest_before
    with torch.no_grad(): nets[0].stem.weight.zero_()
    assert torch.equal(outputs(first), before) and not torch.equal(outputs(second), before)


def test_a_wrapper_keeps_its_normalisation_and_changes_no_registry(tmp_path):
    torch.manual_seed(0)
    net = Net().eval()
    torch.save(net.state_dict(), tmp_path/"x.pt")
    before = read_model(tmp_path/"x.pt").digest
    x = torch.linspace(-1, 1, 3*32*32).view(1, 3, 32, 32)
    wrapped = read_model(Wrapper(net).eval())
    with torch.no_grad(): assert torch.allclose(wrapped.outputs(x), net(x - .5), atol=1e-6)
    assert read_model(tmp_path/"x.pt").digest == before


# Folders that cannot be written

def test_kernels_are_compiled_where_no_cache_can_be_written(tmp_path):
    "As in a container whose package and home belong to another user"
    code = "import torch, lps.zoo.batchnorm; from lps.align import align_layer; "
    code += "print(align_layer(torch.ones(2, 3, 3, 3), torch.ones(2, 3, 3, 3)).shape)"
    env = os.environ | dict(NUMBA_CACHE_LOCATOR_CLASSES="_UserProvidedCacheLocator")
    env.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "torch.Size([2, 2])" in done.stdout, done.stderr


# Any of these, at random: run by scripts/fuzz.py

PIECES = [nested(2), nested(20)]
PIECES += [b"}", b"](", b"(", b"e", b"s", b"u", b"d", b"\x8f", b"\x90", b"\x91", b"K\x01", b"0", b"2", b"."]


@given(operations=st.lists(st.sampled_from(PIECES), max_size=12), is_zip=st.booleans())
def test_any_nested_keys(tmp_path_factory, operations, is_zip):
    path = tmp_path_factory.getbasetemp()/"nested.pt"
    write_pickle(path, b"".join(operations) + b".", is_zip)
    with pytest.raises(ValueError, match="nested.pt: "): read_model(path)


@given(name=st.text(max_size=8) | st.sampled_from(NAMES) | st.text(alphabet="./\\:a\0", max_size=6))
def test_any_name_is_a_single_part_or_refused(name):
    try: found = check_name(name, "x.json")
    except ValueError: return
    root = Path("/root/of/all").resolve()
    assert found == name and (root/found).parent == root and Path(os.path.normpath(root/found)).parent == root


# A name in a file builds a network, and loads nothing

@pytest.mark.parametrize("arguments", ["pretrained=True", "checkpoint_path='x.pth'", "weights='DEFAULT'"])
def test_a_name_loads_no_weights(tmp_path, monkeypatch, arguments):
    def refuse(*args, **kwargs): raise AssertionError("a request to the network")
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    for name in (f"timm/resnet18({arguments})", f"torchvision/resnet18({arguments})"):
        with pytest.raises(ValueError, match="must not name weights to load"): network_builder(name)
        state = {f"x{key}": tensor for key, tensor in tiny().items()}
        torch.save(dict(state_dict=state, arch=name.partition("/")[2]), tmp_path/"m.pt")
        assert read_model(tmp_path/"m.pt").architecture is None


def test_an_index_names_no_code_that_is_run(tmp_path, monkeypatch):
    for i in range(4): save_tensors(tmp_path/f"zoo/m{i}.safetensors", tiny(i), dict(task=i % 2))
    index = ModelIndex.build(tmp_path/"zoo", None, "frobenius")
    fact, = index.rows.facts([0])
    fact["given"] = dict(arch="lps_canary:f")
    monkeypatch.setattr(index.rows, "facts", lambda places: [fact for _ in places])
    real = importlib.import_module
    def refusing(name, *package):
        if "canary" in name: pytest.fail(f"{name} was imported")
        return real(name, *package)
    monkeypatch.setattr("importlib.import_module", refusing)
    assert read_row(index, 0, None).digest == index.rows.digests([0])[0]
    index.add(tmp_path/"zoo", table=pd.DataFrame([dict(file="*", task=3)]))
    assert not len(index.rejected)
