"""Several devices, in processes of their own: SPMD holds for a whole process."""

import os
import subprocess
import sys

import pytest
import torch

from fnlight import load
from tests.repo.source import ROOT
from tests.xla.spmd import task


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What one device and four make of the same training."""
    folder = tmp_path_factory.mktemp("spmd")
    started = {}
    for name, devices in {"one": 1, "data": 4, "model": 4}.items():
        environment = {**os.environ, "CPU_NUM_DEVICES": str(devices), "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, "tests/xla/spmd.py", str(folder / name), name]
        started[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for name, process in started.items():
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, f"{name}:\n{output[-4000:]}"
    return folder


@pytest.mark.parametrize("name", ["data", "model"])
@pytest.mark.parametrize("when", ["end", "further"])
def test_four_devices_are_one(name, when, trained):
    """Batches divided, or batches and weights: weights, optimizer memory, averages and history within 1e-5, also after going on from a file."""
    one, four = load(trained / "one" / when, task()), load(trained / name / when, task())
    assert (four.progress, len(four.history)) == (one.progress, len(one.history))
    for parts in ("params", "memory"):
        here, there = getattr(one, parts), getattr(four, parts)
        here, there = (here, there) if parts == "params" else (here["ema"], there["ema"])
        for key, value in here.items():
            torch.testing.assert_close(there[key], value, rtol=1e-5, atol=1e-6)
    for record, other in zip(one.history, four.history, strict=True):
        assert other.metrics == pytest.approx(record.metrics, rel=1e-5)
