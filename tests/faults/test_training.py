"""Faults inside of a training: workers that die, evaluations and steps that fail, clocks that jump."""

import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from itertools import islice, pairwise
from pathlib import Path

import attrs
import pytest
import torch
from torch.utils.data import DataLoader

from fnlight import Loaders, TrainState, apply, checkpoints, fit, grad, load, max_time, microbatch, newest, pipe, run, steps, stop_when
from fnlight.checkpoint import step_path
from fnlight.errors import FaultWarning, LoaderError, NonFiniteError
from fnlight.testing import assert_trees_equal, tiny_batches, tiny_task
from tests.faults.processes import in_a_child
from tests.faults.training import Noisy, make_config, make_loaders, make_task, train

rollback_module = sys.modules["fnlight.nonfinite.rollback"]  # the function has the module's name


class Fatal(Noisy):
    """Samples of which one kills whoever reads it for the second time, once."""

    def __init__(self, count, folder):
        super().__init__(count)
        self.folder = folder

    def __getitem__(self, index):
        if index == 7:
            reads = len(list(self.folder.iterdir()))
            (self.folder / str(reads)).touch()
            if reads == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def assert_goes_on(folder, **options):
    """What is there loads, and the resumed run is bitwise the uninterrupted one."""
    assert_trees_equal(
        train(folder, **options), fit(TrainState.create(make_task(), seed=11), make_loaders(), make_config(folder / "whole"))
    )


@pytest.mark.filterwarnings(
    "ignore:.*unclosed.*:pytest.PytestUnraisableExceptionWarning"
)  # torch raises in a signal's handler: here and there while a socket is opened
@pytest.mark.parametrize("ahead", [True, False])
def test_a_worker_that_is_killed_is_named_and_the_run_resumes(tmp_path, ahead):
    """A loader's worker dies of SIGKILL over the second epoch: the error says which and why, the checkpoints stand, and nothing is lost."""
    (tmp_path / "reads").mkdir()
    workers = {"num_workers": 2, "multiprocessing_context": "fork"}
    loaders = Loaders(train=DataLoader(Fatal(18, tmp_path / "reads"), batch_size=4, shuffle=True, **workers), val=tiny_batches(seed=1))
    with pytest.raises(
        LoaderError, match=r"DataLoader worker \(pid.* (signal: Killed|unexpectedly): this process read data for the run and died"
    ):
        train(tmp_path / "run", loaders=loaders, workers_ahead=ahead)
    assert ahead or load(newest(tmp_path / "run"), make_task()).progress.step >= 4  # ahead: it dies while the first epoch is trained on
    assert_goes_on(tmp_path / "run", loaders=loaders, workers_ahead=ahead)


def test_a_worker_that_dies_while_a_sink_writes_is_not_the_sinks_fault(tmp_path):
    """torch tells of a dead worker in whatever runs: were that taken for a failure of the sink, nobody would know what ended the run."""

    def sink(record):
        pid = multiprocessing.active_children()[0].pid
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # here the news comes; who is gone already has none

    loaders = Loaders(
        train=DataLoader(Noisy(18), batch_size=4, shuffle=True, num_workers=2, multiprocessing_context="fork"), val=tiny_batches(seed=1)
    )
    with pytest.raises(LoaderError, match=r"DataLoader worker \(pid.* signal: Killed: this process read data for the run and died"):
        train(tmp_path / "run", loaders=loaders, sinks=[sink], log_every=steps(1))


def failing_at(nth, fn):
    """A function that fails at its n-th call."""
    calls = []

    def called(model, batch):
        calls.append(1)
        if len(calls) == nth:
            raise ValueError("the metric is not defined for one class")
        return fn(model, batch)

    return called


@pytest.mark.parametrize("nth", [1, 2, 3, 5, 8])
def test_an_evaluation_that_fails_leaves_no_partial_record_and_is_done_in_full_on_resume(tmp_path, nth):
    """Whichever of the three batches of an evaluation fails: the history holds whole evaluations only, the resumed run all of them."""
    task = make_task()
    with pytest.raises(ValueError, match="not defined for one class"):
        train(tmp_path / "run", task=attrs.evolve(task, eval_step=failing_at(nth, task.eval_step)))
    found = newest(tmp_path / "run")
    if found is not None:
        assert [r.step for r in load(found, task).history if "val/loss" in r.metrics] == list(range(2, 2 * ((nth - 1) // 3) + 1, 2))
    assert_goes_on(tmp_path / "run")


@pytest.mark.parametrize("nth", [1, 2, 7, 15])
def test_a_step_that_fails_leaves_the_checkpoint_before_it(tmp_path, nth):
    """An exception in the n-th step: the n - 1 steps before it are there, and going on is going on."""
    task = make_task()
    with pytest.raises(ValueError, match="not defined for one class"):
        train(tmp_path / "run", task=attrs.evolve(task, train_step=failing_at(nth, task.train_step)))
    assert [step for step, _ in checkpoints(tmp_path / "run")][-1:] == ([nth - 1] if nth > 1 else [])
    assert_goes_on(tmp_path / "run")


@pytest.mark.parametrize("k", [1, 4, 9])
def test_a_loss_that_becomes_nan_ends_the_run_before_it_is_saved(tmp_path, k):
    """NaN at step k: the error names the step, and no checkpoint holds what came of it."""
    task, calls = make_task(), []

    def train_step(model, batch):
        calls.append(1)
        loss, metrics = task.train_step(model, batch)
        return (loss * float("nan") if len(calls) == k else loss), metrics

    with pytest.raises(NonFiniteError, match=rf"NaN or infinite at step {k} \("):
        train(tmp_path / "run", task=attrs.evolve(task, train_step=train_step))
    for _, path in checkpoints(tmp_path / "run"):
        state = load(path, task)
        assert state.progress.step < k
        assert all(torch.isfinite(p).all() for p in state.params.values())
    assert_goes_on(tmp_path / "run")


@pytest.mark.parametrize("k", [1, 4, 9])
def test_a_loss_that_becomes_nan_is_left_out_and_the_run_resumes_bitwise(tmp_path, k):
    """With `nonfinite="skip"` the steps whose samples give NaN change nothing, and going on from before, at and behind one is going on."""
    plain = make_task()

    def train_step(model, batch):
        loss, metrics = plain.train_step(model, batch)
        return loss * torch.where(batch[0].sum() > 1.5, float("nan"), 1.0), metrics

    task = attrs.evolve(plain, train_step=train_step)
    whole = train(tmp_path / "whole", task=task, nonfinite="skip")
    assert 0 < int(whole.memory["skip_nonfinite"]["skipped"]) < 10
    assert all(torch.isfinite(p).all() for p in whole.params.values())
    train(tmp_path / "run", task=task, nonfinite="skip", max_epochs=None, max_steps=k)
    assert_trees_equal(train(tmp_path / "run", task=task, nonfinite="skip"), whole)


def dying(instant):
    """Kill this process with SIGKILL: as it is about to go back, or when it has gone back."""
    real, calls = rollback_module.refill, []

    def refill(path, state):
        calls.append(path)
        if instant == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        after = real(path, state)
        if instant == "behind" or len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return after

    return refill


@pytest.mark.parametrize("instant", ["before", "behind", "at the second time"])
def test_a_run_that_is_killed_as_it_goes_back_goes_back_again_when_it_resumes(tmp_path, monkeypatch, instant):
    """With `nonfinite="rollback"` and SIGKILL in the middle of going back: the resumed run is bitwise the uninterrupted one, log and all."""
    plain = make_task()

    def train_step(model, batch):
        loss, metrics = plain.train_step(model, batch)
        return loss * torch.where(batch[0].sum() > 1.5, float("nan"), 1.0), metrics

    options = {"task": attrs.evolve(plain, train_step=train_step), "nonfinite": "rollback", "save_every": steps(2), "max_nonfinite": 20}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FaultWarning)
        whole = train(tmp_path / "whole", **options)
        assert whole.memory["rollback"]["total"] >= 2
        assert all(torch.isfinite(p).all() for p in whole.params.values())
        with monkeypatch.context() as patch:
            patch.setattr(rollback_module, "refill", dying(instant))
            code, told = in_a_child(lambda: train(tmp_path / "run", **options))
        assert code == -signal.SIGKILL, told
        assert_trees_equal(train(tmp_path / "run", **options), whole)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


class Clock(list):
    """Batches, each of which sets a clock to what it is told when it is read, and the later ones forward by a second."""

    def __init__(self, now, *times):
        list.__init__(self, tiny_batches())
        self.now, self.times = now, list(times)

    def __getitem__(self, place):
        self.now = self.times.pop(0) if self.times else self.now + 1.0
        return list.__getitem__(self, place)

    def __call__(self):
        return self.now


def timed(clock, *combinators, count=8):
    task = tiny_task()
    step = pipe(task.train_step, grad(), apply(), *combinators)
    return [state.progress for state, _ in islice(run(step, TrainState.create(task), clock, clock=clock), count)]


def test_a_clock_that_goes_backwards_takes_no_time_back():
    """Seconds never fall, so nothing that is due by time is done twice, and the jump itself counts for nothing."""
    jump = Clock(100.0, 101.0, 102.0, -4000.0, -3999.0, -3998.0)
    assert [p.seconds for p in timed(jump, count=6)] == [1.0, 2.0, 2.0, 3.0, 4.0, 5.0]
    again = Clock(0.0, 1.0, 2.0, 3.0, 0.5, 1.5, 2.5, 3.5)
    progress = timed(again, count=7)
    due = [b.step for a, b in pairwise(progress) if a.seconds // 2 != b.seconds // 2]
    assert due == [2, 5, 7]


def test_a_clock_that_leaps_ahead_ends_a_timed_run_at_a_step():
    """After a leap past `max_time` the step under way is the last one."""
    leap = Clock(0.0, 1.0, 2.0, 90_000.0)
    assert [p.step for p in timed(leap, stop_when(max_time(3600)))] == [1, 2, 3]


@pytest.mark.parametrize("wall", [0.0, 4e9], ids=["1970", "2096"])
def test_nothing_depends_on_the_time_of_day(tmp_path, monkeypatch, wall):
    """With the wall clock set anywhere, even in the middle, checkpoints are ordered by step and a resumed run is the same."""
    half = make_config(tmp_path / "run", max_epochs=None, max_steps=7)
    fit(TrainState.create(make_task(), seed=11), make_loaders(), half)
    monkeypatch.setattr(time, "time", lambda: wall)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        os.utime(path, (wall, wall + hash(path.name) % 100))
    assert newest(tmp_path / "run") == step_path(tmp_path / "run", 7)
    assert_goes_on(tmp_path / "run")


def test_a_step_that_needs_too_much_memory_is_survived_by_a_real_process():
    """Under a limit on its address space a process really runs out of memory: `auto` halves until it fits, and ends where that size ends."""

    def limited():
        torch.set_num_threads(1)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 300_000_000, resource.RLIM_INFINITY))

        def train_step(model, batch):
            wide = batch[0].repeat(1, 2_000_000)  # 32 MB a sample, and as much for its square
            return (model(batch[0]).sum(1) * (1 + 1e-20 * wide.square().sum(1))).square().mean()

        task = tiny_task()
        found = [
            list(islice(run(pipe(train_step, grad(), microbatch(size), apply()), TrainState.create(task), tiny_batches()), 2))[-1][0]
            for size in ("auto", 3)
        ]
        size = found[0].store.memory.pop("microbatch")
        assert_trees_equal(*found)
        return size

    assert in_a_child(limited) == (0, "{'size': 3}")
