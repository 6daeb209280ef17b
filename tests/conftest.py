"""What the tests share: a copy of the repository to write in, and options for slow cells"""
import shutil
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "_docs", "_proc", "build", "dist", "runs", "__pycache__", ".pytest_cache", ".ipynb_checkpoints", "*.egg-info")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the notebook cells flagged `#| slow`")


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
