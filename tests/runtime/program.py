"""A program: runs with workers, each in a group of its own that is sent a signal. Argument: a folder; prints how each ended."""

import os
import select
import signal
import sys
from pathlib import Path

import attrs
import torch
from torch.utils.data import DataLoader, Dataset

import fnlight as fl
from fnlight.checkpoint import newest, places
from fnlight.testing import tiny_batches, tiny_task, trees_equal

STEP = 3


def heard(number):
    """Go on once a signal has come; it may come at any time."""
    while signal.getsignal(number).__self__.received is None:
        os.sched_yield()


class Data(Dataset):
    """Samples that are read in workers; from one on, a worker waits for ever if it is told to."""

    def __init__(self, hangs_at=None):
        self.x, self.y = tiny_batches(num_batches=1, batch_size=24)[0]
        self.hangs_at, self.told = hangs_at, None

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if self.hangs_at is not None:
            os.write(self.told, b".")
            select.select([], [], [], 1.0)
        return self.x[index], self.y[index]


def loader_of(data):
    return DataLoader(data, batch_size=4, shuffle=True, num_workers=2, multiprocessing_context="fork")


def train(folder, told=None, data=None, resume=False, twice=False, deadline=None):
    """Train; at a step, tell the parent, and go on once its signal has come."""
    task, calls = tiny_task(), []

    def train_step(model, batch):
        calls.append(1)
        if told is not None and len(calls) == STEP:
            os.write(told, b".")
            heard(signal.SIGTERM)
            while twice:
                os.write(told, b".")
                select.select([], [], [], 0.01)
        return task.train_step(model, batch)

    data = data or Data()
    data.told = told
    config = fl.FitConfig(
        max_epochs=2, ema=0.5, dir=folder, save_every=fl.steps(1), resume=resume, device="cpu", progress=False, signals=True,
        signals_deadline=deadline,
    )  # fmt: skip
    return fl.fit(fl.TrainState.create(attrs.evolve(task, train_step=train_step), seed=4), loader_of(data), config)


def predict(told):
    def predict_step(model, batch):
        os.write(told, b".")
        heard(signal.SIGTERM)
        return model(batch[0])

    state = fl.TrainState.create(attrs.evolve(tiny_task(), predict_step=predict_step), seed=4)
    with fl.Signals() as signals:
        list(fl.predict(state, loader_of(Data()), signals=signals))


def stuck_in_a_save(folder, told):
    """From the second checkpoint on, a save never ends."""
    state = train(folder / "before", data=Data())

    def forever(*_):
        os.write(told, b".")
        while True:
            signal.pause()

    with fl.Signals(deadline=1):
        places.Folder.write = forever
        fl.save(state, folder / "before" / "checkpoints" / "step-00000099")


def signalled(fn, number, times=1):
    """How a process group ended that ran a function, and was sent a signal each time it asked for one."""
    asked, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.close(asked)
        try:
            fl.main(lambda: fn(told))
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)
        except BaseException as error:  # noqa: BLE001  # a child must not go on as its parent
            print(f"Traceback: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
    os.close(told)
    for _ in range(times):
        os.read(asked, 1)
        os.killpg(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(asked)
    return code


def resumed(folder, whole):
    state = train(folder, resume=True)
    same = trees_equal(dict(state.params), dict(whole.params)) and trees_equal(state.memory["ema"], whole.memory["ema"])
    return "resumed" if same and state.stopped == whole.stopped else f"differs: {state}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    root = Path(sys.argv[1])
    whole = train(root / "whole")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        name = signal.Signals(number).name
        code = signalled(lambda told, name=name: train(root / name, told), number)
        step = fl.load(root / name, tiny_task()).progress.step
        print(name, code, resumed(root / name, whole) if step == STEP else f"saved step {step}", flush=True)
    code = signalled(lambda told: train(root / "waiting", told, Data(hangs_at=0)), signal.SIGTERM)
    print("waiting", code, resumed(root / "waiting", whole), flush=True)
    print("predict", signalled(predict, signal.SIGTERM), flush=True)
    print("twice", signalled(lambda told: train(root / "twice", told, twice=True), signal.SIGINT, times=2), flush=True)
    code = signalled(lambda told: stuck_in_a_save(root / "deadline", told), signal.SIGTERM)
    stands = fl.load(newest(root / "deadline" / "before"), tiny_task()).progress.step == whole.progress.step
    print("deadline", code, "the checkpoint before stands" if stands else "lost", flush=True)
    print("done", signalled(lambda told: os.close(told) or train(root / "done"), signal.SIGCONT, times=0), flush=True)
