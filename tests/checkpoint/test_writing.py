"""Writing: completely or not at all, whatever fails and whenever the writer dies."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from fnlight.checkpoint import amend, folder, load, newest, save, step_path, verify, writable
from fnlight.errors import CheckpointError, CheckpointWarning, DonatedStateError
from fnlight.state import Progress, Task, TrainState
from tests.checkpoint.tasks import files, make_task, trained, unlike

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW, TASK = trained(steps=1), trained(steps=2), make_task()
CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace")


class Failing:
    """The `os` module, one of whose calls fails."""

    def __init__(self, nth: int, error: int) -> None:
        self.left, self.error = nth, error

    def __getattr__(self, name: str) -> Any:
        """A function of `os` that counts its calls, except those that only read a file."""
        real = getattr(os, name)

        def counted(*args: Any) -> Any:
            reads = name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR) and os.path.isfile(args[0])
            self.left -= not reads
            if self.left == 0 and not reads:
                raise OSError(self.error, os.strerror(self.error))
            return real(*args)

        return counted if name in CALLS else real


def fail(monkeypatch: pytest.MonkeyPatch, nth: int, error: int = errno.ENOSPC) -> Failing:
    """Let the n-th call that changes a file system fail."""
    failing = Failing(nth, error)
    monkeypatch.setattr(folder, "os", failing)
    return failing


@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "anew"])
def test_a_failure_at_any_moment_leaves_the_old_checkpoint_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    """Let each call to the file system fail in turn: the error says so, and the directory is as it was."""
    path = tmp_path / "state"
    if old:
        save(OLD, path)
    before, nth = files(tmp_path), 1
    while fail(monkeypatch, nth).left and not _fits(path):
        assert files(tmp_path) == before, f"after call {nth}"
        assert [p.name for p in tmp_path.iterdir()] == ["state"] * old, f"after call {nth}"
        nth += 1
    assert nth > 15, "calls are not counted"
    assert unlike(load(path, TASK), NEW) == []


def _fits(path: Path) -> bool:
    try:
        save(NEW, path)
    except CheckpointError as error:
        wanted = (str(path), "No space left", "free disk space")
        assert [part for part in wanted if part not in str(error)] == []  # noqa: PT017  # the loop ends with a save that fits
        return False
    return True


@pytest.mark.parametrize(
    "error, hint",
    [
        (errno.EIO, "see the cause"),
        (errno.EACCES, "change the permissions"),
        (errno.EROFS, "writable file system"),
        (errno.EDQUOT, "quota"),
    ],
)
def test_what_to_do_depends_on_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, hint: str) -> None:
    """Each kind of failure comes with its own advice."""
    fail(monkeypatch, 4, error)
    with pytest.raises(CheckpointError, match=f"cannot write .*state: .*{os.strerror(error)}; .*{hint}.* Older checkpoints are unchanged"):
        save(NEW, tmp_path / "state")


@pytest.mark.parametrize("place", ["file/state", "file", "locked/state"])
def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path, place: str) -> None:
    """A path below a file, a file, or a directory without the right to write is refused, and nothing changes."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").mkdir(mode=0o500)
    if place.startswith("locked") and os.access(tmp_path / "locked", os.W_OK):
        place = "file/a/b"  # nobody can lock out the superuser
    with pytest.raises(CheckpointError, match=r"cannot write .*(Not a directory|it is a file|Permission denied)"):
        save(NEW, tmp_path / place)
    assert files(tmp_path) == {"file": b"mine"}


def test_a_run_asks_before_it_works(tmp_path: Path) -> None:
    """`writable` makes the directory, leaves nothing in it, and refuses a place that cannot be written."""
    writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b" / "checkpoints").iterdir()) == []
    (tmp_path / "a" / "b" / "checkpoints" / ".probe").mkdir()  # of a run that was killed as it asked
    writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b" / "checkpoints").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/checkpoints: .*; choose a path whose parents are directories"):
        writable(tmp_path / "file")


def test_a_directory_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    """Whoever saves into a directory of his own files by mistake loses none."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"contains thesis.tex, which are not files of a checkpoint and would be lost"):
        save(NEW, tmp_path)
    assert files(tmp_path) == {"thesis.tex": b"years of work"}


def test_overwriting_can_be_refused(tmp_path: Path) -> None:
    """`overwrite=False` takes only a new place."""
    path = save(OLD, tmp_path / "state", overwrite=False)
    with pytest.raises(CheckpointError, match=r"one exists already; pass overwrite=True or give another path"):
        save(NEW, path, overwrite=False)
    assert unlike(load(path, TASK), OLD) == []
    assert unlike(load(save(NEW, path), TASK), NEW) == []


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """Saving to a symbolic link replaces what it points to."""
    save(OLD, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    save(NEW, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert unlike(load(tmp_path / "real", TASK), NEW) == []


def test_a_donated_state_cannot_be_saved(tmp_path: Path) -> None:
    """Tensors that a later step has overwritten are never written under the older state's name."""
    state = trained(steps=1)
    state.moved("cpu")
    with pytest.raises(DonatedStateError, match="the state of step 1 was donated to a later step"):
        save(state, tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def _sum(model: Any, batch: Any) -> Any:
    return model(batch).sum()


SMALL = Task(torch.nn.Linear(2, 1).requires_grad_(requires_grad=False), _sum)


def small(step: int) -> TrainState:
    """A state of few files and tensors, which tell the step."""
    state = TrainState.create(SMALL)
    state.store.module.weight.fill_(step)  # pyright: ignore[reportCallIssue]
    state.store.module.bias.fill_(step)  # pyright: ignore[reportCallIssue]
    state.store.memory["ema"] = torch.full((2,), step)
    return attrs.evolve(state, progress=Progress(step=step))


WRITER = """
import os, sys
from fnlight.checkpoint import folder, save
from tests.checkpoint.test_writing import CALLS, small

class Dying:
    def __init__(self, nth):
        self.left = nth
    def __getattr__(self, name):
        real = getattr(os, name)
        def counted(*args):
            self.left -= 1
            return real(*args) if self.left else os._exit(9)
        return counted if name in CALLS else real

state, old, nth, status = small(2), small(1), 1, 9
while os.waitstatus_to_exitcode(status) if nth > 1 else True:
    path = f"{sys.argv[1]}/{nth}/checkpoints/step-00000002"
    save(old, path)
    child = os.fork()
    if child == 0:
        folder.os = Dying(nth)
        save(state, path)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    nth += 1
print(nth)
"""


@pytest.mark.filterwarnings("ignore:.*was being replaced when its writer ended")
def test_a_writer_that_dies_at_any_moment_leaves_the_old_or_the_new_state(tmp_path: Path) -> None:
    """Real processes end at each call to the file system in turn: the reader finds one of both states whole, and the next save tidies up."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", WRITER, tmp_path], cwd=ROOT, check=True, capture_output=True, text=True)
    count = int(done.stdout) - 1
    assert count > 15
    steps: list[int] = []
    for nth in range(1, count + 1):
        path = step_path(tmp_path / str(nth), 2)
        assert newest(tmp_path / str(nth)) == path
        found = load(path, SMALL)
        assert unlike(found, small(found.progress.step)) == [], f"died at call {nth}"
        steps.append(found.progress.step)
        save(found, path)
        assert os.listdir(Path(path).parent) == ["step-00000002"], f"died at call {nth}"
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}


def test_a_replacement_that_was_cut_short_is_read_with_a_warning(tmp_path: Path) -> None:
    """Between the two renames the new files are taken if they are whole, else the old ones, and the reader says from where."""
    path, aside, new = tmp_path / "state", tmp_path / ".state.old-00000000", tmp_path / ".state.tmp-00000000"
    save(OLD, aside)
    save(NEW, new)
    with pytest.warns(CheckpointWarning, match=r"state was being replaced when its writer ended; it is read from .*\.state\.tmp-00000000"):
        assert unlike(load(path, TASK), NEW) == []
    (new / "state.json").unlink()
    with pytest.warns(CheckpointWarning, match=r"read from .*\.state\.old-00000000"):
        assert unlike(load(path, TASK), OLD) == []


def test_a_limit_of_the_system_is_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    """A real limit on the size of files ends a save with an error; the checkpoint before it stands."""
    program = (
        "import resource, signal, sys; from fnlight.checkpoint import save; from tests.checkpoint.tasks import trained;"
        "save(trained(steps=1), sys.argv[1]); signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)); save(trained(steps=2), sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "state"], cwd=ROOT, capture_output=True, text=True)
    assert "CheckpointError: cannot write" in done.stderr
    assert "raise the limit on the size of files" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert unlike(load(tmp_path / "state", TASK), OLD) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the size of a process where Linux says it")
def test_saving_holds_no_second_copy_of_the_state(tmp_path: Path) -> None:
    """A process that may not grow by half of its state can save it; a copy of the state it cannot make."""
    program = (
        "import resource, sys, torch; from fnlight.state import Task, TrainState; from fnlight.checkpoint import save;"
        "save(TrainState.create(Task(torch.nn.Linear(4, 4), train_step=max)), sys.argv[1] + '/small');"
        "state = TrainState.create(Task(torch.nn.Linear(4096, 4096), train_step=max));"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 2**25;"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size)); save(state, sys.argv[1] + '/state'); print('saved', flush=True); state.copy()"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "saved\n", done.stderr
    assert "can't allocate memory" in done.stderr
    assert verify(tmp_path / "state") == []


def test_everything_is_flushed_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is flushed after its last byte, its directory before the rename, and the parent after it."""
    events: list[tuple[str, str]] = []
    names: dict[int, str] = {}

    class Watching:
        def __getattr__(self, name: str) -> Any:
            real = getattr(os, name)

            def watched(first: Any, *args: Any) -> Any:
                found = real(first, *args)
                if name == "open":
                    names[found] = os.path.basename(first)
                events.append((name, names[first] if isinstance(first, int) else os.path.basename(first)))
                return found

            return watched if name in (*CALLS, "close") else real

    monkeypatch.setattr(folder, "os", Watching())
    save(NEW, tmp_path / "state")
    hidden = next(name for call, name in events if call == "mkdir")
    for name in (*files(tmp_path / "state"), hidden, tmp_path.name):
        assert [call for call, about in events if about == name and call in ("write", "fsync", "close")][-2:] == ["fsync", "close"], name
    order = [event for event in events if event[0] in ("fsync", "rename")]
    assert [name for _, name in order[:-2]][-2:] == ["state.json", hidden]
    assert order[-2:] == [("rename", hidden), ("fsync", tmp_path.name)]


def test_amending_writes_the_manifest_only(tmp_path: Path) -> None:
    """What a run learns after its last save, why it stopped and a last evaluation, is added without writing a tensor."""
    state = trained()
    path = save(state, tmp_path / "state")
    before = files(path)
    later = attrs.evolve(state.recorded({"val/late": 0.25}), stopped="max_steps(2)")
    later.store.memory["checkpoint_every"]["saved"] = [2]
    amend(later, path)
    assert {name for name, data in files(path).items() if data != before[name]} == {"state.json"}
    assert unlike(load(path, TASK), later) == []
    assert verify(path) == []


def test_a_failing_amendment_leaves_the_checkpoint_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failing call leaves the old manifest, and no other file but when only the last flush failed."""
    state = trained()
    path = save(state, tmp_path / "state")
    before = files(path)
    for nth in range(1, 5):  # open, write, fsync, replace
        fail(monkeypatch, nth)
        with pytest.raises(CheckpointError, match=r"cannot write .*state/state\.json: .*No space left"):
            amend(attrs.evolve(state, stopped="x"), path)
        assert files(path) == before, f"after call {nth}"


def test_amending_another_state_is_refused(tmp_path: Path) -> None:
    """Only a state whose tensors are those in the files may be written about them."""
    state = trained()
    path = save(state, tmp_path / "state")
    with pytest.raises(CheckpointError, match="it has other tensors than the state of step 1"):
        amend(OLD, path)
    state.store.memory["more"] = torch.ones(1)
    with pytest.raises(CheckpointError, match="it has other tensors than the state of step 2"):
        amend(state, path)
    with pytest.raises(CheckpointError, match=r"cannot update checkpoint .*: there is no directory .*; save the state again"):
        amend(state, tmp_path / "none")


def test_a_path_is_text_or_a_path(tmp_path: Path) -> None:
    """A path object, a string and a file URL mean the same; bytes are refused."""
    assert save(OLD, tmp_path / "a") == str(tmp_path / "a") == save(OLD, f"file://{tmp_path}/a")
    with pytest.raises(TypeError, match=r"must be a str or os.PathLike, but got bytes"):
        save(OLD, b"a")  # pyright: ignore[reportArgumentType]


def test_relative_paths_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name means a directory here."""
    monkeypatch.chdir(tmp_path)
    assert unlike(load(save(TrainState.create(TASK), "state"), TASK), TrainState.create(TASK)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told")
@pytest.mark.parametrize("error", [None, OSError(errno.EINVAL, "no such advice here")], ids=["taken", "refused"])
def test_the_disk_begins_while_a_large_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None) -> None:
    """What was written is handed on part by part, without gap or overlap, so that the flush in the end has little to wait for."""
    parts: list[tuple[int, int]] = []

    def advise(file: int, start: int, count: int, advice: int) -> None:
        parts.append((start, count))
        if error is not None:
            raise error

    monkeypatch.setattr(os, "posix_fadvise", advise)
    entry = folder.Folder(str(tmp_path)).write("large", [bytes(5), memoryview(bytes(40 << 20))])
    assert entry["size"] == (tmp_path / "large").stat().st_size == 5 + (40 << 20)
    assert len(parts) == 2
    assert parts[0][0] == 0
    assert parts[1][0] == parts[0][1]
