"""Kill a training with SIGKILL in the middle of an epoch, resume it in another process, and compare every bit.

    python examples/resume.py

Three processes train with shuffling, dropout, augmentation and averaged weights: one without interruption; one that is killed by
the operating system at step 137; and one that resumes from the newest checkpoint of the killed one: that of step 120, or that of
step 100 if the disk was slow and the checkpoint of step 120 was still being written in the background when the process was killed.

Expected last line: ``bitwise equal after kill -9 at step 137: True``
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import fnlight as fl

KILL_AT = 137  # with 63 steps an epoch: within the third


class NoisyPoints(Dataset[tuple[Tensor, Tensor]]):
    """2,000 points in the plane, the side of a spiral on which each is, and new noise each time a point is read."""

    def __init__(self) -> None:
        self.points = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
        angle = torch.atan2(self.points[:, 1], self.points[:, 0]) + 2 * self.points.norm(dim=1)
        self.sides = (angle.sin() > 0).long()

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index] + 0.05 * torch.randn(2), self.sides[index]


def train_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def make_task() -> fl.Task:
    """The same task in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 2))
    return fl.Task(model, train_step, configure_optimizers=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3))


def kill_at(step: int) -> Callable[[fl.state.Record], None]:
    """A sink is any function of a record; this one kills its own process when a certain step is logged."""

    def sink(record: fl.state.Record) -> None:
        if record.step == step:
            os.kill(os.getpid(), signal.SIGKILL)  # no handler runs, and nothing is flushed

    return sink


def train(dir: str, killed: bool) -> None:
    """Train for three epochs, or resume from the folder; sinks have no influence on the training."""
    sinks = {"sinks": kill_at(KILL_AT), "log_every": fl.steps(1)} if killed else {}
    config = fl.FitConfig(max_epochs=3, ema=0.99, dir=dir, save_every=fl.steps(20), resume=True, progress=False, **sinks)
    fl.fit(fl.TrainState.create(make_task(), seed=0), DataLoader(NoisyPoints(), batch_size=32, shuffle=True), config)


def in_another_process(*args: str) -> int:
    """Run this script as a child and give its exit status."""
    return subprocess.run([sys.executable, __file__, *args], check=False).returncode


def main() -> None:
    """Train without and with interruption, and compare."""
    with tempfile.TemporaryDirectory() as root:
        calm, rough = f"{root}/calm", f"{root}/rough"
        assert in_another_process(calm) == 0
        status = in_another_process(rough, "--kill")
        print(f"the killed process ended with status {status}, and left {fl.load(rough, make_task())}")
        assert in_another_process(rough) == 0
        one, two = fl.load(calm, make_task()), fl.load(rough, make_task())
        print(f"the resumed process ended with {two}")
        tensors = ("params", "buffers", "opt_state")
        same = one.progress == two.progress and all(fl.tensors.equal(getattr(one, part), getattr(two, part)) for part in tensors)
        same = same and fl.tensors.equal(one.memory["ema"], two.memory["ema"])
    print(f"bitwise equal after kill -9 at step {KILL_AT}: {same and status == -signal.SIGKILL}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1], killed="--kill" in sys.argv)
    else:
        main()
