"""Saving while training goes on: one version of the state, one save at a time, no error swallowed, nothing left behind."""

import errno
import os
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import attrs
import pytest
import torch

from fnlight import FitConfig, Loaders, fit
from fnlight.checkpoint import best, best_checkpoint, checkpoints, every, folder, last, load, newest, step_path, verify
from fnlight.errors import CheckpointError, CheckpointWarning, ConfigError, LockedError, NonFiniteError
from fnlight.gradients import grad
from fnlight.loop import checkpoint_every, evaluate_every, run, stop_when
from fnlight.pipe import pipe
from fnlight.state import TrainState
from fnlight.step import apply
from fnlight.testing import assert_trees_equal, tiny_batches, tiny_task
from fnlight.triggers import continuous, epochs, max_epochs, max_steps, minutes, steps
from tests.small_runs import Slow

ROOT = Path(__file__).resolve().parents[2]
TASK = tiny_task()
DATA = tiny_batches()


def created():
    return TrainState.create(TASK, seed=3)


def stepping(*combinators):
    return pipe(TASK.train_step, grad(), apply(), *combinators)


def plain(count):
    """The states of a run that saves nothing, by step."""
    return {state.progress.step: state.copy() for state, _ in islice(run(stepping(), created(), DATA), count)}


def saved(path):
    return [step for step, _ in checkpoints(path)]


def settled(states, count):
    """Take some steps, and wait for the save that is under way."""
    state = list(islice(states, count))[-1][0]
    state.store.run.resources["checkpoint_every"].settle()


class Disk:
    """The `os` module, whose `fsync` waits for a gate where it is not the training that waits, or fails."""

    def __init__(self):
        self.gate, self.reached, self.fails = threading.Event(), threading.Event(), False

    def __getattr__(self, name):
        return getattr(os, name)

    def fsync(self, file):
        if threading.current_thread() is not threading.main_thread():
            self.reached.set()
            if not self.gate.wait(60):
                raise AssertionError("the test never opened the gate")
        if self.fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)


@pytest.fixture
def disk(monkeypatch):
    """A disk that takes until the test says so."""
    disk = Disk()
    monkeypatch.setattr(folder, "os", disk)
    yield disk
    disk.gate.set()


@pytest.fixture(autouse=True)
def _leaves_nothing_open():
    threads = threading.active_count()
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    yield
    assert threading.active_count() == threads
    assert not files or len(os.listdir("/proc/self/fd")) <= files


def test_a_save_is_of_one_version_however_long_it_takes(tmp_path, disk):
    """Steps that are taken while a save is under way do not show in it."""
    states = run(stepping(checkpoint_every(tmp_path, steps(2)), stop_when(max_steps(5))), created(), DATA)
    trained = list(islice(states, 3))
    assert disk.reached.wait(60)
    assert trained[-1][0].progress.step == 3
    assert saved(tmp_path) == []
    disk.gate.set()
    states.close()
    assert saved(tmp_path) == [2]
    assert_trees_equal(dict(load(tmp_path, TASK).params), dict(plain(2)[2].params))
    assert_trees_equal(dict(load(tmp_path, TASK).opt_state), dict(plain(2)[2].opt_state))


def test_the_next_save_waits_for_the_one_that_is_under_way(tmp_path, disk):
    """There is back-pressure and no queue: the step whose save is due does not end before the save before it has."""
    states = run(stepping(checkpoint_every(tmp_path, steps(2), keep=last(9)), stop_when(max_steps(9))), created(), DATA)
    list(islice(states, 3))
    assert disk.reached.wait(60)
    opener = threading.Timer(0.05, disk.gate.set)
    opener.start()
    state, _ = next(states)
    opener.join()
    assert disk.gate.is_set()
    assert (state.progress.step, state.memory["checkpoint_every"]["saved"]) == (4, [2, 4])
    assert 2 in saved(tmp_path)
    states.close()
    assert saved(tmp_path) == [2, 4]


def test_background_and_foreground_write_the_same_files(tmp_path):
    """Where and when bytes are written changes none of them, and neither the state."""
    ends = []
    for name in ("a", "b"):
        step = stepping(checkpoint_every(tmp_path / name, steps(2), keep=last(9), background=name == "a"), stop_when(max_steps(7)))
        ends.append(list(run(step, created(), DATA, clock=lambda: 0.0))[-1][0])
    assert_trees_equal(*ends)
    for file in (tmp_path / "a").rglob("*.*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file


@pytest.mark.parametrize("k", range(1, 8))
def test_going_on_from_any_step_has_the_memory_of_going_on(k, tmp_path):
    """The list of checkpoints does not depend on how fast they were written or deleted."""

    def part(path, state, count):
        return list(islice(run(stepping(checkpoint_every(path, steps(3), keep=last(1))), state, DATA), count))[-1][0]

    resumed = part(tmp_path / "b", part(tmp_path / "b", created(), k), 8 - k)
    assert_trees_equal(resumed, part(tmp_path / "a", created(), 8))


def test_a_failed_save_ends_the_run_at_the_next_step(tmp_path, disk):
    """The error of the writer is raised where the run is, and the older checkpoint stands."""
    states = run(stepping(checkpoint_every(tmp_path, steps(2), keep=last(9)), stop_when(max_steps(90))), created(), DATA)
    disk.gate.set()
    settled(states, 3)
    disk.fails = True
    next(states)
    with pytest.raises(CheckpointError, match="cannot write .*step-00000004: .*No space left .*; free disk space") as raised:
        for _ in states:
            pass
    assert not hasattr(raised.value, "__notes__")
    assert saved(tmp_path) == [2]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_save_that_fails_at_the_very_end_is_an_error_too(tmp_path, disk):
    """What fails after the last step is raised by the end of the run, and by leaving the loop."""
    disk.gate.set()
    states = run(stepping(checkpoint_every(tmp_path / "a", steps(9)), stop_when(max_steps(3))), created(), DATA)
    next(states)
    disk.fails = True
    with pytest.raises(CheckpointError, match="No space left"):
        list(states)
    disk.fails = False
    states = run(stepping(checkpoint_every(tmp_path / "b", steps(2)), stop_when(max_steps(9))), created(), DATA)
    next(states)
    disk.fails = True
    next(states)
    with pytest.raises(CheckpointError, match="No space left"):
        states.close()


def test_a_loop_that_is_left_ends_the_save_first(tmp_path, disk):
    """`break` returns when the save that was under way is durable."""
    opener = threading.Timer(0.05, disk.gate.set)
    for state, _ in run(stepping(checkpoint_every(tmp_path, steps(2))), created(), DATA):
        if state.progress.step == 3:
            opener.start()
            break
    del state
    opener.join()
    assert saved(tmp_path) == [2]
    assert verify(step_path(tmp_path, 2)) == []


PROGRAM = """
import os, sys, time
import torch
from fnlight import TrainState, apply, checkpoint_every, grad, pipe, run, steps
from fnlight.checkpoint import folder
from fnlight.testing import tiny_batches, tiny_task

class Slow:
    def __getattr__(self, name):
        return getattr(os, name)
    def fsync(self, file):
        time.sleep(0.05)
        os.fsync(file)

torch.set_num_threads(1)
folder.os, task = Slow(), tiny_task()
children = {}
for name in ("exit", "error", "break", "kept"):
    children[name] = os.fork()
    if children[name] == 0:
        step = pipe(task.train_step, grad(), apply(), checkpoint_every(f"{sys.argv[1]}/{name}", steps(2)))
        states = run(step, TrainState.create(task), tiny_batches())
        for state, _ in states:
            if state.progress.step == 2:
                if name == "exit":
                    sys.exit(3)
                if name == "error":
                    raise ValueError("mine")
                break
        if name == "break":
            del states
        sys.exit(0)
for name, child in children.items():
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_process_does_not_end_with_a_save_half_done(tmp_path):
    """However a program ends that was saving, its checkpoint is whole, and nothing else is left."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["exit", "3", "error", "1", "break", "0", "kept", "0"], done.stderr
    for name in ("exit", "error", "break", "kept"):
        assert [p.name for p in (tmp_path / name / "checkpoints").iterdir()] == ["step-00000002"], name
        assert verify(step_path(tmp_path / name, 2)) == []


def test_one_combinator_serves_two_runs_at_a_time(tmp_path, monkeypatch):
    """What a run needs in order to save belongs to the run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    step = stepping(checkpoint_every("run", steps(1), keep=last(9)), stop_when(max_steps(4)))
    monkeypatch.chdir(tmp_path / "a")
    one = run(step, created(), DATA)
    next(one)
    one_place = os.path.realpath("run")
    with pytest.raises(LockedError, match=r"run is in use by a run of this same process, since \d{4}-"):
        next(run(step, created(), DATA))
    list(run(stepping(checkpoint_every(tmp_path / "b" / "run", steps(1), keep=last(9)), stop_when(max_steps(4))), created(), DATA))
    assert len(list(one)) == 3
    assert saved(one_place) == saved(tmp_path / "b" / "run") == [1, 2, 3, 4]


def test_a_step_outside_of_a_run_saves_at_once(tmp_path):
    """Where nobody would wait for a thread, there is none; and no lock is left."""
    state, _ = stepping(checkpoint_every(tmp_path, steps(1)))(created(), DATA[0])
    assert saved(tmp_path) == [1]
    assert os.listdir(tmp_path) == ["checkpoints"]
    assert state.progress.step == 1


def test_buffers_are_used_again_and_given_back(tmp_path, monkeypatch):
    """The second save copies into the very memory of the first; after the run there is none."""
    step = stepping(checkpoint_every(tmp_path, steps(1)), stop_when(max_steps(4)))
    seen, savers = [], []
    for state, _ in run(step, created(), DATA):
        saver = state.store.run.resources["checkpoint_every"]
        savers.append(saver)
        seen.append(sorted(t.data_ptr() for t in saver.buffers._held.values()))
    assert seen[1] == seen[2]
    assert seen[1]
    assert savers[0].buffers._held == {}
    assert state.store.run.resources == {}
    assert savers[0].last is None


def test_permanent_checkpoints_stay(tmp_path):
    """`keep` is about the others, and the newest is whichever was saved last."""
    step = stepping(checkpoint_every(tmp_path, steps(2), last(1), permanent=steps(3)), stop_when(max_steps(11)))
    assert "permanent=steps(3)" in str(step)
    state = list(run(step, created(), DATA))[-1][0]
    assert saved(tmp_path) == [3, 6, 9, 11]
    assert state.memory["checkpoint_every"]["permanent"] == [3, 6, 9]
    more = stepping(checkpoint_every(tmp_path, steps(2), last(1), permanent=steps(3)), stop_when(max_steps(14)))
    list(run(more, load(tmp_path, TASK), DATA))
    assert saved(tmp_path) == [3, 6, 9, 12, 14]


def test_an_older_checkpoint_is_deleted_only_when_the_newer_one_is_durable(tmp_path, disk):
    """While the new one is being flushed, the old one stands."""
    disk.gate.set()
    states = run(stepping(checkpoint_every(tmp_path, steps(2), keep=last(1)), stop_when(max_steps(9))), created(), DATA)
    settled(states, 3)
    disk.gate.clear()
    disk.reached.clear()
    next(states)
    assert disk.reached.wait(60)
    assert saved(tmp_path) == [2]
    disk.gate.set()
    states.close()
    assert saved(tmp_path) == [4]


def test_what_cannot_be_deleted_is_told_where_the_training_is(tmp_path, monkeypatch):
    """A checkpoint too many is a warning, and the deletion is tried again at the next save."""
    real, refused = folder.Folder.remove, []

    def remove(self):
        if not refused:
            refused.append(self.name())
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        real(self)

    monkeypatch.setattr(folder.Folder, "remove", remove)
    states = run(stepping(checkpoint_every(tmp_path, steps(2)), stop_when(max_steps(7))), created(), DATA)
    list(islice(states, 5))
    with pytest.warns(CheckpointWarning, match="cannot delete checkpoint .*step-00000002: .*; delete it by hand, or fnlight tries again"):
        list(states)
    assert refused == ["step-00000002"]
    assert saved(tmp_path) == [7]


def test_continuous_saves_as_soon_as_the_last_save_has_ended(tmp_path, disk):
    """No step waits for the disk, and each checkpoint is exact."""
    states = run(stepping(checkpoint_every(tmp_path, continuous, keep=last(99)), stop_when(max_steps(20))), created(), DATA)
    list(islice(states, 5))
    disk.gate.set()
    list(states)
    found, expected = saved(tmp_path), plain(20)
    assert found[0] == 1
    assert not {2, 3, 4} & set(found), "a save was begun while one was under way"
    assert found[-1] == 20
    for at in found:
        assert_trees_equal(dict(load(step_path(tmp_path, at), TASK).params), dict(expected[at].params))


def test_minutes_are_those_of_the_runs_clock(tmp_path):
    """A trigger that counts time looks at no clock of its own."""
    data = Slow(DATA, 20.0)
    step = stepping(checkpoint_every(tmp_path, minutes(1), keep=last(99)), stop_when(max_steps(10)))
    list(run(step, created(), data, clock=data.clock))
    assert len(saved(tmp_path)) == 4
    assert all(b - a == 3 for a, b in zip(saved(tmp_path), saved(tmp_path)[1:-1], strict=False))


class Breaking:
    """Data that fails after some batches."""

    def __init__(self, count, error):
        self.count, self.error = count, error

    def __iter__(self):
        yield from DATA[: self.count + 1]  # the loop looks one batch ahead
        raise self.error


@pytest.mark.parametrize("error", [OSError("the share is gone"), KeyboardInterrupt("from outside")], ids=["error", "Ctrl-C"])
def test_the_last_completed_step_is_saved_when_data_fails(tmp_path, error):
    """Between two steps the tensors are sound: they are saved, and going on is going on, bitwise."""
    step = stepping(checkpoint_every(tmp_path, steps(90)), stop_when(max_epochs(2)))
    with pytest.raises(type(error), match=str(error)) as raised:
        list(run(step, created(), Breaking(2, error)))
    assert raised.value.__notes__[-1].startswith("The state of step 2, the last one that was completed, is saved in ")
    assert saved(tmp_path) == [2]
    assert_trees_equal(dict(list(run(step, load(tmp_path, TASK), DATA))[-1][0].params), dict(plain(6)[6].params))


def test_a_step_that_failed_half_way_is_not_saved(tmp_path):
    """Tensors that a failed step may have changed are never saved as if nothing had happened, and the error says so."""
    calls = []

    def failing(model, batch):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("mine")
        return TASK.train_step(model, batch)

    step = pipe(failing, grad(), apply(), checkpoint_every(tmp_path, steps(2)))
    with pytest.raises(RuntimeError, match="mine") as raised:
        list(run(step, created(), DATA))
    assert "of step 3, the last one that was completed, was not saved: the step that failed may have" in raised.value.__notes__[-1]
    assert saved(tmp_path) == [2]


def test_an_evaluation_that_fails_leaves_the_older_checkpoint(tmp_path):
    """Its tick was not completed, so the run goes on from before, and evaluates."""

    def failing(model, batch):
        raise RuntimeError("mine")

    step = stepping(evaluate_every(DATA, steps(3), eval_step=failing), checkpoint_every(tmp_path, steps(1)))
    with pytest.raises(RuntimeError, match="mine"):
        list(run(step, created(), DATA))
    assert saved(tmp_path) == [2]


def test_weights_that_are_no_numbers_are_not_saved_on_an_exception(tmp_path):
    """A checkpoint that nobody asked for at that moment is not worth replacing a good one."""
    states = run(stepping(checkpoint_every(tmp_path, steps(9))), created(), Breaking(2, OSError("gone")))
    state = list(islice(states, 2))[-1][0]
    state.store.run.resources["checkpoint_every"].settle()
    with torch.no_grad():
        next(iter(state.store.params)).fill_(float("nan"))
    with pytest.raises(OSError, match="gone") as raised:
        next(states)
    assert "its parameters are not finite" in raised.value.__notes__[-1]
    assert saved(tmp_path) == []


def breaking_step(model, batch):
    """A finite loss whose gradient is NaN where the batch says so: that of sqrt at 0."""
    loss = TASK.train_step(model, batch)
    loss, *metrics = loss if isinstance(loss, tuple) else (loss,)
    first = next(iter(model.parameters()))
    broken = loss + torch.sqrt((first * 0).sum()) if float(batch[0].flatten()[0]) == 99.0 else loss
    return (broken, *metrics) if metrics else broken


def broken_at(number):
    """The data, whose batch of that number gives NaN gradients."""
    data = [tuple(t.clone() for t in batch) for batch in DATA]
    data[number][0].view(-1)[0] = 99.0
    return data


@pytest.mark.parametrize("background", [True, False])
def test_nan_never_takes_the_place_of_the_last_good_checkpoint(tmp_path, background):
    """Parameters are looked at before a save: the error names the step, and the good checkpoint stays."""
    step = pipe(breaking_step, grad(), apply(), checkpoint_every(tmp_path, steps(1), keep=last(1), background=background))
    with pytest.raises(
        NonFiniteError, match=r"after step 3 \(epoch 1, batch 0\) these parameters are NaN.*checkpoint is still .*step-00000002"
    ):
        list(run(step, created(), broken_at(2)))
    assert saved(tmp_path) == [2]
    assert all(p.isfinite().all() for p in load(newest(tmp_path), TASK).params.values())


def test_nan_at_the_end_of_a_run_is_not_saved(tmp_path):
    """The last save of a run is one like every other."""
    step = pipe(breaking_step, grad(), apply(), checkpoint_every(tmp_path, steps(100)), stop_when(max_steps(3)))
    with pytest.raises(NonFiniteError, match=r"after step 3 .*there is no checkpoint yet"):
        list(run(step, created(), broken_at(2)))
    assert saved(tmp_path) == []


def test_nan_is_saved_where_it_is_allowed(tmp_path):
    """nonfinite="ignore" says that NaN is meant."""
    config = FitConfig(max_steps=4, dir=str(tmp_path), save_every=steps(1), keep=last(1), nonfinite="ignore", progress=False)
    fit(TrainState.create(attrs.evolve(TASK, train_step=breaking_step), seed=3), Loaders(train=broken_at(2)), config)
    assert saved(tmp_path) == [4]


def test_an_exception_saves_nothing_if_it_is_not_asked_to(tmp_path):
    """on_exception=False leaves what there was."""
    step = stepping(checkpoint_every(tmp_path, steps(2), on_exception=False))
    with pytest.raises(OSError, match="gone") as raised:
        list(run(step, created(), Breaking(2, OSError("gone"))))
    assert raised.value.__notes__ == ["This happened in step 3, after 2 steps were completed."]
    assert saved(tmp_path) == [2]


def test_two_runs_into_one_directory_are_an_error_before_any_work(tmp_path):
    """`fit` says which process holds it, changes nothing there, and has it free again afterwards."""
    config = FitConfig(max_epochs=2, dir=tmp_path, device="cpu", progress=False)
    seen = []

    def watched(model, batch):
        if not seen:
            seen.append(sorted(p.name for p in tmp_path.rglob("*")))
            with pytest.raises(LockedError, match=f"{tmp_path} is in use by a run of this same process"):
                fit(created(), DATA, attrs.evolve(config, resume=True, max_epochs=5))
            seen.append(sorted(p.name for p in tmp_path.rglob("*")))
        return TASK.train_step(model, batch)

    task = attrs.evolve(TASK, train_step=watched)
    fit(TrainState.create(task, seed=3), DATA, config)
    assert seen[0] == seen[1] == [".lock", "checkpoints", "config.json"]
    assert fit(created(), DATA, attrs.evolve(config, max_epochs=3, resume=True)).progress.epoch == 3
    assert not (tmp_path / ".lock").exists()


def test_a_run_that_fails_before_it_begins_unlocks_its_directory(tmp_path):
    """Whatever `fit` refuses, the directory is free afterwards."""
    with pytest.raises(ConfigError, match="monitor"):
        fit(created(), Loaders(train=DATA), FitConfig(max_epochs=1, dir=tmp_path, keep=best("val/loss"), device="cpu", progress=False))
    assert not (tmp_path / ".lock").exists()


def test_many_saves_leave_nothing_behind(tmp_path):
    """No thread, file, descriptor or directory is left of hundreds of saves; FNLIGHT_SAVES=1000 tries more."""
    count = int(os.environ.get("FNLIGHT_SAVES", "100"))
    before = threading.active_count()
    step = stepping(checkpoint_every(tmp_path, steps(1), every(50)), stop_when(max_steps(count)))
    for _ in run(step, created(), DATA):
        assert threading.active_count() <= before + 1
    assert saved(tmp_path) == [n for n in range(1, count + 1) if n % 50 == 0 or n == count]
    assert os.listdir(tmp_path) == ["checkpoints"]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {f"step-{n:08d}" for n in saved(tmp_path)}


def test_saving_can_be_said_in_a_configuration(tmp_path):
    """`fit` takes what the combinator takes, and reads it back from JSON."""
    config = FitConfig(
        max_steps=7, dir=tmp_path, save_every=continuous, permanent=steps(3), save_in_background=False, device="cpu", progress=False
    )
    assert FitConfig.from_json(config.to_json()) == config
    fit(created(), DATA, config)
    assert saved(tmp_path) == [3, 6, 7]
    with pytest.raises(ConfigError, match=r"permanent=epochs\(1\)\) is about checkpoints, but dir is None"):
        FitConfig(max_steps=7, permanent=epochs(1))


def test_a_remote_store_is_saved_to_in_the_background(tmp_path):
    """A URL cannot be locked; all else is the same."""
    list(run(stepping(checkpoint_every("memory://test_saving/run", steps(2), last(2)), stop_when(max_steps(5))), created(), DATA))
    assert saved("memory://test_saving/run") == [4, 5]
    assert newest("memory://test_saving/run") == step_path("memory://test_saving/run", 5)


def test_two_places_need_two_names(tmp_path):
    """A second checkpoint_every says name=, and may save elsewhere or in the same directory."""
    step = stepping(
        checkpoint_every(tmp_path / "a", steps(2), last(9)),
        checkpoint_every(tmp_path / "b", steps(3), last(9), name="backup"),
        stop_when(max_steps(6)),
    )
    list(run(step, created(), DATA))
    assert (saved(tmp_path / "a"), saved(tmp_path / "b")) == ([2, 4, 6], [3, 6])


def test_the_best_checkpoint_is_found_by_looking(tmp_path):
    """It is computed from the directory: by the value at its own step, the sound ones only."""
    step = stepping(evaluate_every(DATA, steps(2)), checkpoint_every(tmp_path, steps(2), last(9)), stop_when(max_steps(6)))
    state = list(run(step, created(), DATA))[-1][0]
    values = {record.step: record.metrics["val/loss"] for record in state.history}
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    assert best_checkpoint(tmp_path, "val/loss") == step_path(tmp_path, low)
    assert best_checkpoint(tmp_path, "val/loss", mode="max") == step_path(tmp_path, high)
    assert best_checkpoint(tmp_path, "val/acc/none") is None
    (Path(step_path(tmp_path, low)) / "model.safetensors").write_bytes(b"")
    with pytest.warns(CheckpointWarning, match="skipped a broken checkpoint"):
        assert best_checkpoint(tmp_path, "val/loss") != step_path(tmp_path, low)
    with pytest.raises(ConfigError, match="mode=.* must be 'min' or 'max', but got 'least'"):
        best_checkpoint(tmp_path, "val/loss", "least")
