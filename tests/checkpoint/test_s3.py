"""A real server that speaks S3: saved, read by ranges, replaced under a reader, killed and resumed; and failures that pass."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save as safetensors

import fnlight as fl
from fnlight.checkpoint import checkpoints, load, load_weights, prune, save, step_path, verify
from fnlight.checkpoint.bucket import Bucket
from fnlight.checkpoint.retry import WAITS, retried, transient
from fnlight.errors import BrokenCheckpointError, CheckpointError
from tests.checkpoint.tasks import make_task, trained, unlike
from tests.repo.source import ROOT

moto = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")
pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

OLD, NEW, TASK = trained(steps=1), trained(steps=2), make_task()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server on a free port."""
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def run(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of an empty run in a bucket of its own."""
    options = {"endpoint_url": server, "key": "a", "secret": "b"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    name = f"bucket-{abs(hash(request.node.name)) % 10**8}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}/runs/a"


def test_a_state_comes_back_from_s3(run: str) -> None:
    """Saving, listing, verifying, loading and retention work as on a disk."""
    for state in (OLD, NEW):
        save(state, step_path(run, state.progress.step))
    assert [step for step, _ in checkpoints(run)] == [1, 2]
    assert verify(step_path(run, 2)) == []
    assert unlike(load(run, TASK), NEW) == []
    assert unlike(load(step_path(run, 1), TASK), OLD) == []
    assert prune(run, [1, 2], fl.last(1), ()) == [2]
    assert [step for step, _ in checkpoints(run)] == [2]


def test_only_the_bytes_that_are_needed_are_read(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a plain file the header and the wanted tensors; of a checkpoint no optimizer where only weights are wanted; of a list nothing."""
    store = fsspec.filesystem("s3")
    state = fl.TrainState.create(fl.Task(torch.nn.Linear(2, 1), lambda model, batch: model(batch).sum()))
    tensors = {"net.bias": torch.ones(1), "net.weight": torch.zeros(1, 2), "huge": torch.zeros(1 << 20)}
    store.pipe_file(f"{run[5:]}.safetensors", safetensors(tensors))
    save(NEW, step_path(run, 2))
    read: list[tuple[str, int]] = []
    real = Bucket.part

    def counted(self: Bucket, name: str, start: int, end: int) -> bytes:
        data = real(self, name, start, end)
        read.append((name, len(data)))
        return data

    monkeypatch.setattr(Bucket, "part", counted)
    after, report = load_weights(state, f"{run}.safetensors", partial=True, rename=lambda name: name.removeprefix("net."))
    assert after.params["bias"].item() == 1.0
    assert list(report.unexpected) == ["huge"]
    assert 0 < sum(count for _, count in read) < 1000
    read.clear()
    assert [step for step, _ in checkpoints(run)] == [2]
    assert read == []
    load_weights(NEW, step_path(run, 2))
    assert {name for name, _ in read} == {"state.json", "model.safetensors"}


def test_a_reader_gets_the_old_or_the_new_but_never_a_mixture(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is replaced between its manifest and its files is read again."""
    save(OLD, run)
    real, waits = Bucket.fetch, list[float]()

    def replaced(self: Bucket, name: str, kind: str) -> tuple[dict[str, torch.Tensor], str]:
        if name == "model.safetensors" and not waits:
            save(NEW, run)
            waits.append(0.0)
        return real(self, name, kind)

    monkeypatch.setattr(Bucket, "fetch", replaced)
    assert unlike(load(run, TASK), NEW) == []


class RefusedError(Exception):
    """What clients of S3 raise."""

    def __init__(self, status: int) -> None:
        Exception.__init__(self, f"answer {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


def wrapped(error: Exception) -> OSError:
    """An error as s3fs wraps it."""
    outer = OSError(5, "failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    "error", [TimeoutError(), ConnectionResetError(), RefusedError(503), RefusedError(429), wrapped(RefusedError(500))], ids=repr
)
def test_failures_that_pass_are_tried_again_and_not_for_ever(error: Exception) -> None:
    """Five attempts with growing waits, and then the error itself."""
    waits: list[float] = []
    calls = iter([error, error, "there"])

    def call() -> Any:
        found = next(calls, error)
        if isinstance(found, Exception):
            raise found
        return found

    assert retried(call, waits.append) == "there"
    assert waits == list(WAITS[:2])
    waits.clear()
    with pytest.raises(type(error), match=str(error.args[-1]) if error.args else "^$"):
        retried(call, waits.append)
    assert waits == list(WAITS)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), PermissionError(), RefusedError(403), RefusedError(404), ValueError("no")], ids=repr
)
def test_failures_that_last_are_raised_at_once(error: Exception) -> None:
    """Nobody waits for what will not change."""
    assert not transient(error)


def test_a_file_is_written_from_the_start_again(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is lost in the middle costs a wait, and the file is whole."""
    store, waits = fsspec.filesystem("s3"), list[float]()
    real, failures = type(store).open, iter([True, False, True])

    def failing(self: Any, path: str, mode: str = "rb", **more: Any) -> Any:
        if mode == "wb" and next(failures, False):
            raise ConnectionResetError("lost")
        return real(self, path, mode, **more)

    monkeypatch.setattr(type(store), "open", failing)
    bucket = Bucket(run, waits.append)
    with bucket.replacing(overwrite=True) as place:
        entry = place.write("model.safetensors", [b"abc", b"def"])
    assert (entry["size"], bucket.part("model.safetensors", 0, 6), waits) == (6, b"abcdef", [0.1])


def test_damage_is_named(run: str) -> None:
    """A file that is not the one that was written is no checkpoint."""
    save(NEW, run)
    fsspec.filesystem("s3").pipe_file(f"{run[5:]}/optimizer.safetensors", b"x" * Bucket(run).size("optimizer.safetensors"))
    with pytest.raises(BrokenCheckpointError, match="optimizer.safetensors is altered"):
        load(run, TASK)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no s3fs is told what to install."""

    def missing(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(CheckpointError, match=r"Install s3fs to access S3; pip install 'fnlight\[s3\]'"):
        load("s3://bucket/a", TASK)


def test_a_run_on_s3_that_was_killed_goes_on_to_the_very_weights(run: str, server: str) -> None:
    """Two processes, the first of which is killed, end where one would have ended."""
    options = {"endpoint_url": server, "key": "a", "secret": "b"}
    environ = {**os.environ, "FSSPEC_S3": json.dumps(options), "OMP_NUM_THREADS": "1"}

    def trained_on(url: str, killed_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.checkpoint.remote_run", url, str(killed_at)]
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)

    assert trained_on(run, 8).returncode == -9
    resumed, whole = trained_on(run, 0), trained_on(f"{run}-whole", 0)
    assert resumed.returncode == whole.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout) == json.loads(whole.stdout)
