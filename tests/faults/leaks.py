"""A program: repeat one action many times in a process, and measure which resources remain afterwards.

``python tests/faults/leaks.py`` does each a hundred thousand or a thousand times, ``--fits 20`` as often as it is told; it prints a table and ends with 1 if anything has leaked.
"""

import argparse
import gc
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import weakref
from itertools import islice
from pathlib import Path

import torch

from fnlight import JSONL, FitConfig, TrainState, fit, last, load, predict, restore, save, steps
from fnlight.testing import tiny_batches, tiny_task

PAGE = os.sysconf("SC_PAGE_SIZE")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
ALLOWED = 4 << 20
"""Bytes by which the resident memory may end above where it stood once all was warm: less than one object a round."""


def resident():
    """Bytes of the process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def held(folder):
    """What a process must not gather: open files, threads, children, handlers, files."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    return {
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "children": len(children.read_text().split()) if children.exists() else len(multiprocessing.active_children()),
        "signal handlers": sum(signal.getsignal(s) not in (signal.SIG_DFL, signal.default_int_handler) for s in SIGNALS),
        "log handlers": len(logging.getLogger().handlers),
        "gc callbacks": len(gc.callbacks),
        "files": sum(len(names) for _, _, names in os.walk(folder)),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
    }


def predicting(folder):
    """Batches of one endless prediction."""
    state, batch = TrainState.create(tiny_task()), tiny_batches(num_batches=1)[0]
    outputs = predict(state, [batch] * 1_000_000)
    return lambda n: [None for _ in islice(outputs, n)]


def fitting(folder):
    """Whole runs with checkpoints, a log and an evaluation, each in the place of the one before."""
    task, data = tiny_task(), tiny_batches()

    def once():
        for name in os.listdir(folder):
            os.system(f"rm -r {folder}/{name}")  # a path of our own
        config = FitConfig(max_epochs=2, dir=folder, sinks=JSONL(f"{folder}/log.jsonl"), log_every=steps(2), device="cpu", progress=False)
        state = fit(TrainState.create(task), data, config)
        return weakref.ref(state.store.module)

    def many(n):
        refs = [once() for _ in range(n)]
        gc.collect()
        assert not any(ref() for ref in refs), "the model of a run that is over is still held"

    return many


def saving(folder):
    """Checkpoints over one another."""
    state = TrainState.create(tiny_task())

    def many(n):
        for _ in range(n):
            save(state, os.path.join(folder, "state"))

    return many


def saving_in_the_background(folder):
    """Checkpoints next to one another, written beside the training, with those before deleted: ten in each run, and its last state."""
    state = TrainState.create(tiny_task())
    run = FitConfig(
        max_steps=11,
        dir=os.path.join(folder, "run"),
        save_every=steps(1),
        keep=last(2),
        save_in_background=True,
        device="cpu",
        progress=False,
    )

    def many(n):
        for _ in range(n // 10):
            os.system(f"rm -rf {folder}/run")  # as above
            fit(state, tiny_batches(), run)

    return many


def loading(folder):
    """States read from a checkpoint, new ones and beside one that is there."""
    state = TrainState.create(tiny_task())
    path = save(state, os.path.join(folder, "state"))

    def many(n):
        for _ in range(n // 2):
            load(path, state.task)
            restore(path, like=state)

    return many


KINDS = {
    "predict": (predicting, "batches predicted", 100_000),
    "fits": (fitting, "fits", 1_000),
    "saves": (saving, "saves", 1_000),
    "background": (saving_in_the_background, "saves in the background", 1_000),
    "loads": (loading, "loads", 1_000),
}
"""What is done, what it is called, and how often in the long form."""


def measured(kind, count):
    """Do it a tenth as often to warm up, look, do it, and look again; a line of a table, and what has leaked."""
    make, what, _ = KINDS[kind]
    with tempfile.TemporaryDirectory(prefix="leaks-") as folder:
        work = make(folder)
        work(max(count // 10, 20))
        before, bytes_before = held(folder), resident()
        work(count)
        after, grown = held(folder), resident() - bytes_before
    leaked = [f"{name}: {before[name]} became {after[name]}" for name in before if after[name] > before[name]]
    leaked += [f"resident memory grew by {grown:,} bytes"] if grown > ALLOWED else []
    return (
        f"{count:8,} {what}: resident memory {grown / 2**20:+.2f} MiB of {bytes_before / 2**20:.0f}, {', '.join(f'{v} {k}' for k, v in after.items())}",
        leaked,
    )


def main():
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for kind, (_, what, often) in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, default=often, help=what)
    given = vars(parser.parse_args())
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory(prefix="leaks-temporary-") as temporary:
        tempfile.tempdir = temporary
        for kind, count in given.items():
            if count:
                line, leaked = measured(kind, count)
                print(line, flush=True)
                found += leaked
        tempfile.tempdir = None
    print("\n".join(found) or "nothing has leaked")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
