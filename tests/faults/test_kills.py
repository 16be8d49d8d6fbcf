"""Real processes, killed at every kind of instant of a save and at random times; `campaign.py` is the long form."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("temporary", ["the same file system", "another file system"])
def test_nothing_is_lost_when_a_run_is_killed(tmp_path, temporary):
    """The newest sound checkpoint loads, nothing that was saved is missing, and the resumed run and its log are bitwise the uninterrupted ones."""
    other = Path("/dev/shm")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if temporary == "another file system":
        if not os.access(other, os.W_OK) or other.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is no second file system")
        environment["TMPDIR"] = str(other)
    how = {
        "the same file system": ("--kills=20", "--runs=3", "--failures=20"),
        "another file system": ("--kills=8", "--runs=1", "--failures=0", "--seed=1"),
    }[temporary]
    command = [sys.executable, "tests/faults/campaign.py", *how, f"--dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = [int(n) for n in re.findall(r"^ *([0-9]+) killed (?:before|after|half-way)", done.stdout, re.M)]
    assert sum(tried) == int(how[0].partition("=")[2])
    assert re.search(f"^ +0 files left in the temporary folder, which is on {temporary.removesuffix(' file system')}", done.stdout, re.M), (
        done.stdout
    )
    assert list(tmp_path.iterdir()) == []
