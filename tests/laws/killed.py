"""A program: train in processes that are killed, each at another instant, then go on. Argument: a folder; prints how each ended."""

import os
import signal
import sys
from pathlib import Path

import attrs
import torch

from fnlight import FitConfig, TrainState, fit, save, steps
from fnlight.testing import tiny_batches, tiny_task

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
"""What a save is made of, as the system sees it."""

MANY = 1 << 60


class Countdown:
    """Kill this process at the n-th of the calls that change files."""

    def __init__(self, left):
        self.left = left
        for name in CALLS:
            setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, call):
        def counting(*args, **options):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return counting


def train(folder, resume, task=None):
    config = FitConfig(max_epochs=2, ema=0.5, dir=folder, save_every=steps(1), resume=resume, device="cpu", progress=False)
    return fit(TrainState.create(task or tiny_task(), seed=4), tiny_batches(), config)


def in_a_child(fn):
    """How a process ended that ran a function: 0, or minus the signal."""
    child = os.fork()
    if child == 0:
        fn()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_in_a_save(folder, left):
    def run():
        Countdown(left)
        train(folder, resume=False)

    return run


def dying_in_a_step(folder, count):
    task, calls = tiny_task(), []

    def train_step(model, batch):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return task.train_step(model, batch)

    return lambda: train(folder, resume=False, task=attrs.evolve(task, train_step=train_step))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    root = Path(sys.argv[1])
    train(root / "first", resume=False)  # what torch imports and makes in a first step is not counted: those that are killed do without
    counter = Countdown(MANY)
    whole = train(root / "uninterrupted", resume=False)
    calls = MANY - counter.left
    save(whole, root / "whole")
    saves = [calls * part // 13 for part in range(1, 13)] + [calls - 1, calls]
    instants = [(dying_in_a_step, 1), (dying_in_a_step, 5), *((dying_in_a_save, n) for n in saves)]
    for at, (dying, when) in enumerate(instants):
        folder = root / f"killed-{at}"
        print(in_a_child(dying(folder, when)), flush=True)
        train(folder, resume=True)
