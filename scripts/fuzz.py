"""Feed every reader of files with hostile ones, many times: python scripts/fuzz.py [--examples 200000] [--seed 1]

Runs the property tests of the suite with as many inputs in all, and prints how many were tried, test by test. A reader
may take a file or refuse it with `ValueError` or `OSError`; anything else, a process, a socket or code that is started,
counts as outside."""
import argparse
import os
import random
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = [f"test_{name}.py" for name in ("hostile", "files", "foreign", "methods", "records", "search")]
TRIED = re.compile(r"- (\d+) passing(?: examples?)?, (\d+) failing")
TEST = re.compile(r"^tests/(test_\w+\.py::\S.*):$", flags=re.M)


def pytest(*args: str, **env) -> str:
    "Run the property tests; return the output of pytest"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "hypothesis", *args]
    files = [f"tests/{name}" for name in FILES if (ROOT/"tests"/name).exists()]
    done = subprocess.run([*command, *files], cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    return done.stdout


def tried(output: str) -> dict[str, tuple[int, int]]:
    "Inputs within and outside what is allowed, by property"
    parts, found = TEST.split(output)[1:], {}
    for name, statistics in zip(parts[::2], parts[1::2]):
        counts = [tuple(map(int, pair)) for pair in TRIED.findall(statistics)]
        if counts: found[name] = tuple(map(sum, zip(*counts)))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200_000, help="inputs in all")
    parser.add_argument("--seed", type=int, help="of all of them; a new one if not given")
    parser.add_argument("--processes", type=int, default=1, help="that share the properties among them")
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
