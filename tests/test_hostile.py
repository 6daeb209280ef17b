"""Files of all kinds, spoiled at random: refused with `ValueError` or `OSError`, or taken and then usable

No process, socket or code is started. `LPS_EXAMPLES` is the number of inputs a property; scripts/fuzz.py tries many."""
import io
import json
import pickle
import socket
import sys
import tempfile
import threading
import warnings
import zipfile
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torch._utils import _rebuild_tensor_v2

from lps.zoo.datasheet import datasheet, datasheet_text
from lps.core.files import mark_complete, not_as_marked, provenance, read_header, read_json, read_marker, save_tensors
from lps.models.names import rename
from lps.models.imports import import_models, read_table
from lps.methods.registry import embed_models, fit_method, load_fitted, save_fitted, score_models
from lps.models.model import Model
from lps.models.modelset import load_modelset, pack, task_names
from lps.models.pickles import _Process
from lps.models.read import read_model
from lps.nets.resnet import ResNet
from lps.cli import index_facts, print_json, show_answer
from lps.lineage.sketch import weight_sketch
from lps.index.index import ModelIndex
from lps.index.map import MapSettings, page_data
from lps.index.share import save_pretrained
from lps.index.store import Rows, Store, create_store
from lps.zoo.tasks import load_images

PROCESSES = "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn"
FORBIDDEN = *PROCESSES, "socket.", "pickle.find_class", "ctypes.dlopen"
CANARY = "lps_canary"  # code that a file brings along names it


class Watch:
    "Events that no file may cause, while it is read"
    armed, seen = False, []

    @classmethod
    def hook(cls, event, args):
        if not cls.armed: return
        code = event in ("compile", "exec", "import") and CANARY in repr(args)
        if code or event.startswith(FORBIDDEN) and not is_ours(): cls.seen.append(event)


def is_ours():
    """Is a kernel of ours compiled or read from numba's cache, a process started that reads pickles, or torchvision
    imported, which loads its own library? timm imports it when a network is first built by name"""
    frame = sys._getframe()
    while frame is not None:
        if "/numba/" in frame.f_code.co_filename or frame.f_code is _Process.__init__.__code__: return True
        if frame.f_code.co_filename.endswith("torchvision/extension.py"): return True
        frame = frame.f_back
    return False


sys.addaudithook(Watch.hook)


def attempt(read, *args):
    "What a reader makes of a hostile file: it may be taken or refused (None), nothing else"
    Watch.seen, Watch.armed = [], True
    try:
        with warnings.catch_warnings(), suppress(ValueError, OSError):
            warnings.simplefilter("ignore")
            return read(*args)
    finally:
        Watch.armed = False
        assert not Watch.seen, Watch.seen


def tiny(seed):
    "Weights of a network of one convolution"
    g = torch.Generator().manual_seed(seed)
    shapes = {"conv1.weight": (2, 3, 3, 3), "fc.weight": (2, 2)}
    shapes |= {f"bn1.{name}": (2,) for name in ("weight", "bias", "running_mean", "running_var")}
    return {name: torch.rand(shape, generator=g) + .1 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def root():
    "A folder in memory, where the system has one"
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder: yield Path(folder)


def write_zoo(folder):
    "Three models of two tasks, with all that can be known of them"
    known = dict(classes=["a", "b"], val_accuracy=.9, train_accuracy=1., recipe=dict(name="short", epochs=2), epoch=1,
                 data="digits", precision="float32", seconds=3., shortcut="pad_end", build_seed=0, lacks=["layer1"],
                 mean=[.5]*3, std=[.2]*3)
    for i in range(3):
        save_tensors(folder/f"m{i}.safetensors", tiny(i), dict(task=i % 2, run=i//2, seed=i) | known)
        mark_complete(folder/f"m{i}.safetensors", seconds=3)


@pytest.fixture(scope="module")
def place(root):
    "A gallery, all that is made of it, and checkpoints from elsewhere: valid files, by kind"
    write_zoo(root/"zoo")
    models = load_modelset(root/"zoo")
    pack(models, root/"packed.safetensors", datasheet=datasheet(models))
    Asked.fitted = fit_method(models, "lps", n_filters=2, epochs=1, milestones=())
    save_fitted(root/"net.safetensors", Asked.fitted)
    Asked.index = ModelIndex(Asked.fitted, models)
    Asked.index.save(root/"index.zip")
    torch.save(dict(state_dict=tiny(0), epoch=3), root/"new.pt")
    torch.save(tiny(0), root/"old.pth", _use_new_zipfile_serialization=False)
    torch.save(ResNet(depth=8, width=1).state_dict(), root/"deep.ckpt")
    torch.save({name: torch.nn.Parameter(weight) for name, weight in tiny(0).items()}, root/"parameters.bin")
    save_tensors(root/"foreign.safetensors", tiny(3), {})
    known = provenance()  # asks git for the commit, which is a process that no file started
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lps.zoo.datasheet.provenance", lambda: known)
        yield root


class Asked:
    "A valid method and index, and the model that asks"
    fitted, index, query = None, None, Model(tiny(5), {})


def shown(models):
    "A model set is used: all that is shown of it"
    repr(models), repr(models[0]), models.manifest.to_string(), task_names(models), models.layers, models.stem
    models.labels, models.hashes, models.digests
    embed_models(Asked.fitted, models)
    datasheet_text(datasheet(models))


def use_set(path):
    "A packed set"
    models = load_modelset(path)
    shown(models)
    with suppress(ValueError): models[0].net


def use_in_gallery(path):
    "A model among others: the others must be readable whatever it is"
    models = load_modelset(path.parent)
    assert len(models) >= 2
    shown(models)


def use_net(path):
    "A fitted method"
    fitted = load_fitted(path)
    repr(fitted)
    embed_models(fitted, Asked.query), score_models(fitted, Asked.query)


def use_index(path):
    "An index"
    index = ModelIndex.load(path)
    repr(index)
    index.query(Asked.query, 2).to_string(), index.tasks(Asked.query).to_string(), index.answer(Asked.query).to_dict()


def use_foreign(path):
    "A checkpoint from elsewhere"
    model = read_model(path)
    repr(model)
    Asked.index.query(model, 2)


READERS = {
    "zoo/m2.safetensors": use_in_gallery,
    "packed.safetensors": use_set,
    "net.safetensors": use_net,
    "index.zip": use_index,
    "foreign.safetensors": use_foreign,
    "new.pt": use_foreign,
    "old.pth": use_foreign,
    "deep.ckpt": use_foreign,
    "parameters.bin": use_foreign,
}
SEALED = [name for name in READERS if name.endswith("safetensors")]


def with_bytes(place, name, data):
    "What is made of a file with other contents; the old ones are put back"
    path = place/name
    whole, marker = path.read_bytes(), path.parent/"complete"/f"{path.stem}.json"
    mark = marker.read_bytes() if marker.exists() else None
    path.write_bytes(data)
    if mark: mark_complete(path)
    try: attempt(READERS[name], path)
    finally:
        path.write_bytes(whole)
        if mark: marker.write_bytes(mark)


def flipped(data, flips, cut=0):
    "The bytes with some bits flipped, most of them near the start, and the end cut off"
    data = bytearray(data)
    for at, bit in flips: data[int(at*len(data)) % len(data)] ^= 1 << bit
    return bytes(data[:len(data) - int(cut*len(data))])


def taken_apart(data):
    "Header, metadata as JSON and tensors' bytes of a safetensors file, without its seal"
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    texts = header.pop("__metadata__")
    return header, {key: json.loads(text) for key, text in texts.items() if key not in ("seal", "sealed")}, data[end:]


def put_together(header, meta, body):
    "A safetensors file"
    texts = {key: json.dumps(value) for key, value in meta.items()} if isinstance(meta, dict) else meta
    text = json.dumps(dict(__metadata__=texts) | header if isinstance(header, dict) else header).encode()
    return len(text).to_bytes(8, "little") + text + body


def places_in(value, at=()):
    "Where something else can be put in a JSON value"
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items: found += places_in(inner, (*at, key))
    return found


def replaced(value, at, new):
    "A JSON value with something else in one place"
    if not at: return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = replaced(value[at[0]], at[1:], new)
    return copy


def replaced_somewhere(value, where, new):
    "A JSON value with something else at a place that a share of 1 says"
    places = places_in(value)
    return replaced(value, places[int(where*len(places))], new)


NUMBERS = st.integers(-2**70, 2**70) | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 1e400])
ODD_TEXTS = "\x1b[2J", "../../x", "conv1", "F4", "|", "\ud800", "x"*300, "__metadata__"
TEXTS = st.text(max_size=6) | st.sampled_from(ODD_TEXTS)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)
FLIPS = st.lists(st.tuples(st.floats(0, 1) | st.floats(0, .05), st.integers(0, 7)), max_size=6)
CUTS = st.just(0) | st.floats(0, 1)
PLACES = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize("name", READERS)
@given(flips=FLIPS, cut=CUTS)
def test_flipped_bits_and_cut_files(place, name, flips, cut):
    with_bytes(place, name, flipped((place/name).read_bytes(), flips, cut))


@pytest.mark.parametrize("name", SEALED)
@given(flips=FLIPS)
def test_flipped_bits_where_no_seal_tells(place, name, flips):
    whole = put_together(*taken_apart((place/name).read_bytes()))
    with_bytes(place, name, flipped(whole, flips))


@pytest.mark.parametrize("name", SEALED)
@given(where=PLACES, new=JSON)
def test_other_metadata(place, name, where, new):
    header, meta, body = taken_apart((place/name).read_bytes())
    with_bytes(place, name, put_together(header, replaced_somewhere(meta, where, new), body))


@pytest.mark.parametrize("name", SEALED)
@given(where=PLACES, new=JSON)
def test_other_headers(place, name, where, new):
    header, meta, body = taken_apart((place/name).read_bytes())
    with_bytes(place, name, put_together(replaced_somewhere(header, where, new), meta, body))


@pytest.mark.parametrize("name", SEALED)
@given(seed=st.integers(0, 2**32), at=PLACES, n=st.integers(1, 40))
def test_other_numbers(place, name, seed, at, n):
    "Weights that are any floats, NaN and infinity among them"
    header, meta, body = taken_apart((place/name).read_bytes())
    start = int(at*len(body))
    noise = torch.randint(256, (n,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8).numpy().tobytes()
    body = (body[:start] + noise + body[start + n:])[:len(body)]
    with_bytes(place, name, put_together(header, meta, body))


def with_json(path, value, *reads):
    "What is made of a JSON file with another value; the old one is put back"
    whole = path.read_bytes() if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
    try:
        for read in reads: attempt(*read)
    finally:
        if whole is None: path.unlink()
        else: path.write_bytes(whole)


@given(new=JSON, where=PLACES, whole=st.booleans())
def test_markers(place, new, where, whole):
    model, marker = place/"zoo/m2.safetensors", place/"zoo/complete/m2.json"
    value = new if whole else replaced_somewhere(json.loads(marker.read_bytes()), where, new)
    with_json(marker, value, (read_marker, model), (not_as_marked, model), (use_in_gallery, model))


SHEET = dict(task=0, run=0, reason="", seed=0)
PLAN = dict(pairs=[["a", "b"], ["a", "c"]], data="digits", seed=0, recipe=dict(name="short"))


@pytest.mark.parametrize("name, value", [("build.json", PLAN), ("set_aside/m9.json", SHEET)])
@given(new=JSON, where=PLACES, whole=st.booleans())
def test_what_a_build_left(place, name, value, new, where, whole):
    value = new if whole else replaced_somewhere(value, where, new)
    reads = (read_json, place/"zoo"/name), (lambda: datasheet_text(datasheet(load_modelset(place/"zoo"))),)
    with_json(place/"zoo"/name, value, *reads)


CELLS = st.none() | st.booleans() | NUMBERS | TEXTS | st.sampled_from(["x.pt", "y.pt", 0, 1, .5])
COLUMN = st.sampled_from(["file", "task", "run", "val_accuracy", "class_0", "seed", "lacks"])
ROW = st.dictionaries(COLUMN, CELLS, max_size=4) | st.fixed_dictionaries(dict(file=st.just("x.pt"), task=CELLS))


@given(rows=st.lists(ROW, max_size=4))
def test_tables(rows): attempt(read_table, pd.DataFrame(rows))


@given(text=st.text(alphabet='filetask,;\t\n"\'0x.p\x00\x1b', max_size=60) | st.binary(max_size=40))
def test_tables_in_files(root, text):
    (root/"table.csv").write_bytes(b"file,task\n" + (text if isinstance(text, bytes) else text.encode()))
    attempt(read_table, root/"table.csv")


PATTERNS = TEXTS | st.sampled_from(["^", ".*", "conv1", "(", r"\1", r"\g<x>", "(?P<a>c)", "[", "weight$", "^(.*)$"])
MAPS = st.dictionaries(PATTERNS, PATTERNS, max_size=3) | st.lists(st.tuples(PATTERNS, PATTERNS), max_size=3)


@given(names=MAPS)
def test_name_maps(names): attempt(rename, dict.fromkeys(["conv1.weight", "bn1.bias"]), names)


@given(rows=st.none() | st.lists(ROW, min_size=1, max_size=3), names=MAPS)
def test_imports(root, rows, names):
    "What is taken in with any table and name map is a model set"
    with tempfile.TemporaryDirectory(dir=root) as folder:
        src, dst = Path(folder)/"src", Path(folder)/"dst"
        src.mkdir()
        torch.save(tiny(0), src/"x.pt")
        models = attempt(import_models, src, dst, names, None if rows is None else pd.DataFrame(rows))
        left = list(dst.glob("*"))
        assert len(left) == (0 if models is None else 1)
        if models is not None: assert len(load_modelset(dst)) == len(models) == 1


@given(data=st.binary(max_size=200), start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x10" + b"\0"*7 + b"{"]))
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_any_bytes(root, suffix, data, start):
    path = root/f"any{suffix}"
    path.write_bytes(start + data)
    for read in (read_model, read_header, load_modelset, load_fitted, ModelIndex.load, read_json): attempt(read, path)


CALLS = ["builtins eval", "builtins exec", "builtins __import__", "importlib import_module", "operator attrgetter"]
CALLS += ["os system", "subprocess Popen", "socket socket", "pty spawn", "torch load", "torch.hub load", "ctypes CDLL"]
OPCODES = [bytes([code]) for code in b"Ro\x81bsu.Q}])(tae021"]


def asks_for(call, argument):
    "A pickle that calls something with one argument"
    module, name = call.split()
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps((argument,), 2)[2:-1] + b"R"


@given(call=st.sampled_from(CALLS), argument=st.sampled_from([CANARY, f"{CANARY}()", "true"]) | st.integers(0, 9),
       rest=st.lists(st.sampled_from(OPCODES), max_size=12), zipped=st.booleans())
def test_pickles_that_ask_for_code(place, call, argument, rest, zipped):
    data = asks_for(call, argument) + b"".join(rest) + b"."
    path = place/"code.pt"
    if zipped: path.write_bytes(zip_with(data))
    else: path.write_bytes(pickle.dumps(0x1950a86a20f9469cfc6c, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + data)
    assert attempt(read_model, path) is None


def zip_with(pickled):
    "A PyTorch archive with any pickle in it"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/version", "3")
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", bytes(64))
    return file.getvalue()


VIEW = b"ctorch._utils\n_rebuild_tensor_v2\n(ctorch\nFloatStorage\n"


@given(rest=st.lists(st.sampled_from(OPCODES) | st.binary(max_size=3), max_size=20))
def test_pickles_of_any_operations(place, rest):
    path = place/"operations.pt"
    path.write_bytes(zip_with(b"\x80\x02}X\x01\x00\x00\x00a" + VIEW + b"".join(rest) + b"."))
    attempt(use_foreign, path)


class Storage: "Stands for the numbers of a tensor"


class Claimed:
    "Pickled, it is a tensor of any shape"
    def __init__(self, *claims): self.claims = claims
    def __reduce__(self): return _rebuild_tensor_v2, (Storage(), *self.claims, False, None)


class StatePickler(pickle.Pickler):
    "Writes a storage of `n` floats, as torch.save does"
    def __init__(self, file, n):
        super().__init__(file, 2)
        self.n = n

    def persistent_id(self, o):
        return ("storage", torch.FloatStorage, "0", "cpu", self.n) if isinstance(o, Storage) else None


ENTRY = st.sampled_from([0, 1, 2, 3, 16, 2**31, 2**62, -1]) | st.integers(-4, 70)


@example(size=[2, 0, 2**62], stride=[], offset=0, n=0)
@given(size=st.lists(ENTRY, max_size=5), stride=st.lists(ENTRY, max_size=5), offset=ENTRY, n=ENTRY)
def test_views_of_any_shape(place, size, stride, offset, n):
    "A tensor that leaves its storage, or repeats it"
    file = io.BytesIO()
    StatePickler(file, n).dump({"conv1.weight": Claimed(offset, tuple(size), tuple(stride))})
    path = place/"view.pt"
    path.write_bytes(zip_with(file.getvalue()))
    attempt(use_foreign, path)


def one_image(suffix, **how):
    "A small image, as a file of some kind"
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 100, 0)).save(file, suffix, **how)
    return file.getvalue()


IMAGES = {kind: one_image(kind) for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp")}


@pytest.mark.parametrize("kind", IMAGES)
@given(flips=FLIPS, cut=CUTS)
def test_images(root, kind, flips, cut):
    "One that cannot be read is listed, and the others come in"
    for name in "cat", "dog":
        folder = root/"pets"/kind/"train"/name
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder/"0.png").exists(): (folder/"0.png").write_bytes(IMAGES["png"])
    suffix = dict(jpeg="jpg", tiff="tif").get(kind, kind)
    (root/"pets"/kind/"train/cat"/f"1.{suffix}").write_bytes(flipped(IMAGES[kind], flips, cut))
    images = attempt(load_images, root/"pets"/kind, "train")
    if images is not None: assert len(images) + len(images.rejected) >= 3


def nested(depth):
    "Operations that put a tuple on the stack whose hash takes 2**depth steps; test_bounds has deep ones"
    return b"K\x01" + b"q\x00h\x00\x86"*depth


MAPPINGS = {
    "SETITEM": b"}%sK\x02s", "SETITEMS": b"}(%sK\x02u", "DICT": b"(%sK\x02d", "ADDITEMS": b"\x8f(%s\x90",
    "FROZENSET": b"(%s\x91", "OrderedDict": b"ccollections\nOrderedDict\n(](%sK\x02\x86atR",
    "in a key": b"}%sK\x02\x86K\x03s", "in a value": b"}K\x01(%sK\x02ds",
}


@given(kind=st.sampled_from(sorted(MAPPINGS)), depth=st.integers(0, 14), protocol=st.sampled_from([b"", b"\x80\x04"]),
       before=st.lists(st.sampled_from(OPCODES), max_size=3), zipped=st.booleans())
def test_keys_that_are_nested(place, kind, depth, protocol, before, zipped):
    data = protocol + b"".join(before) + MAPPINGS[kind] % nested(depth) + b"."
    path = place/"nested.pt"
    path.write_bytes(zip_with(data) if zipped else data)
    attempt(use_foreign, path)


KNOWN = "digest", "lacks", "architecture", "task", "classes", "layers", "sha256", "shortcut", "source", "size", "mean"
DIGESTS = st.integers(0, 2).map(lambda i: Asked.index.digests[i])


@given(claims=st.dictionaries(st.sampled_from(KNOWN), DIGESTS | JSON | st.just(["fc"]), max_size=4))
def test_claims_of_a_file(place, claims):
    "Whatever it says of itself, it is no copy of another"
    save_tensors(place/"claims.safetensors", tiny(7), claims)
    for model in (place/"claims.safetensors", attempt(read_model, place/"claims.safetensors")):
        answer = None if model is None else attempt(Asked.index.answer, model)
        if answer is not None: assert "copy" not in answer.table.note.tolist()


OUTSIDE = Path(tempfile.gettempdir())/"lps-named-by-a-file.safetensors"
NAMES = TEXTS | st.sampled_from([
    "", ".", "..", "/", str(OUTSIDE), "../x", "a/../../x", "a/b", "a\\b", "C:\\x", "\\\\host\\x", "x\0",
    "~", "-", "CON", "a:b", "..\\x", "x/", "./x", "x"*5000, ".hidden", "complete", "manifest.csv",
])


def below(folder): return sorted(file for file in folder.rglob("*") if file.is_file())


@given(name=NAMES)
def test_names_that_are_paths(place, name):
    "Nothing is written beside the folder that a user names, whatever the models of a set are called"
    header, meta, body = taken_apart((place/"packed.safetensors").read_bytes())
    meta["packed"]["models"][0]["file"] = name
    for models in meta["packed"]["models"]: models.pop("lacks", None)
    meta["packed"]["common"].pop("lacks", None)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        file = Path(folder)/"named.safetensors"
        file.write_bytes(put_together(header, meta, body))
        models = attempt(load_modelset, file)
        if models is None: return
        with suppress(TypeError, KeyError): attempt(save_pretrained, models, Path(folder)/"out/deep/set")
        written = [path for path in below(Path(folder)) if path != file]
        assert all(path.is_relative_to(Path(folder)/"out/deep/set") for path in written), written
        assert not OUTSIDE.exists()


@given(name=NAMES | JSON)
def test_shards_that_are_paths(place, name):
    "An index of shards names files beside it, and nothing else is read"
    folder = place/"sharded"
    folder.mkdir(exist_ok=True)
    save_tensors(folder/"a.safetensors", tiny(0), {})
    places_of = dict.fromkeys(tiny(0), "a.safetensors") | {"fc.weight": name}
    (folder/"model.safetensors.index.json").write_text(json.dumps(dict(weight_map=places_of)))
    attempt(use_foreign, folder)


class Stranger:
    "An index in a folder, to which rows with any facts are added"
    index, fact = None, None


@pytest.fixture(scope="module")
def stranger(place):
    Asked.index.save(place/"stranger")
    Stranger.index = ModelIndex.load(place/"stranger")
    Stranger.fact = Stranger.index.rows.facts([0])[0] | dict(
        key=[str(place/"foreign.safetensors"), None, 100, 100], sketch=weight_sketch(tiny(0)), architecture="resnet",
        label=0, parameters=5, recipe="short")
    use_strangers(Asked.index)  # what is imported at first use is imported now
    return place


def use_strangers(index):
    "All that an index can be asked"
    index.query(Asked.query, 3).to_string(), index.tasks(Asked.query).to_string(), repr(index), str(index.manifest)
    answer = index.answer(Asked.query, expected=True)
    with redirect_stdout(io.StringIO()) as out:
        for value in (answer.to_dict(), index_facts(index)): print_json(value)
        show_answer(answer)
    assert "\x1b" not in out.getvalue() and "\x9b" not in out.getvalue()
    page_data(index.manifest, {"": index.embedding}, MapSettings())
    with suppress(ValueError): index.check()


@given(where=PLACES, new=JSON | NAMES, more=st.dictionaries(TEXTS, JSON, max_size=2), whole=st.booleans())
def test_facts_of_an_index_of_a_stranger(stranger, where, new, more, whole):
    rows = Stranger.index.rows
    fact = new if whole else replaced_somewhere(Stranger.fact, where, new) | more
    memory = Rows(rows.width, rows.about)
    memory.append(rows.rows[:3], rows.digests(range(3)), [0, 1, -1], [fact, Stranger.fact, {}])
    index = ModelIndex._of(Asked.fitted, memory)
    attempt(use_strangers, index)
    attempt(index.remove, str(new))
    assert 1 <= len(index) <= 3


@given(value=JSON | st.dictionaries(TEXTS, JSON | st.text(), max_size=3))
def test_json_of_any_value(value):
    with redirect_stdout(io.StringIO()) as out: print_json(value)
    assert all(c.isprintable() or c == "\n" for c in out.getvalue())
    json.loads(out.getvalue(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def graph(place):
    "A graph of five rows, its file and its content"
    pytest.importorskip("usearch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LPS_HOME", str(place/"home"))
        kept = create_store(place/"graphed", 8)
        rows = torch.nn.functional.normalize(torch.arange(40.).reshape(5, 8) - 17).numpy()
        kept.append(rows, [f"{i:032x}" for i in range(5)], [0]*5, [{}]*5)
        file = kept.build_graph()
        yield kept, file, file.read_bytes()


@given(flips=FLIPS, cut=CUTS)
def test_graphs(graph, flips, cut):
    "One with any other byte is never mapped"
    kept, file, whole = graph
    file.write_bytes(flipped(whole, flips, cut))
    found = attempt(lambda: Store(kept.path).search_graph(kept.rows[:2], 2))
    assert (found is not None) == (file.read_bytes() == whole)


class Server(threading.Thread):
    "A server that answers each request with the next of some texts, whatever they are"
    def __init__(self):
        super().__init__(daemon=True)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/model.safetensors"
        self.answers = []
        self.start()

    def run(self):
        while True:
            connection, _ = self.socket.accept()
            with connection, suppress(OSError):
                connection.recv(65_536)
                connection.sendall(self.answers.pop(0) if self.answers else b"")


@pytest.fixture(scope="module")
def server(): return Server()


STATUS = st.sampled_from([200, 206, 206, 206, 301, 302, 304, 401, 404, 416, 500, 999, 0]) | st.integers(-5, 9999)
HEADER = st.sampled_from([
    "Content-Length: 5", "Content-Length: -1", "Content-Length: x", "Content-Range: bytes 0-9/10", "ETag: a", "ETag: b",
    "Content-Range: bytes */*", "Content-Range: bytes 0-32767/99999999999999", "Transfer-Encoding: chunked",
    "Content-Encoding: gzip", "Location: file:///etc/passwd", "Location: http://[", "Location: \x01", "no colon", ":",
    "",
    "Last-Modified: today", "Content-Type: text/html; charset=\u00ff", "X: " + "y"*70_000,
])


@given(answers=st.lists(st.tuples(STATUS, st.lists(HEADER, max_size=3), st.booleans(), FLIPS, CUTS) | st.binary(),
                        min_size=1, max_size=3))
def test_servers(place, server, answers):
    "A server may say anything: a model is read, or there is one reason why not"
    whole = (place/"foreign.safetensors").read_bytes()
    server.answers = []
    for answer in answers:
        if isinstance(answer, tuple):
            status, lines, honest, flips, cut = answer
            body = flipped(whole, flips, cut)
            if honest: lines = [f"Content-Range: bytes 0-{len(body) - 1}/{len(body)}", *lines]
            head = "\r\n".join([f"HTTP/1.1 {status} said", *lines, "", ""])
            answer = head.encode("latin-1", "replace") + body
        server.answers.append(answer)
    with warnings.catch_warnings(), suppress(ValueError, OSError):
        warnings.simplefilter("ignore")
        model = read_model(server.url)
        attempt(Asked.index.query, model, 2)
