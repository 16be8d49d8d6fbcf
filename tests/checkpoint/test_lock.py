"""The lock of a run's directory: held by one process, reported to others, and never left by a dead process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fnlight as fl
from fnlight.checkpoint import hold, lock
from fnlight.errors import CheckpointError, CheckpointWarning, LockedError
from fnlight.testing import tiny_batches, tiny_task

ROOT = Path(__file__).resolve().parents[2]

HOLDER = """
import os, sys, time
from fnlight.checkpoint import hold
held = hold(sys.argv[1], clock=lambda: 0.0)
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
time.sleep(600)
"""


def test_a_lock_is_held_by_one_and_leaves_no_file(tmp_path: Path) -> None:
    """A second one is refused by name; afterwards the directory is as it was."""
    first = hold(tmp_path / "run", clock=lambda: 0.0)
    with pytest.raises(
        LockedError, match=r"run is in use by a run of this same process, since 1970-01-01 00:00:00 UTC; .*close\(\)\), or give another"
    ):
        hold(tmp_path / "run" / ".." / "run")
    first.release()
    first.release()
    assert os.listdir(tmp_path / "run") == []
    hold(tmp_path / "run").release()


def test_another_process_is_named_and_its_death_frees_the_directory_at_once(tmp_path: Path) -> None:
    """The lock goes with the process that took it, even where a fork of it, such as a worker of a loader, lives on."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(
                LockedError,
                match=rf"in use by process {holder.pid} on .*, since 1970-01-01 .*; if you are sure that it no longer runs, delete",
            ):
                hold(tmp_path)
            holder.kill()
            holder.wait()
            os.kill(child, 0)  # it lives
            hold(tmp_path).release()
            assert os.listdir(tmp_path) == []
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("change", [{"machine": "another"}, {"machine": None}, {"pid": "x"}], ids=["elsewhere", "unknown", "no number"])
def test_a_lock_is_never_taken_from_whom_this_machine_cannot_see(tmp_path: Path, change: dict[str, object]) -> None:
    """Only a process of this boot and these namespaces is known to be dead."""
    held = hold(tmp_path)
    file = tmp_path / ".lock"
    signed = json.loads(file.read_text()) | {"pid": 1 << 30, "begun": "1"}
    file.write_text(json.dumps(signed | change))
    with pytest.raises(LockedError, match="is in use by process"):
        hold(tmp_path)
    file.write_text(json.dumps(signed))
    hold(tmp_path).release()
    held.release()


def test_a_fork_cannot_release_the_lock_of_its_parent(tmp_path: Path) -> None:
    """Whatever a forked worker runs on its way out, the run stays alone."""
    held = hold(tmp_path)
    child = os.fork()
    if child == 0:
        held.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(LockedError, match="this same process"):
        hold(tmp_path)
    held.release()


def test_a_file_of_a_dead_run_is_no_obstacle(tmp_path: Path) -> None:
    """What counts is the lock, not the file; nonsense in it is replaced."""
    (tmp_path / ".lock").write_text("[" * 100_000)
    hold(tmp_path).release()
    assert os.listdir(tmp_path) == []


def test_a_directory_that_has_gone_is_no_error_at_the_end(tmp_path: Path) -> None:
    """Whoever deletes the directory of a run has deleted its lock, too."""
    held = hold(tmp_path / "run")
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "run").rmdir()
    held.release()
    assert held.file is None


def test_a_lock_that_was_deleted_is_taken_again_unless_another_run_has_it(tmp_path: Path) -> None:
    """Whoever deletes a run's directory frees it; the run that goes on takes it back, or learns that it is another's."""
    held = hold(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    held.look()
    with pytest.raises(LockedError, match="in use by a run of this same process"):
        hold(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    other = hold(tmp_path / "run")
    with pytest.raises(LockedError, match="the lock of this run was deleted, and another run has begun since: .*run is in use by"):
        held.look()
    held.release()
    assert os.listdir(tmp_path / "run") == [".lock"], "it is the other's"
    other.release()


def test_a_run_whose_directory_another_one_has_taken_ends_before_it_writes(tmp_path: Path) -> None:
    """`rm -r` in the middle of a run, and a second run: the first one replaces none of its checkpoints."""
    taken = []

    def train_step(model: Any, batch: Any) -> Any:
        if len(taken) == 0 and fl.checkpoints(tmp_path / "run"):
            shutil.rmtree(tmp_path / "run")
            taken.append(hold(tmp_path / "run"))
        return task.train_step(model, batch)

    task = tiny_task()
    own = fl.Task(task.model, train_step, configure_optimizers=task.configure_optimizers)
    config = fl.FitConfig(max_steps=6, dir=tmp_path / "run", save_every=fl.steps(1), save_in_background=False, device="cpu", progress=False)
    with pytest.raises(LockedError, match="the lock of this run was deleted, and another run has begun since"):
        fl.fit(fl.TrainState.create(own), tiny_batches(), config)
    assert os.listdir(tmp_path / "run") == [".lock"]
    taken[0].release()


def test_a_file_system_without_locks_is_said_and_a_place_that_cannot_be_written_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lock is better than no training, but it is never silent."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/run/\.lock: .*choose a path whose parents are directories"):
        hold(tmp_path / "file" / "run")

    def refuse(*_: object) -> None:
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.warns(CheckpointWarning, match="has no locks, so a second run into this directory is not detected"):
        hold(tmp_path).release()
