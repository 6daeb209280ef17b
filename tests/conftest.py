"""What the tests share: a copy of the repository to write in, options for what is slow, and how much is fuzzed"""
import os
import shutil
import signal
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
    parser.addoption("--slow", action="store_true", help="also run what is flagged slow, cells of notebooks too")


def pytest_configure(config):
    "One seed for every property and process of a run: LPS_SEED or --hypothesis-seed; the header shows it"
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")
    os.environ.setdefault("LPS_SEED", "0")
    if config.option.hypothesis_seed is None: config.option.hypothesis_seed = os.environ["LPS_SEED"]


def pytest_report_header(config):
    return f"fuzzing: {EXAMPLES} examples a property, --hypothesis-seed={config.option.hypothesis_seed}"


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords: item.add_marker(skip)


def heed_ctrl_c():
    "For a process that is to be interrupted: a shell's background jobs ignore Ctrl-C, and so would their children"
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def copy_of_repo(dest: Path) -> Path:
    "The repository as it is on disk, without what git ignores"
    return Path(shutil.copytree(ROOT, dest, ignore=LEFT_OUT, symlinks=True))


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> Path:
    "A copy of the repository that notebooks run in, so that nothing they write lands in the tree"
    return copy_of_repo(tmp_path_factory.mktemp("notebooks")/"lps")


@pytest.fixture(scope="session", autouse=True)
def clean_env(tmp_path_factory):
    "Downloads and caches stay out of the user's own folders"
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv("LPS_HOME", str(tmp_path_factory.mktemp("lps_home")))
        mp.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
        yield
