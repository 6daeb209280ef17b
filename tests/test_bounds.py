"""What a hostile file can cost: its reader has twice the file and 300 MB more than a normal query, and 5 seconds of the
CPU; a pipe is not waited for"""
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch._utils import _rebuild_tensor_v2

from lps.core.files import save_tensors
from lps.methods.registry import fit_method
from lps.models.modelset import load_modelset
from lps.nets.resnet import ResNet

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limits are those of Linux")


def network(seed=0):
    "Weights of a small network of a known architecture"
    torch.manual_seed(seed)
    return ResNet(depth=8, width=4).state_dict()


class Claimed:
    "Pickled, it is a tensor of any shape in a storage of n floats"
    def __init__(self, n, size, stride): self.n, self.size, self.stride = n, size, stride
    def __reduce__(self): return _rebuild_tensor_v2, (Storage(self.n), 0, self.size, self.stride, False, None)


class Storage:
    "Stands for the numbers of a tensor"
    def __init__(self, n): self.n = n


class StatePickler(pickle.Pickler):
    "Writes storages as torch.save does"
    def persistent_id(self, o):
        return ("storage", torch.FloatStorage, "0", "cpu", o.n) if isinstance(o, Storage) else None


def archive(path, state, numbers):
    "A PyTorch archive with any tensors in it"
    pickled = io.BytesIO()
    StatePickler(pickled, 2).dump(state)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/version", "3")
        file.writestr("x/data.pkl", pickled.getvalue())
        file.writestr("x/data/0", numbers)


def inflating(n):
    "A deflated stream of n megabytes of zeros"
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeezer.compress(bytes(10**6)) + squeezer.flush(zlib.Z_FULL_FLUSH)
    return block*n + squeezer.flush()


def deflated(path):
    "An archive that is small and inflates to 4.2 GB"
    n, pickled = 4200, io.BytesIO()
    state = {"conv1.weight": Claimed(n*250_000, (n*250_000,), (1,))}
    StatePickler(pickled, 2).dump(state)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/version", "3")
        file.writestr("x/data.pkl", pickled.getvalue())
        file.writestr("x/data/0", inflating(n))
        file.filelist[-1].compress_type, file.filelist[-1].file_size = zipfile.ZIP_DEFLATED, n*10**6


def header(path, said, length=None, body=b""):
    "A safetensors file with any header"
    text = json.dumps(said).encode()
    path.write_bytes((length or len(text)).to_bytes(8, "little") + text + body)


def tensor(shape, start, end): return dict(dtype="F32", shape=shape, data_offsets=[start, end])


def made_up_layers(path, n=3000):
    "Layers as a network has them, far too many"
    torch.save({f"layer{1 + i//1000}.{i % 1000}.conv1.weight": torch.zeros(1) for i in range(n)}, path)


def wide_layers(path):
    "Layers that claim a network of thousands of channels; each is small"
    state = {name: torch.zeros([*shape.shape[:1], *(0 for _ in shape.shape[1:])]) for name, shape in network().items()}
    state["conv1.weight"] = torch.zeros(20_000, 3, 1, 1)
    torch.save(state, path)


def empty_layers(path):
    "Layers without a number whose shapes are those of a network of 20,000 channels"
    with torch.device("meta"): shapes = ResNet(depth=8, width=20_000).state_dict()
    state = {name: Claimed(0, (0, *tensor.shape[1:]), (0,)*max(1, tensor.ndim)) for name, tensor in shapes.items()}
    archive(path, state, b"")


def one_layer_repeated(path):
    "The layers of a network of 20,000 channels, each of them one number over and over"
    with torch.device("meta"): shapes = ResNet(depth=8, width=20_000).state_dict()
    state = {name: Claimed(1, tuple(tensor.shape), (0,)*tensor.ndim) for name, tensor in shapes.items()}
    archive(path, state, bytes(4))


def write_queries(folder):
    "Checkpoints that ask"
    torch.save(network(), folder/"query normal.pt")
    made_up_layers(folder/"query made-up layers.pt")
    one = Claimed(1, (1, 1), (1, 1))
    archive(folder/"query many layers.pt", {f"layer{i}.weight": one for i in range(20_000)}, bytes(4))
    tiny = {f"layer{i}.weight": tensor([1, 1], 4*i, 4*i + 4) for i in range(20_000)}
    header(folder/"query many tensors.safetensors", tiny, body=bytes(80_000))
    header(folder/"query too many tensors.safetensors", {f"{i}": tensor([0], 0, 0) for i in range(100_000)})
    header(folder/"query long header.safetensors", {f"{i}": tensor([0], 0, 0) for i in range(200_000)})
    torch.save(network() | {"conv1.weight": torch.zeros(1).expand(2**31, 1, 1, 1)}, folder/"query stride 0.pt")
    rows = {"conv1.weight": Claimed(275_000, (8000, 275_000), (0, 1))}
    archive(folder/"query stride 0, large.pt", rows, bytes(1_100_000))
    deflated(folder/"query deflated.pt")
    wide_layers(folder/"query wide.pt")
    empty_layers(folder/"query empty.pt")
    one_layer_repeated(folder/"query repeated.pt")
    archive(folder/"query claims.pt", {"conv1.weight": Claimed(2**40, (2**40,), (1,))}, bytes(64))
    header(folder/"query header.safetensors", {"conv1.weight": tensor([2**31], 0, 2**33)}, body=bytes(64))
    header(folder/"query length.safetensors", {}, length=99_999_999)
    header(folder/"query end.safetensors", {"a": tensor([2**62], 0, 2**64)}, body=bytes(64))
    same = {f"a{i}": tensor([250_000], 0, 10**6) for i in range(3000)}
    header(folder/"query same bytes.safetensors", same, body=bytes(10**6))


class Module:
    "Pickled, it is a module with parts"
    def __init__(self, parts, tensors=()):
        self._parameters, self._buffers, self._modules = dict(tensors), {}, parts


def many_parts(path):
    "A module whose two parts are one, whose two parts are one, and so on: 2**40 in all"
    part = Module({}, {"weight": torch.zeros(2, 2)})
    for _ in range(40): part = Module({"a": part, "b": part})
    torch.save(part, path)


def many_objects(path, n=600_000):
    "Made of nothing, as often as the bytes of a description allow"
    empty = pickle.PROTO + b"\x02" + pickle.EMPTY_LIST + pickle.MARK + b"ca\nb\nq\x00"
    again = pickle.BINGET + b"\x00" + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/version", "3")
        file.writestr("x/data.pkl", empty + again*n + pickle.APPENDS + pickle.STOP)


def long_names(path):
    "Modules in modules whose names are long"
    part = Module({}, {"weight": torch.zeros(2, 2)})
    for _ in range(60): part = Module({"n"*900: part})
    torch.save(part, path)


def write_sources(folder):
    "Models that are taken in"
    torch.save(network(), folder/"take normal.pt")
    many_parts(folder/"take many parts.pt")
    many_objects(folder/"take many objects.pt")
    long_names(folder/"take long names.pt")
    deflated(folder/"take deflated.pt")
    (folder/"take index").mkdir()
    (folder/"take index/config.json").write_text("[" * 100_000)
    torch.save(network(), folder/"take index/pytorch_model.bin")


def write_own(folder):
    "Files that this project writes, with other claims in them"
    models = load_modelset(folder/"zoo")
    fitted = fit_method(models, "lps", n_filters=4, epochs=1, milestones=())
    config = fitted.parts["config"]
    many, too_many = ({f"layer{i}": [1, 1, 1, 1] for i in range(n)} for n in (5000, 50_000))
    claims = dict(
        filters=dict(n_filters=10**9),
        tasks=dict(tasks=list(range(10**6))),
        shape=dict(shapes={"conv1": [10**5]*4}),
        branches=dict(shapes=many, alpha=[0.]*len(many)),
        values=dict(shapes=too_many, alpha=[0.]*len(too_many)),
    )
    for name, claim in claims.items():
        part = dict(method="lps", config=config | claim)
        save_tensors(folder/f"net {name}.safetensors", fitted.state_dict(), dict(fitted=part))


def write_images(folder, mode, side):
    "Small files of large images: two classes, two splits"
    for split in ("train", "val"):
        for name in "ab":
            path = folder/split/name/"0.png"
            path.parent.mkdir(parents=True)
            Image.new(mode, (side, side)).save(path)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    "What came of each file, and of calls that take too much"
    folder = tmp_path_factory.mktemp("bounds")
    for i in range(2): save_tensors(folder/f"zoo/m{i}.safetensors", network(i), dict(task=i))
    write_queries(folder)
    write_own(folder)
    write_sources(folder)
    write_images(folder/"images vast", "1", 13_000)
    write_images(folder/"images large", "RGB", 4000)
    (folder/"import pipe").mkdir()
    os.mkfifo(folder/"import pipe/pipe.pt")
    os.mkfifo(folder/"import pipe/pipe.safetensors")
    torch.save(network(), folder/"import pipe/good.pt")
    command = [sys.executable, Path(__file__).with_name("bounded.py"), folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_limits_bite(said):
    assert said["greedy"] == "MemoryError: " and said["modest"] == "100000000"
    assert said["endless"] == "killed by SIGXCPU"


def test_a_normal_query_is_answered_within_them(said): assert "m1.safetensors" in said["query normal"]


REFUSED = {
    "query made-up layers": "no layer 'conv1'",
    "query stride 0": "tensors that repeat their numbers are not read",
    "query stride 0, large": "tensors that repeat their numbers are not read",
    "query many layers": "no layer 'conv1' in these models",
    "query many tensors": "no layer 'conv1' in these models",
    "query too many tensors": "too large: 100000 tensors",
    "query long header": "too large: its header has",
    "query deflated": "a compressed archive",
    "query wide": "",
    "query empty": "",
    "query repeated": "tensors that repeat their numbers are not read",
    "query claims": "damaged: a tensor extends past the end of its storage",
    "query header": "truncated",
    "query length": "truncated",
    "query end": "not a safetensors file: a is F32",
    "query same bytes": "not a safetensors file",
    "net filters": "",
    "net tasks": "",
    "net shape": "",
    "net branches": "5000 layers get a branch: give 1 to 1000 layers",
    "net values": "has more than 100000 values",
    "take many parts": "its modules have no end",
    "take many objects": "refused and not executed",
    "take long names": "its modules have no end",
    "take deflated": "a compressed archive",
    "take index": "config.json is not JSON",
    "images vast": "13000 × 13000 pixels, 16000000 are read: make it smaller",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_file_is_refused_within_them(said, name):
    assert said[name].startswith(("ValueError: ", "FileNotFoundError: ")) and REFUSED[name] in said[name]


def test_a_normal_model_is_taken_in_within_them(said): assert said["take normal"].startswith("resnet, depth 8")


def test_large_images_are_read_within_them(said): assert said["images large"].startswith("ImageSet")


def test_a_pipe_in_a_folder_is_listed(said):
    assert said["import pipe"].count("no regular file") == 2


def test_every_file_was_read(said):
    others = {"query normal", "take normal", "images large", "import pipe", "greedy", "modest", "endless"}
    assert said.keys() == REFUSED.keys() | others
