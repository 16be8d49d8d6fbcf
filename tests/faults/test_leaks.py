"""A process that runs for weeks leaks nothing; `leaks.py` is the long form."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_is_gathered_over_many_predictions_runs_and_saves():
    """Resident memory is flat, and no file, thread, process, handler or open file is left."""
    command = [sys.executable, "tests/faults/leaks.py", "--predict=3000", "--fits=30", "--saves=40", "--background=30", "--loads=40"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("resident memory") == 5
    assert done.stdout.endswith("nothing has leaked\n")
