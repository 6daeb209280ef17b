"""No figure changes unnoticed: what every result file has measured is kept as a digest beside the tests

After a result was knowingly measured again: python tests/test_figures_unchanged.py table1-digits.json"""
import copy
import hashlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT/"tests/result_numbers.json"
FILES = sorted(ROOT.glob("results/*.json"))
ORIGIN = {"versions", "machine", "commit", "time", "sources"}  # says where the numbers come from, and is none of them


def numbers_digest(record: dict) -> str:
    "A hash of everything in a record that was measured or chosen"
    measured = {key: value for key, value in record.items() if key not in ORIGIN}
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:32]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_result_file_has_a_digest():
    assert sorted(read(KEPT)) == [p.name for p in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_numbers_are_those_that_were_kept(path):
    assert numbers_digest(read(path)) == read(KEPT)[path.name], f"{path.name} says other numbers than before"


def test_the_digest_sees_the_last_digit_and_not_the_clock():
    record = read(ROOT/"results/table1-modelset500-cifar100-epoch80.json")
    later = record | dict(time="2030-01-01T00:00:00", commit="abc", sources="0123")
    assert numbers_digest(later) == numbers_digest(record)
    other = copy.deepcopy(record)
    other["runs"]["lps"]["top-1"][0] += 1e-4
    assert numbers_digest(other) != numbers_digest(record)


def keep(names: list[str]):
    "Keep the digests of result files that were knowingly measured again"
    kept = read(KEPT) if KEPT.exists() else {}
    for name in names: kept[name] = numbers_digest(read(ROOT/"results"/name))
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__": keep(sys.argv[1:])
