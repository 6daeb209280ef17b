"""A sample of the kills and concurrent commands of scripts/kills.py; with --slow all of them"""
import os
import subprocess
import sys

import pytest
from conftest import ROOT


def run_kills(*args):
    "Run the script in a process; return its exit code and output"
    command = [sys.executable, str(ROOT/"scripts/kills.py"), *args]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_some_kills_and_concurrent_commands():
    code, output = run_kills("--n", "16", "--pairs", "8", "--seed", os.environ["LPS_SEED"])
    assert code == 0 and "16 kills, 0 faults" in output and "8 pairs of commands at once, 0 faults" in output, output


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_thousand_kills():
    code, output = run_kills()
    assert code == 0 and "1000 kills, 0 faults" in output and "200 pairs of commands at once, 0" in output, output
