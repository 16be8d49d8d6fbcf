"""Workers of a loader end with the process that they read for, however and whenever it dies, and their own death is reported."""

import os
import select
import signal
import sys
import threading
from itertools import islice
from multiprocessing import get_context

import pytest
from torch.utils.data import DataLoader, Dataset

from fnlight import TrainState, apply, grad, pipe, run
from fnlight.data.workers import follow, owner
from fnlight.errors import LoaderError
from fnlight.runtime import worker_death
from fnlight.testing import tiny_batches, tiny_task
from tests.faults.processes import in_a_child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")


class Stuck(Dataset):
    """Samples of which none ever comes; who reads one says so through a named pipe."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 64

    def __getitem__(self, index):
        with open(self.path, "w") as pipe:
            pipe.write(f"{os.getpid()}\n")
        signal.pause()


def read_on(path, method):
    """Read from workers until one is killed."""
    workers = {"num_workers": 2, "multiprocessing_context": method}
    task = tiny_task()
    step = pipe(task.train_step, grad(), apply())
    list(run(step, TrainState.create(task), DataLoader(Stuck(path), batch_size=4, shuffle=True, **workers)))


def ended(pid, seconds=20):
    """Wait until a process is no more; say whether it came to that."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path, method):
    """SIGKILL of the process that trains, while its workers are stuck in the user's own code: they are gone at once."""
    path = tmp_path / "pids"
    os.mkfifo(path)
    held = os.open(path, os.O_RDWR)  # so that nobody waits for the other end
    parent = os.fork()
    if parent == 0:
        try:
            read_on(path, method)
        finally:
            os._exit(1)
    try:
        pids = set()
        while len(pids) < 2:
            assert select.select([held], [], [], 60)[0], f"only {pids} have begun to read"
            pids |= {int(line) for line in os.read(held, 4096).split()}
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        os.close(held)
    left = [pid for pid in pids if not ended(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)  # they would keep whoever waits for the end of this test's output
    assert not left


def test_a_worker_whose_parent_is_dead_already_does_not_begin():
    """A parent that dies before it can be watched is noticed all the same."""
    assert in_a_child(follow, 1 << 22)[0] == -signal.SIGKILL
    assert in_a_child(follow, os.getpid())[0] == 0
    assert in_a_child(follow, None)[0] == 0


def test_only_a_parent_that_lasts_is_followed(monkeypatch):
    """The system watches a thread: one that ends before its process would take workers along that are still needed."""
    assert owner(get_context("fork")) == owner(get_context("spawn")) == os.getpid()
    assert owner(get_context("forkserver")) is None
    found = []
    thread = threading.Thread(target=lambda: found.append(owner(get_context("fork"))))
    thread.start()
    thread.join()
    assert found == [None]
    monkeypatch.setattr(sys, "platform", "darwin")
    assert owner(None) is None


def test_the_death_of_a_worker_is_told_wherever_it_is_noticed():
    """torch raises in a signal's handler, in whatever runs at that moment: the run ends with the error that says what happened."""
    task = tiny_task()

    def interrupted(model, batch):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    steps = run(pipe(interrupted, grad(), apply()), TrainState.create(task), tiny_batches())
    with pytest.raises(LoaderError, match=r"DataLoader worker \(pid 7\) is killed by signal: Killed: this worker process loaded data"):
        list(islice(steps, 1))
    assert worker_death(RuntimeError("something else")) is None
    assert worker_death(ValueError("DataLoader worker (pid 7) died")) is None
    unexpected = RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")
    for cause, said in (
        (EOFError(), "exited unexpectedly: this worker process"),
        (RuntimeError("worker 7 was killed."), "worker 7 was killed: this worker process"),
    ):
        unexpected.__cause__ = cause
        assert said in str(worker_death(unexpected))
