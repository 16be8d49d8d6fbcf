"""Remote stores through fsspec: no renames, the manifest written last is the commit mark."""

from collections.abc import Iterator
from typing import Any

import attrs
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fnlight.checkpoint import amend, checkpoints, last, load, load_weights, newest, prune, save, step_path, verify, writable
from fnlight.errors import BrokenCheckpointError, CheckpointError, CheckpointWarning
from tests.checkpoint.tasks import make_task, trained, unlike

OLD, NEW, TASK = trained(steps=1), trained(steps=2), make_task()


@pytest.fixture
def run() -> Iterator[str]:
    """The URL of an empty run in memory."""
    store = fsspec.filesystem("memory")
    kept, pseudo = dict(store.store), list(store.pseudo_dirs)
    yield "memory://bucket/runs/a"
    store.store.clear()
    store.store.update(kept)
    store.pseudo_dirs[:] = pseudo


def flip(path: str) -> None:
    """Change one bit of a file in memory."""
    store = fsspec.filesystem("memory")
    data = bytearray(store.cat_file(path))
    data[-1] ^= 1
    store.pipe_file(path, bytes(data))


def test_a_state_comes_back_from_a_remote_store(run: str) -> None:
    """Saving, loading, listing, amending and verifying work on URLs as on paths."""
    writable(run)
    assert newest(run) is None
    for state in (OLD, NEW):
        assert save(state, step_path(run, state.progress.step)) == f"{run}/checkpoints/step-0000000{state.progress.step}"
    assert [step for step, _ in checkpoints(run)] == [1, 2]
    assert newest(run) == step_path(run, 2)
    assert verify(step_path(run, 2)) == []
    amend(attrs.evolve(NEW, stopped="enough"), step_path(run, 2))
    assert unlike(load(run, TASK), attrs.evolve(NEW, stopped="enough")) == []
    assert unlike(load(step_path(run, 1), TASK), OLD) == []
    assert load_weights(OLD, run)[1].fits
    assert load_weights(OLD, f"{step_path(run, 1)}/model.safetensors")[1].fits


def test_the_manifest_is_written_last(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files go first, and an old manifest goes before them, so that a checkpoint with a manifest is whole."""
    written: list[str] = []
    marked: list[bool] = []
    real = MemoryFileSystem.open

    def recorded(self: Any, path: str, mode: str = "rb", **more: Any) -> Any:
        if mode == "wb":
            written.append(path.rpartition("/")[2])
            marked.append(self.exists(f"{path.rpartition('/')[0]}/state.json"))
        return real(self, path, mode, **more)

    monkeypatch.setattr(MemoryFileSystem, "open", recorded)
    save(OLD, run)
    save(NEW, run)
    assert written == 2 * ["model.safetensors", "optimizer.safetensors", "memory.safetensors", "state.json"]
    assert marked == 8 * [False]


def test_damage_in_a_remote_store_is_named_and_passed_over(run: str) -> None:
    """Digests are checked there as well."""
    save(OLD, step_path(run, 1))
    save(NEW, step_path(run, 2))
    flip(f"{step_path(run, 2)}/optimizer.safetensors")
    with pytest.raises(BrokenCheckpointError, match=r"optimizer\.safetensors is altered"):
        load(step_path(run, 2), TASK)
    with pytest.warns(CheckpointWarning, match=r"skipped .*step-00000002.*optimizer\.safetensors is altered"):
        assert unlike(load(run, TASK), OLD) == []


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_failed_write_leaves_nothing_and_no_commit_mark(run: str, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Whichever file fails, the error says so, what was written is deleted, and other checkpoints stand."""
    save(OLD, step_path(run, 1))
    real, count = MemoryFileSystem.open, [0]

    def failing(self: Any, path: str, mode: str = "rb", **more: Any) -> Any:
        count[0] += mode == "wb"
        if mode == "wb" and count[0] == nth:
            raise PermissionError("the store is gone")
        return real(self, path, mode, **more)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "open", failing)
        with pytest.raises(CheckpointError, match=r"cannot write memory://.*step-00000002: the store is gone"):
            save(NEW, step_path(run, 2))
    assert [path for path in fsspec.filesystem("memory").find("/bucket/runs/a") if "step-00000002" in path] == []
    assert unlike(load(step_path(run, 1), TASK), OLD) == []


def test_overwriting_a_remote_checkpoint_works_and_can_be_refused(run: str) -> None:
    """The manifest of the old one goes first, so that no reader takes new files for old ones."""
    save(OLD, run)
    with pytest.raises(CheckpointError, match="one exists already"):
        save(NEW, run, overwrite=False)
    assert unlike(load(save(NEW, run), TASK), NEW) == []


def test_pruning_a_remote_run_deletes_whole_checkpoints(run: str) -> None:
    """Only the steps of the run go, and the newest stays."""
    for step in (1, 2, 3):
        save(OLD, step_path(run, step))
    assert prune(run, [1, 3], last(1), ()) == [3]
    assert [step for step, _ in checkpoints(run)] == [2, 3]


def test_a_store_that_is_not_there_is_an_error(run: str) -> None:
    """An empty place and an unknown kind of store are told apart."""
    with pytest.raises(CheckpointError, match="no checkpoint at memory://bucket/runs/a"):
        load(run, TASK)
    with pytest.raises(ValueError, match="Protocol not known"):
        load("nosuchstore://a", TASK)
