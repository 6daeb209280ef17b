"""Shared by the tests: a copy of the repository to write in, options for slow tests, and settings of the fuzzing"""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "_docs", "_proc", "build", "dist", "runs", "__pycache__",
                                  ".pytest_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints", "*.egg-info")


EXAMPLES = int(os.environ.get("LPS_EXAMPLES", 100))  # inputs that each property is tried with
NOISY = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
settings.register_profile("lps", max_examples=EXAMPLES, deadline=None, print_blob=True, suppress_health_check=NOISY)
settings.load_profile("lps")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run slow tests and slow cells of notebooks")


def pytest_configure(config):
    "Use one seed for every property and process of a run: LPS_SEED or --hypothesis-seed; the header shows it"
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")
    os.environ.setdefault("LPS_SEED", "0")
    if config.option.hypothesis_seed is None: config.option.hypothesis_seed = os.environ["LPS_SEED"]


def pytest_report_header(config):
    return f"fuzzing: {EXAMPLES} examples a property, --hypothesis-seed={config.option.hypothesis_seed}"


# The tests of a file share slow fixtures, so one process runs them; experiments share a model set. Long tests are
# units of their own or come early, and notebooks come last, so that both processes end at the same time
TOGETHER = "test_experiment_runs_small"
ALONE = [
    "test_library_notebook[tutorials/", "test_demo_from_start_to_end", "test_one_command_runs", "test_thirty_kills",
    "test_ctrl_c_keeps", "test_kernels_stay",
]
EARLY = [
    *ALONE, TOGETHER, "test_site.py", "test_cluster.py", "test_zoo.py", "test_survival.py", "test_cli.py",
    "test_align.py", "test_bounds.py", "test_second_order.py", "test_transfer.py", "test_files.py",
]
LATE = "test_notebooks.py"


def unit_of(nodeid: str) -> str:
    "Return the name of the unit that one process runs: a test, or all tests of a file"
    if TOGETHER in nodeid: return TOGETHER
    alone = any(name in nodeid for name in [*ALONE, LATE])
    return nodeid if alone else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Group tests by name and in order; `xdist_group` is lost between xdist 3.8 and pytest 9.2"
    if config.option.dist != "loadgroup": return None
    from xdist.scheduler import LoadScopeScheduling
    class InOrder(LoadScopeScheduling):
        def _split_scope(self, nodeid): return unit_of(nodeid)
    config.option.loadscopereorder = False
    return InOrder(config, log)


def place(item) -> int:
    "Return the position of a test: early, in between, or late"
    others = len(EARLY) + (LATE in item.nodeid)
    return next((i for i, name in enumerate(EARLY) if name in item.nodeid), others)


def pytest_collection_modifyitems(config, items):
    items.sort(key=place)
    if config.getoption("--slow"): return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords: item.add_marker(skip)


def heed_ctrl_c():
    "Let a process be interrupted: the background jobs of a shell ignore Ctrl-C, and so would their children"
    signal.signal(signal.SIGINT, signal.SIG_DFL)


BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="session")
def browser():
    path = os.environ.get("CHROME") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        names = ", ".join(BROWSERS)
        pytest.skip(f"no browser: none of {names} is on PATH (install Chromium, or name one in the variable CHROME)")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=SWITCHES)
        yield browser
        browser.close()


def copy_of_repo(dest: Path) -> Path:
    "Copy the repository as it is on disk, without the files that git ignores"
    return Path(shutil.copytree(ROOT, dest, ignore=LEFT_OUT, symlinks=True))


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> Path:
    "Return a copy of the repository in which notebooks run, so that they write nothing into the tree"
    return copy_of_repo(tmp_path_factory.mktemp("notebooks")/"lps")


@pytest.fixture(scope="session")
def warm_kernels(tmp_path_factory):
    """Fork the kernels of notebooks from one server that has imported everything

    This also holds in processes that are started from here. Without `os.fork`, kernels start as usual.
    """
    if not hasattr(os, "fork"): return (yield)
    script, spec = str(Path(__file__).with_name("warm.py")), tmp_path_factory.mktemp("jupyter")/"kernels/python3"
    with tempfile.TemporaryDirectory() as short, pytest.MonkeyPatch.context() as mp:  # a socket's path is limited
        command = [sys.executable, script, "serve", f"{short}/kernels"]
        argv = [sys.executable, "-I", "-S", script, "kernel", f"{short}/kernels", "-f", "{connection_file}"]
        spec.mkdir(parents=True)
        (spec/"kernel.json").write_text(json.dumps(dict(argv=argv, display_name="Python 3", language="python")))
        mp.setenv("JUPYTER_PATH", str(spec.parent.parent), prepend=os.pathsep)
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout.readline() == "ready\n", "the server of kernels did not start"
            yield
            server.stdin.close()


@pytest.fixture(scope="session")
def processes():
    "Return a pool of two processes, started once for all tests"
    from lps.core.jobs import worker_pool
    with worker_pool(2) as executor: yield executor


@pytest.fixture(scope="session", autouse=True)
def clean_env(tmp_path_factory):
    "Keep downloads and caches out of the user's folders"
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv("LPS_HOME", str(tmp_path_factory.mktemp("lps_home")))
        mp.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
        yield
