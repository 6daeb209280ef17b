"""Test every reader of files with hostile inputs: python scripts/fuzz.py [--examples 200000] [--seed 1]

Runs the property tests of the suite with this many inputs in all, and prints the number of inputs of each test. A
reader may read a file, or refuse it with `ValueError` or `OSError`. Anything else counts as outside, as does a process,
a socket or code that is started. `scripts/kills.py` tests kills and concurrent commands."""
import argparse
import os
import random
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = "hostile", "files", "foreign", "methods", "records", "search", "store", "untrusted"
FILES = [f"test_{name}.py" for name in NAMES]
TRIED = re.compile(r"- (\d+) passing(?: examples?)?, (\d+) failing")
TEST = re.compile(r"^tests/(test_\w+\.py::\S.*):$", flags=re.M)


def pytest(*args: str, **env) -> str:
    "Run the property tests and return their output"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "hypothesis", *args]
    files = [f"tests/{name}" for name in FILES if (ROOT/"tests"/name).exists()]
    done = subprocess.run([*command, *files], cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    return done.stdout


def tried(output: str) -> dict[str, tuple[int, int]]:
    "Count inputs with allowed and other outcomes, by property"
    parts, found = TEST.split(output)[1:], {}
    for name, statistics in zip(parts[::2], parts[1::2]):
        counts = [tuple(map(int, pair)) for pair in TRIED.findall(statistics)]
        if counts: found[name] = tuple(map(sum, zip(*counts)))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200_000, help="number of inputs in all")
    parser.add_argument("--seed", type=int, help="seed of all inputs; random by default")
    parser.add_argument("--processes", type=int, default=1, help="number of processes")
    args = parser.parse_args(argv)
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(2**32)
    show = "--hypothesis-show-statistics", f"--hypothesis-seed={seed}"
    share = f"--numprocesses={args.processes}", "--dist=worksteal"
    n_properties = len(tried(pytest(*show, LPS_EXAMPLES="1")))
    each = max(1, args.examples//n_properties)
    print(f"{n_properties} properties, {each} inputs each, --hypothesis-seed={seed}", flush=True)
    output = pytest(*show, *share, LPS_EXAMPLES=str(each))
    counts = tried(output)
    for name, (within, outside) in counts.items(): print(f"{within + outside:8} tried {outside:4} outside  {name}")
    within, outside = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    print(f"{within + outside:8} tried {outside:4} outside  in all; {output.strip().splitlines()[-1]}")
    return 1 if outside or " failed" in output else 0


if __name__ == "__main__": sys.exit(main())
