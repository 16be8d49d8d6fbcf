"""A run's directory from a stranger: nothing is written through the links in it, and deleting one deletes what it is, not what it leads to."""

import os
from pathlib import Path

import pytest

from fnlight import FitConfig, TrainState, apply, checkpoint_every, checkpoints, fit, grad, last, pipe, run, steps
from fnlight.checkpoint.lock import hold
from fnlight.cli import run as command
from fnlight.errors import CheckpointError
from fnlight.testing import tiny_batches, tiny_task


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder and a file that are not the run's."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    return folder


def trained(folder: Path, **options: object) -> TrainState:
    """Four steps."""
    config = FitConfig(max_steps=4, dir=folder, device="cpu", progress=False, save_every=steps(2), **options)  # pyright: ignore[reportArgumentType]
    return fit(TrainState.create(tiny_task()), tiny_batches(), config)


@pytest.mark.parametrize("name", [".lock", "config.json", "checkpoints", "bundles", "traces"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_the_place_of_what_a_run_writes_is_refused(outside: Path, tmp_path: Path, name: str, dangling: bool) -> None:
    """Before any work, and what it leads to is as it was."""
    (tmp_path / "run").mkdir()
    target = outside / ("new" if dangling else "precious" if name in (".lock", "config.json") else "")
    (tmp_path / "run" / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=rf"run/{name} is a link to .*nothing is written through links .*; delete the link, or make"):
        trained(tmp_path / "run")
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"precious": "mine"}


@pytest.mark.parametrize("name", [".lock", "config.json"])
def test_a_file_with_a_second_name_is_not_written_over(outside: Path, tmp_path: Path, name: str) -> None:
    """A hard link is a name like any other, but what it names may be somebody's."""
    (tmp_path / "run").mkdir()
    os.link(outside / "precious", tmp_path / "run" / name)
    if name == ".lock":
        with pytest.raises(CheckpointError, match=r"run/\.lock is no file of its own"):
            trained(tmp_path / "run")
    else:
        trained(tmp_path / "run")
        assert "max_steps" in (tmp_path / "run" / name).read_text()
    assert (outside / "precious").read_text() == "mine"


def test_a_lock_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    """Opening it waits for nobody."""
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(CheckpointError, match="is no file of its own"):
        hold(tmp_path)


def test_a_link_in_the_place_of_a_checkpoint_is_not_written_through(outside: Path, tmp_path: Path) -> None:
    """The save that would have replaced what it leads to ends the run."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000002").symlink_to(outside)
    saver = checkpoint_every(tmp_path / "run", steps(2), background=False)
    state = TrainState.create(tiny_task())
    with pytest.raises(CheckpointError, match="step-00000002 is a link to"):
        list(run(pipe(state.task.train_step, grad(), apply(), saver), state, tiny_batches()))
    assert os.listdir(outside) == ["precious"]


def test_a_link_in_the_place_of_a_checkpoint_is_not_deleted_through(
    outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stays and is named, and what it leads to stays as well."""
    trained(tmp_path / "run", keep=last(2))
    (_, first), _ = checkpoints(tmp_path / "run")
    moved = outside / "moved"
    os.rename(first, moved)
    os.symlink(moved, first)
    assert command(["prune", str(tmp_path / "run"), "--keep", "last(1)", "--yes"]) == 1
    assert "is a link to" in capsys.readouterr().err
    assert sorted(os.listdir(moved)) == ["model.safetensors", "optimizer.safetensors", "state.json"]


def test_a_directory_that_is_a_link_itself_is_written(outside: Path, tmp_path: Path) -> None:
    """It was given by its owner."""
    (tmp_path / "run").symlink_to(outside)
    trained(tmp_path / "run")
    assert [step for step, _ in checkpoints(outside)] == [4]
    assert sorted(os.listdir(outside)) == ["checkpoints", "config.json", "precious"]
