"""Start-up of the library and its command against `import torch`: wall time and peak memory, pair by pair

    python benchmarks/startup.py [REPEATS]
    python benchmarks/startup.py --imports

Each row is run in turn with `python -c "import torch"` in processes of their own, so that both meet the same load.
Ratios are taken within a pair; the medians over the pairs are reported. Writes benchmarks/results/startup.json.
With --imports: which packages a query imports, how long each takes, and through which modules of lps it is reached.
"""
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT/"benchmarks/results/startup.json"
LPS = Path(sys.executable).with_name("lps")
GOALS = dict(
    import_lps=dict(added_seconds=0.05),
    help=dict(seconds=0.3),
    query=dict(seconds_ratio=2.0, megabytes_ratio=1.3),
)

MAKE_MODEL = """
import sys
import torch
from lps.nets.resnet import ResNet
torch.manual_seed(0)
torch.save(ResNet(20, 16).state_dict(), sys.argv[1])
"""


def python(code: str) -> list:
    "Return the command that runs some code in a fresh interpreter"
    return [sys.executable, "-c", code]


class Run(NamedTuple):
    "One run of a command: wall time, processor time of its process, peak memory"
    seconds: float
    cpu_seconds: float
    megabytes: float


def measure(command: list) -> Run:
    "Run a command to its end"
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode: raise RuntimeError(f"{' '.join(map(str, command))} exited with {child.returncode}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss/1024)


def compare(command: list, peer: list, repeats: int) -> dict:
    "Run a command and its peer in turn; return medians, and the medians of the ratios within a pair"
    pairs = [(measure(command), measure(peer)) for _ in range(repeats)]
    own = [run for run, _ in pairs]
    result = {}
    for name in Run._fields:
        ratios = [getattr(run, name)/getattr(peer_run, name) for run, peer_run in pairs]
        result[name] = round(statistics.median(getattr(run, name) for run in own), 3)
        result[f"{name}_ratio"] = round(statistics.median(ratios), 2)
        result[f"{name}_ratio_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    added = [run.seconds - peer_run.seconds for run, peer_run in pairs]
    return result | dict(added_seconds=round(statistics.median(added), 3))


def make_model(folder: str) -> Path:
    "Write an untrained ResNet20 into a folder; return its file"
    model = Path(folder)/"model.pt"
    subprocess.run([*python(MAKE_MODEL), model], check=True)
    return model


WATCHED = ["torch", "torchvision", "torch._dynamo", "fastai", "sklearn", "scipy", "scipy.stats", "pandas", "matplotlib",
           "plotly", "numba", "pydantic", "rich", "jinja2"]
IMPORT_LINE = re.compile(r"import time:\s*(\d+) \|\s*(\d+) \|( *)(\S+)")


def import_chains(report: str) -> dict[str, tuple]:
    "Read what `python -X importtime` printed: module → (own and total microseconds, modules that import it)"
    found, above = {}, []
    lines = [IMPORT_LINE.match(line) for line in report.splitlines()]
    for own, total, indent, name in (line.groups() for line in reversed(lines) if line):  # importers come last
        while above and above[-1][0] >= len(indent): above.pop()
        found[name] = int(own), int(total), [importer for _, importer in above]
        above.append((len(indent), name))
    return found


def show_imports(model: Path):
    "Print the packages that a query imports, slowest first"
    code = f"from lps.cli import main; main(['query', 'bundled', '{model}'])"
    report = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True).stderr
    chains = import_chains(report)
    seconds = {}
    for name, (own, *_) in chains.items():
        package = name.partition(".")[0]
        seconds[package] = seconds.get(package, 0) + own/1e6
    for package, taken in sorted(seconds.items(), key=lambda item: -item[1])[:20]: print(f"{taken:6.2f} s  {package}")
    for name in WATCHED:
        if name not in chains: continue
        own = [importer for importer in chains[name][2] if importer.startswith("lps.")]
        print(f"{name} is imported through {' → '.join(own)}")


def main(repeats: int = 5):
    torch, nothing = python("import torch"), python("pass")
    with tempfile.TemporaryDirectory() as folder:
        query = [LPS, "query", "bundled", make_model(folder)]
        for command in (torch, query): measure(command)  # fill the file cache
        rows = dict(
            import_lps=dict(against="nothing") | compare(python("import lps"), nothing, repeats),
            help=dict(against="import torch") | compare([LPS, "--help"], torch, repeats),
            query=dict(against="import torch") | compare(query, torch, repeats),
        )
    for name, row in rows.items(): print(f"{name:12}", ", ".join(f"{key} {value}" for key, value in row.items()))
    from lps.core.files import provenance, write_json
    write_json(RESULT, dict(repeats=repeats, goals=GOALS, rows=rows) | provenance())


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(ROOT)
    if sys.argv[1:] == ["--imports"]:
        with tempfile.TemporaryDirectory() as folder: show_imports(make_model(folder))
    else: main(*map(int, sys.argv[1:]))
