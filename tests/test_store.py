"""Rows in a folder: exact, whatever is removed; the old or the new state after a kill; hostile files give one error"""
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lps.core.files as files
import lps.index.store as store
from lps.index.store import RECORD, Rows, Store, create_store, nearest

WIDTH = 8


def unit(n, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, WIDTH)).astype(np.float32)
    return x/np.linalg.norm(x, axis=1, keepdims=True)


def batch(first, n):
    "Rows, digests, labels and facts of n models from number `first`"
    numbers = range(first, first + n)
    digests = [f"{i:032x}" for i in numbers]
    return unit(n, first), digests, [i % 3 for i in numbers], [dict(file=f"{i}é") for i in numbers]


def state(folder):
    "All that a reader sees"
    seen = Store(folder)
    seen.check()
    return [(fact["file"], digest) for fact, digest in zip(seen.facts(seen.places), seen.digests(seen.places))]


@pytest.fixture
def kept(tmp_path):
    made = create_store(tmp_path/"kept", WIDTH, dict(made="here"))
    made.append(*batch(0, 5))
    made.append(*batch(5, 2))
    made.remove([1])
    return made


@given(st.integers(0, 200), st.integers(1, 30), st.sets(st.integers(0, 199)), st.integers(0, 99))
def test_search_is_what_sorting_gives(n, k, gone, seed):
    rows, queries, gone = unit(n, seed), unit(3, seed + 1), sorted(i for i in gone if i < n)
    scores = queries @ rows.T
    scores[:, gone] = -np.inf
    similarity, places = nearest(rows, queries, k, gone)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :min(k, n - len(gone))]
    assert np.array_equal(places, expected)
    assert np.allclose(similarity, np.take_along_axis(scores, expected, 1), atol=1e-6)


def test_search_crosses_blocks(monkeypatch):
    monkeypatch.setattr(store, "BLOCK", 7)
    rows, queries = unit(50), unit(2, 9)
    expected = np.argsort(-(queries @ rows.T), axis=1)
    assert np.array_equal(nearest(rows, queries, 12)[1], expected[:, :12])
    gone = np.sort(expected[0, :20])
    assert not set(nearest(rows, queries, 30, gone)[1].ravel()) & set(gone)


def test_memory_and_folder_say_the_same(kept):
    rows = Rows(WIDTH)
    rows.append(*batch(0, 5))
    rows.append(*batch(5, 2))
    rows.remove([1])
    asked = unit(2, 5)
    for a, b in zip(rows.search(asked, 4), Store(kept.path).search(asked, 4)): assert np.array_equal(a, b)
    assert rows.places.tolist() == kept.places.tolist() and rows.digests([3]) == kept.digests([3])
    assert rows.with_digest(f"{1:032x}").tolist() == kept.with_digest(f"{1:032x}").tolist() == []
    assert kept.labels(kept.places).tolist() == [0, 2, 0, 1, 2, 0]


def test_what_others_added_is_not_lost(kept):
    a, b = Store(kept.path), Store(kept.path)
    a.append(*batch(7, 1))
    b.append(*batch(8, 1))
    b.note(more=1)
    a.reopen()
    assert [int(digest, 16) for _, digest in state(kept.path)] == [0, 2, 3, 4, 5, 6, 7, 8]
    assert a.about == dict(made="here", more=1)


def test_adding_writes_no_more_than_what_is_added(kept):
    kept.append(*batch(7, 3000))
    before = {file.name: file.read_bytes() for file in kept.path.iterdir()}
    opened = (kept.path/"rows.f32").stat().st_ino
    kept.append(*batch(4000, 1))
    assert (kept.path/"rows.f32").stat().st_ino == opened
    for name in ("rows.f32", "records.bin", "facts.jsonl", "segments.bin"):
        after = (kept.path/name).read_bytes()
        assert after.startswith(before[name]) and 0 < len(after) - len(before[name]) < 100
    assert len((kept.path/"header.json").read_bytes()) < 600


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="reads /proc")
def test_opening_reads_only_what_it_needs(tmp_path):
    "Ten million rows, as a file full of holes"
    path, n = tmp_path/"many", 10_000_000
    create_store(path, 128)
    line = b'{"file":"m"}\n'
    with open(path/"rows.f32", "r+b") as file: file.truncate(4*128*n)
    with open(path/"records.bin", "r+b") as file: file.truncate(RECORD.itemsize*n)
    (path/"facts.jsonl").write_bytes(line)
    header = Store(path).header
    header.rows, header.facts = n, len(line)
    (path/"header.json").write_bytes(store._header_bytes(header))
    def read(): return int(Path("/proc/self/io").read_text().split()[1])
    before = read()
    seen = Store(path)
    assert len(seen) == n and seen.rows.shape == (n, 128)
    assert read() - before < 100_000


# A process that writes and dies before or after the n-th file operation, or in the middle of a write
DIES = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import lps.core.files as files, lps.index.store as store
from test_store import batch
def die(): os.kill(os.getpid(), signal.SIGKILL)
class DyingOs:
    def __init__(self, n): self.n = n
    def __getattr__(self, name):
        f = getattr(os, name)
        if name not in ('write', 'fsync', 'replace', 'ftruncate'): return f
        def op(*args):
            self.n -= 1
            if self.n == 0 and name == 'write': os.write(args[0], bytes(args[1])[:len(args[1])//2]); die()
            if self.n == 0 and name == 'fsync': die()
            result = f(*args)
            if self.n == 0: die()
            return result
        return op
for line in sys.stdin:
    folder, what, n = line.split()
    if not (pid := os.fork()):
        kept = store.Store(folder)
        store.os = files.os = DyingOs(int(n))
        if what == 'append': kept.append(*batch(7, 3))
        elif what == 'replace': kept.append(*batch(7, 3), replacing=[2, 5])
        else: kept.remove([2, 5])
        os._exit(0)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def dying():
    if not hasattr(os, "fork"): pytest.skip("needs fork")
    code = DIES.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    def run(folder, what, n):
        process.stdin.write(f"{folder} {what} {n}\n")
        process.stdin.flush()
        return int(process.stdout.readline())
    yield run
    process.kill()
    process.wait()


@pytest.mark.parametrize("what", ["append", "remove", "replace"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(kept, dying, what):
    old, seen = state(kept.path), []
    added = [(f"{i}é", f"{i:032x}") for i in (7, 8, 9)] if what != "remove" else []
    new = [*(old if what == "append" else [old[0], *old[2:4], old[5]]), *added]
    for n in range(1, 100):
        status = dying(kept.path, what, n)
        seen.append(state(kept.path))
        assert seen[-1] in (old, new), n
        if seen[-1] == new: break
        assert status == signal.SIGKILL
    assert n > 3 and seen[0] == old
    Store(kept.path).append(*batch(20, 1))
    assert state(kept.path) == [*new, ("20é", f"{20:032x}")]


def test_a_full_disk_leaves_the_old(kept, monkeypatch):
    old, real = state(kept.path), os.fsync
    def full(fd): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"): kept.append(*batch(7, 3))
    monkeypatch.setattr(os, "fsync", real)
    assert state(kept.path) == old
    kept.append(*batch(7, 1))
    assert state(kept.path) == [*old, ("7é", f"{7:032x}")]


@given(place=st.integers(0, 10**9), bit=st.integers(0, 7), name=st.sampled_from(
    ["header.json", "rows.f32", "records.bin", "facts.jsonl", "segments.bin", "removed.u64"]))
def test_a_flipped_bit_is_found(tmp_path_factory, place, bit, name):
    folder = tmp_path_factory.getbasetemp()/"flipped"
    if not folder.exists():
        made = create_store(folder, WIDTH)
        made.append(*batch(0, 5))
        made.remove([1])
    whole = (folder/name).read_bytes()
    spoiled = bytearray(whole)
    spoiled[place % len(spoiled)] ^= 1 << bit
    (folder/name).write_bytes(spoiled)
    try:
        same = json.loads(whole) == json.loads(spoiled) if name == "header.json" else False
    except ValueError: same = False
    try:
        if same: state(folder)
        else:
            with pytest.raises(ValueError, match="flipped"): state(folder)
    finally: (folder/name).write_bytes(whole)


@given(st.dictionaries(
    st.sampled_from(["format", "width", "rows", "facts", "segments", "removed", "gone", "chain", "about", "seal"]),
    st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.text(max_size=4), min_size=1))
def test_a_header_that_lies_gives_one_error(tmp_path_factory, lies):
    "Also with a seal that fits: no claim is believed that the files do not bear out"
    folder = tmp_path_factory.getbasetemp()/"lying"
    if not folder.exists(): create_store(folder, WIDTH).append(*batch(0, 5))
    whole = (folder/"header.json").read_text()
    said = json.loads(whole) | lies
    try:
        header = files.checked(said, store.StoreHeader, "header")
        if "seal" not in lies: said["seal"] = store.seal_of(header)
    except ValueError: pass
    (folder/"header.json").write_text(json.dumps(said))
    try:
        if said != json.loads(whole):
            try:
                seen = Store(folder)
                seen.search(unit(1)[:, :seen.width] if seen.width <= WIDTH else np.zeros((1, seen.width)), 3)
                seen.facts(seen.places), seen.check()
            except ValueError as e: assert "\n" not in str(e)
    finally: (folder/"header.json").write_text(whole)


def test_files_that_are_missing_or_cut(kept):
    for name, size in store.file_sizes(kept.header).items():
        file = kept.path/name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=f"truncated: {name} has {size - 1} bytes of {size}"): Store(kept.path)
        file.unlink()
        with pytest.raises(ValueError, match=f"{name} has 0 bytes"): Store(kept.path)
        file.write_bytes(whole)
    (kept.path/"header.json").unlink()
    with pytest.raises(FileNotFoundError, match="no header.json"): Store(kept.path)


def test_wrong_rows_are_refused_whole(kept):
    rows, digests, labels, facts = batch(7, 2)
    old = state(kept.path)
    for wrong in ((rows[:, :3], digests, labels, facts), (rows*np.nan, digests, labels, facts),
                  (rows, digests[:1], labels, facts), (rows, ["zz", "1"], labels, facts)):
        with pytest.raises(ValueError): kept.append(*wrong)
    with pytest.raises(IndexError, match="of 7"): kept.remove([7])
    assert state(kept.path) == old


class Stopped(BaseException): "Stands for a kill"


class StoppingOs:
    "`os` that stops at the n-th file operation, before, in the middle of or after it"
    def __init__(self, n, how): self.n, self.how = n, how

    def __getattr__(self, name):
        call = getattr(os, name)
        if name not in ("write", "fsync", "replace", "ftruncate"): return call
        def run(*args):
            self.n -= 1
            if self.n: return call(*args)
            if self.how == "half" and name == "write": call(args[0], bytes(args[1])[:len(args[1])//2])
            if self.how == "after": call(*args)
            raise Stopped
        return run


STEP = st.tuples(
    st.sampled_from("ab"),                                # which of two that opened the folder
    st.integers(0, 3),                                    # rows to append
    st.sets(st.integers(0, 7), max_size=2),               # which rows to remove, of those that are there
    st.integers(0, 16),                                   # operation at which it is stopped; 0: none
    st.sampled_from(["before", "half", "after"]),
)


@given(steps=st.lists(STEP, min_size=1, max_size=6))
def test_any_steps_by_two_writers_with_stops(tmp_path_factory, steps):
    "Each step is done as a whole or not at all, whoever does it, and whatever the other knew"
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        create_store(f"{folder}/kept", WIDTH)
        writers = {name: Store(f"{folder}/kept") for name in "ab"}
        held, n_rows = {}, 0
        for name, n, gone, stop, how in steps:
            gone = [place for i, place in enumerate(held) if i in gone]
            rows, digests, labels, facts = batch(n_rows, n)
            after = {place: row for place, row in held.items() if place not in gone}
            after |= {n_rows + i: (digests[i], rows[i].tobytes()) for i in range(n)}
            with pytest.MonkeyPatch.context() as patch:
                for module in (store, files): patch.setattr(module, "os", StoppingOs(stop, how))
                with suppress(Stopped): writers[name].append(rows, digests, labels, facts, replacing=gone)
            seen = Store(f"{folder}/kept")
            seen.check()
            numbers = [seen.rows[place].tobytes() for place in seen.places]
            found = dict(zip(seen.places.tolist(), zip(seen.digests(seen.places), numbers)))
            assert found == after or stop and found == held
            held, n_rows = found, len(seen.records)
