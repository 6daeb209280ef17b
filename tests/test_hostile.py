"""Files of all kinds, spoiled at random: refused with ValueError or OSError, and no process, socket or code is started.
`LPS_EXAMPLES` says how many inputs each property is tried with; scripts/fuzz.py runs this file with many"""
import json, sys, warnings
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lps.datasheet import datasheet, datasheet_text
from lps.files import load_model, mark_complete, provenance, read_header, read_json, read_marker, save_model, write_json
from lps.foreign import check_weights, import_models, read_query, rename
from lps.methods import embed_models, fit_method, load_fitted, save_fitted
from lps.modelset import load_modelset, pack, task_names
from lps.resnet import ResNet
from lps.search import ModelIndex

FORBIDDEN = ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'socket.', 'pickle.find_class')


class Watch:
    "Events that no file may cause, while it is read"
    armed, seen, tried = False, [], 0

    @classmethod
    def hook(cls, event, args):
        if cls.armed and event.startswith(FORBIDDEN): cls.seen.append(event)


sys.addaudithook(Watch.hook)


def attempt(read, *args):
    "Read a hostile file: it may be taken or refused, nothing else"
    Watch.seen, Watch.armed = [], True
    Watch.tried += 1
    try:
        with warnings.catch_warnings(), suppress(ValueError, OSError):
            warnings.simplefilter('ignore')
            read(*args)
    finally: Watch.armed = False
    assert not Watch.seen


def tiny(seed):
    torch.manual_seed(seed)
    return ResNet(depth=8, width=4).state_dict()


def open_set(path):
    "A model set, and all that is shown of it"
    models = load_modelset(path)
    repr(models), repr(models[0]), task_names(models), models.labels, models.hashes, models.digests
    models.weights(['conv1'], folded=True)
    datasheet_text(datasheet(models))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A gallery of four models with all that is made of it: valid files, by kind"
    root = tmp_path_factory.mktemp('hostile')
    for i in range(4):
        meta = dict(
            task=i // 2, run=i % 2, classes=['a', 'b'], seed=i, val_accuracy=0.9, recipe=dict(name='short', epochs=2)
        )
        save_model(root/'zoo'/f'm{i}.safetensors', tiny(i), meta | dict(data='digits', precision='float32', seconds=3.))
        mark_complete(root/'zoo'/f'm{i}.safetensors', seconds=3)
    models = load_modelset(root/'zoo')
    pack(models, root/'packed.safetensors', datasheet=datasheet(models))
    fitted = fit_method(models, 'lps', n_filters=4, epochs=1, milestones=())
    save_fitted(root/'net.safetensors', fitted)
    ModelIndex(fitted, models).save(root/'index.safetensors')
    torch.save(tiny(0), root/'new.pt')
    torch.save(tiny(0), root/'old.pt', _use_new_zipfile_serialization=False)
    known = provenance()  # asks git for the commit, which is a process that no file started
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('lps.datasheet.provenance', lambda: known)
        yield root


def read_in_gallery(path):
    "A model among others: the others must be readable whatever it is"
    models = load_modelset(path.parent)
    assert len(models) >= 3
    open_set(path.parent)


READERS = {
    'zoo/m3.safetensors': read_in_gallery,
    'packed.safetensors': open_set,
    'net.safetensors': lambda path: embed_models(load_fitted(path), load_modelset(path.parent/'zoo')),
    'index.safetensors': lambda path: ModelIndex.load(path).query(path.parent/'new.pt', 2),
    'new.pt': lambda path: check_weights(read_query(path).state),
    'old.pt': lambda path: check_weights(read_query(path).state),
}
SEALED = [name for name in READERS if name.endswith('safetensors')]


def with_bytes(path, data, read):
    "Read a file with other contents; the old ones are put back"
    whole = path.read_bytes()
    marker = path.parent/'complete'/f'{path.stem}.json'
    mark = marker.read_bytes() if marker.exists() else None
    path.write_bytes(data)
    if mark: mark_complete(path)
    try: attempt(read, path)
    finally:
        path.write_bytes(whole)
        if mark: marker.write_bytes(mark)


def flipped(data, flips, cut):
    "The bytes with some bits flipped, most of them near the start, and the end cut off"
    data = bytearray(data)
    for at, bit in flips:
        if data: data[int(at*len(data)) % len(data)] ^= 1 << bit
    return bytes(data[:len(data) - int(cut*len(data))])


def taken_apart(data):
    "Header, metadata as JSON and tensors' bytes of a safetensors file, without its seal"
    end = 8 + int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:end])
    meta = {key: json.loads(text) for key, text in header.pop('__metadata__').items() if key != 'seal'}
    return header, meta, data[end:]


def put_together(header, meta, body):
    "A safetensors file"
    texts = {key: json.dumps(value) for key, value in meta.items()} if isinstance(meta, dict) else meta
    text = json.dumps(dict(__metadata__=texts) | header if isinstance(header, dict) else header).encode()
    return len(text).to_bytes(8, 'little') + text + body


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


NUMBERS = st.integers(-2**70, 2**70) | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 1e400])
TEXTS = st.text(max_size=6) | st.sampled_from(['\x1b[2J', '../../x', 'conv1', 'F4', '|', '\ud800', 'x'*300])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)
FLIPS = st.lists(st.tuples(st.floats(0, 1)  | st.floats(0, .05), st.integers(0, 7)), max_size=6)
CUTS = st.just(0) | st.floats(0, 1)
PLACES = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize('name', READERS)
@given(flips=FLIPS, cut=CUTS)
def test_flipped_bits_and_cut_files(place, name, flips, cut):
    with_bytes(place/name, flipped((place/name).read_bytes(), flips, cut), READERS[name])


@pytest.mark.parametrize('name', SEALED)
@given(flips=FLIPS)
def test_flipped_bits_where_no_seal_tells(place, name, flips):
    whole = put_together(*taken_apart((place/name).read_bytes()))
    with_bytes(place/name, flipped(whole, flips, 0), READERS[name])


@pytest.mark.parametrize('name', SEALED)
@given(where=PLACES, new=JSON)
def test_other_metadata(place, name, where, new):
    header, meta, body = taken_apart((place/name).read_bytes())
    places = places_in(meta)
    at = places[int(where*len(places))]
    with_bytes(place/name, put_together(header, replaced(meta, at, new), body), READERS[name])


@pytest.mark.parametrize('name', SEALED)
@given(where=PLACES, new=JSON)
def test_other_headers(place, name, where, new):
    header, meta, body = taken_apart((place/name).read_bytes())
    places = places_in(header)
    at = places[int(where*len(places))]
    with_bytes(place/name, put_together(replaced(header, at, new), meta, body), READERS[name])


@pytest.mark.parametrize('name', SEALED)
def test_one_flipped_bit_is_always_noticed(place, name):
    whole = (place/name).read_bytes()
    end = 8 + int.from_bytes(whole[:8], 'little')
    for at in range(end, len(whole), max(1, (len(whole) - end)//50)):
        (place/'flip.safetensors').write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(ValueError, match='is damaged: it does not hold what was written'):
            load_model(place/'flip.safetensors')
    (place/'flip.safetensors').unlink()


@given(new=JSON, where=PLACES)
def test_markers_and_what_a_build_left(place, new, where):
    marker = place/'zoo/complete/m3.json'
    whole = json.loads(marker.read_bytes())
    at = places_in(whole)[int(where*len(whole))]
    write_json_loosely(marker, replaced(whole, at, new) if where < .8 else new)
    try:
        attempt(read_marker, place/'zoo/m3.safetensors')
        attempt(read_in_gallery, place/'zoo/m3.safetensors')
    finally: write_json(marker, whole)
    for name in ('build.json', 'set_aside/m9.json'):
        (place/'zoo/set_aside').mkdir(exist_ok=True)
        write_json_loosely(place/'zoo'/name, new)
        try:
            attempt(read_json, place/'zoo'/name)
            attempt(lambda: datasheet(load_modelset(place/'zoo')))
        finally: (place/'zoo'/name).unlink()


def write_json_loosely(path, value): Path(path).write_text(json.dumps(value))


CELLS = st.none() | st.booleans() | NUMBERS | TEXTS


COLUMN = st.sampled_from(['file', 'task', 'run', 'val_accuracy', 'class_0', 'lacks'])


@given(rows=st.lists(st.dictionaries(COLUMN, CELLS), max_size=4),
       names=st.lists(st.tuples(TEXTS, TEXTS), max_size=3))
def test_tables_and_name_maps(tmp_path_factory, rows, names):
    root = tmp_path_factory.mktemp('import')
    (root/'src').mkdir()
    torch.save(tiny(0), root/'src/x.pt')
    attempt(import_models, root/'src', root/'a', names)
    attempt(import_models, root/'src', root/'b', (), pd.DataFrame(rows))
    if not (root/'b').exists(): return
    assert len(load_modelset(root/'b')) == 1


@given(names=st.dictionaries(TEXTS, TEXTS, max_size=3) | st.lists(st.tuples(TEXTS, TEXTS), max_size=3))
def test_renaming(names): attempt(rename, dict.fromkeys(['conv1.weight', 'bn1.bias']), names)


@given(data=st.binary(max_size=200))
def test_any_bytes(place, data):
    for suffix in ('.pt', '.safetensors'):
        path = place/f'any{suffix}'
        path.write_bytes(data)
        attempt(read_query, path)
        attempt(read_header, path)
        path.unlink()
