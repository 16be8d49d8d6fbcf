"""SLURM's own commands start the processes, end them and put the job back; where there is a cluster with two idle nodes."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parallel.launch import ROOT

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
TRAIN = """
import sys
import torch
from torch.nn import functional as F
import fnlight as fl
from fnlight.testing import tiny_batches, tiny_task

def main():
    config = fl.FitConfig(max_steps=int(open(sys.argv[1]).read()), dir=sys.argv[2], resume=True, signals=True, save_every=fl.at_end, sinks=fl.JSONL("log.jsonl"), progress=False)
    return fl.fit(fl.TrainState.create(tiny_task(), seed=0), fl.TensorLoader((torch.arange(640.0).view(160, 4) / 640, torch.arange(160) % 3), 8), config)

if __name__ == "__main__":
    fl.main(main)
"""


def idle():
    """How many nodes wait for work."""
    if shutil.which("sinfo") is None:
        return 0
    said = subprocess.run(["sinfo", "--noheader", "--states=idle", "--format=%D"], capture_output=True, text=True, check=False).stdout
    return sum(map(int, said.split()))


pytestmark = pytest.mark.skipif(idle() < 2, reason="needs a SLURM cluster with two idle nodes")


def said(*command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def until(condition):
    """Ask again and again, which means a command of SLURM each time."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "not within two minutes"


@pytest.mark.parametrize("example", ["ddp.py", "fsdp.py"])
def test_srun_starts_what_one_process_runs_alone(example, tmp_path):
    """Four tasks on two nodes meet by what SLURM says of them, and end as one process does."""
    for folder, start in (("alone", ()), ("together", ("srun", "--nodes=2", "--ntasks=4"))):
        (tmp_path / folder).mkdir()
        out = said(*start, sys.executable, ROOT / "examples" / example, cwd=tmp_path / folder).splitlines()
        assert [float(line.split()[-1]) >= 0.95 for line in out if "accuracy" in line or "share" in line] == [True]


def test_a_job_that_runs_out_of_time_goes_on_where_it_stood(tmp_path):
    """The job of docs/signals.md: SIGUSR1 ends all tasks at one step, the job is put back, and goes on from there."""
    page = (ROOT / "docs" / "signals.md").read_text(encoding="utf-8")
    script = next(block for block in page.split("```") if block.startswith("sh\n#!/bin/bash") and "ntasks-per-node" in block)
    steps, run = tmp_path / "steps", tmp_path / "run"
    steps.write_text("2000000", encoding="utf-8")
    (tmp_path / "job.sh").write_text(script.removeprefix("sh\n").replace("train.py", "train.py steps run"), encoding="utf-8")
    (tmp_path / "train.py").write_text(TRAIN, encoding="utf-8")
    job = said("sbatch", "--parsable", "job.sh", cwd=tmp_path)

    try:
        until(lambda: Path(tmp_path, "log.jsonl").exists() and Path(tmp_path, "log.jsonl").read_text(encoding="utf-8").count("\n") > 2)
        said("scancel", "--signal=USR1", job, cwd=tmp_path)
        until(lambda: f" {job} " in said("squeue", "--states=PD", cwd=tmp_path))
        (first,) = (run / "checkpoints").glob("step-*")
        last = int(first.name.removeprefix("step-")) + 100
        assert last > 100
        steps.write_text(str(last), encoding="utf-8")
        # it would wait for two minutes; begun again within the second in which it ended, SLURM would take it for the old one
        said("scontrol", "update", f"JobId={job}", "StartTime=now+5", cwd=tmp_path)
        until((run / "checkpoints" / f"step-{last:08d}").exists)
    finally:
        subprocess.run(["scancel", job], capture_output=True, check=False)
