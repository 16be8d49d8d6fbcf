"""A process is killed during training; torchrun starts all of them again, and they resume from the newest checkpoint.

    python examples/elastic.py

starts ``torchrun --nproc-per-node=2 --max-restarts=1`` on itself. The script needs no code for restarts, only ``resume=True``.
Expected last line: ``attempt 1 ended at step 40``.
"""

import os
import signal
import subprocess
import sys

import torch
from torch import nn
from torch.nn import functional as F

import fnlight as fl

ATTEMPT, RANK = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), int(os.environ.get("RANK", "0"))


def train_step(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def killed(state):
    """A stop rule that never stops: on rank 1, and in the first attempt only, it kills its process, as a failing machine would."""
    if ATTEMPT == 0 and RANK == 1 and state.progress.step == 25:
        os.kill(os.getpid(), signal.SIGKILL)


def main():
    torch.manual_seed(0)
    x = torch.randn(320, 4)
    loader = fl.TensorLoader((x, x.sum(1, keepdim=True)), batch_size=32, shuffle=True)
    task = fl.Task(nn.Linear(4, 1), train_step, configure_optimizers=lambda model: torch.optim.Adam(model.parameters(), lr=0.05))
    config = fl.FitConfig(max_steps=40, stop=killed, dir="runs/elastic", resume=True, save_every=fl.steps(10), progress=False)
    state = fl.fit(fl.TrainState.create(task, seed=0), loader, config)
    if RANK == 0:
        print(f"attempt {ATTEMPT} ended at step {state.progress.step}")


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
        subprocess.run([*torchrun, __file__], check=True)
