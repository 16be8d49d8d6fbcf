"""Damaged and hostile files: detected, named, and skipped for the previous checkpoint; never run, never followed."""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fnlight.checkpoint import checkpoints, load, load_weights, newest, parse, restore, save, step_path, verify
from fnlight.checkpoint.manifest import render
from fnlight.checkpoint.migrations import FORMAT
from fnlight.errors import BrokenCheckpointError, CheckpointError, CheckpointWarning
from fnlight.state import TrainState
from tests.checkpoint.tasks import adamw, files, forge, forge_bytes, make_task, trained, unlike

FILES = ("model.safetensors", "optimizer.safetensors", "memory.safetensors", "state.json")
STATE, TASK = trained(), make_task()


def flip(file: Path, place: float = 0.5) -> None:
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "flipped at the start": lambda file: flip(file, 0.0),
    "flipped in the middle": flip,
    "flipped at the end": lambda file: flip(file, 1.0),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "deleted": Path.unlink,
    "a directory": lambda file: (file.unlink(), file.mkdir()),
    "of the other step": lambda file: shutil.copy(file.parents[1] / "step-00000001" / file.name, file),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of two steps; tests copy it."""
    run = tmp_path_factory.mktemp("runs") / "a"
    save(trained(steps=1), step_path(run, 1))
    save(STATE, step_path(run, 2))
    return run


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A run of its own."""
    return Path(shutil.copytree(sound, tmp_path / "a"))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_torn_file_is_named_and_the_previous_checkpoint_is_used(run: Path, name: str, damage: str) -> None:
    """Whatever happens to any file of the newest checkpoint, a reader says which file it is and takes the one before."""
    path = Path(step_path(run, 2))
    DAMAGE[damage](path / name)
    if (name, damage) == ("state.json", "of the other step"):
        name = "optimizer.safetensors"  # the manifest itself is valid, but the files are not those that it lists
    assert any(name in problem for problem in verify(path))
    with pytest.raises(BrokenCheckpointError, match=f"{re.escape(str(path))} is broken: .*{name}"):
        load(path, TASK)
    with pytest.warns(CheckpointWarning, match=f"skipped a broken checkpoint: .*step-00000002 is broken: .*{name}"):
        found = load(run, TASK)
    assert unlike(found, trained(steps=1)) == []


def test_every_flipped_bit_of_the_manifest_is_found(sound: Path) -> None:
    """There is no bit of `state.json` that can change unseen."""
    data = (Path(step_path(sound, 2)) / "state.json").read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        with pytest.raises(BrokenCheckpointError, match=r"state\.json"):
            parse(bytes(changed))


@given(st.binary() | st.binary().map(lambda rest: b'{"format": 2, "digest": "sha256:' + b"0" * 64 + b'",\n' + rest))
def test_any_bytes_are_refused_as_a_manifest(data: bytes) -> None:
    """Random bytes give the error for broken checkpoints and no other."""
    with pytest.raises(BrokenCheckpointError, match=r"state\.json"):
        parse(data)


def test_a_size_says_more_than_a_digest(run: Path) -> None:
    """A file that is cut short is told apart from one that is altered, without reading all of it."""
    file = Path(step_path(run, 2)) / "model.safetensors"
    size = file.stat().st_size
    DAMAGE["cut short"](file)
    assert verify(file.parent) == [f"model.safetensors has {size - 1} bytes, but {size} were written"]


def test_all_broken_is_an_error_and_no_newest(run: Path) -> None:
    """Where no checkpoint is valid, nothing is loaded, and each one is named."""
    for step in (1, 2):
        flip(Path(step_path(run, step)) / "model.safetensors")
    with (
        pytest.warns(CheckpointWarning, match="step-00000001 is broken"),
        pytest.warns(CheckpointWarning, match="step-00000002 is broken"),
        pytest.raises(BrokenCheckpointError, match=r"none of the 2 checkpoints in .* is valid"),
    ):
        load(run, TASK)
    with pytest.warns(CheckpointWarning, match=r"model.safetensors is altered"):
        assert newest(run) is None


def test_a_save_that_was_cut_short_has_no_commit_mark(run: Path) -> None:
    """Files without a manifest are no checkpoint; a hidden one that was being written is not even looked at."""
    path = Path(step_path(run, 3))
    path.mkdir()
    shutil.copy(Path(step_path(run, 2)) / "model.safetensors", path)
    shutil.copytree(step_path(run, 2), path.parent / ".step-00000004.tmp-0123abcd")
    assert [step for step, _ in checkpoints(run)] == [1, 2, 3]
    with pytest.warns(CheckpointWarning, match=r"step-00000003 is broken: state\.json is missing: the save was interrupted"):
        assert newest(run) == step_path(run, 2)


def test_a_checkpoint_of_format_1_is_read_and_its_damage_found(run: Path) -> None:
    """Its files have other digests, it knows no layouts, and all else is the same."""
    path = Path(step_path(run, 2))

    def older(body: dict[str, Any]) -> None:
        del body["layouts"]
        for name, entry in body["files"].items():
            entry["digest"] = f"sha256:{hashlib.sha256((path / name).read_bytes()).hexdigest()}"

    forge(path, older)
    manifest = path / "state.json"
    manifest.write_bytes(manifest.read_bytes().replace(f'"format": {FORMAT}'.encode(), b'"format": 1', 1))
    assert verify(path) == []
    assert unlike(load(path, TASK), STATE) == []
    flip(path / "optimizer.safetensors")
    assert verify(path) == ["optimizer.safetensors is altered: its digest differs from the one in state.json"]


@pytest.mark.parametrize("older", range(1, FORMAT))
def test_a_format_that_was_altered_to_an_older_one_is_found(run: Path, older: int) -> None:
    """A flipped bit may turn the number of the format into that of another one, whose sections are others."""
    file = Path(step_path(run, 2)) / "state.json"
    file.write_bytes(file.read_bytes().replace(f'"format": {FORMAT}'.encode(), f'"format": {older}'.encode(), 1))
    assert verify(file.parent) != []
    with pytest.warns(CheckpointWarning, match="step-00000002 is broken: .*has layouts, which only format 3 has"):
        assert newest(run) == step_path(run, 1)


def test_a_newer_format_says_which_version_reads_it(run: Path) -> None:
    """A checkpoint of a newer fnlight is refused with the version to install."""
    file = Path(step_path(run, 2)) / "state.json"
    text = re.sub('"fnlight": "[^"]*"', '"fnlight": "9.1"', file.read_text().replace(f'"format": {FORMAT}', '"format": 70'))
    file.write_text(text)
    with pytest.raises(
        BrokenCheckpointError, match=r"state\.json has format 70, written by fnlight 9\.1, .*; install fnlight 9\.1 or later"
    ):
        load(file.parent, TASK)


def _rename(body: dict[str, Any], name: str) -> None:
    body["files"][name] = body["files"].pop("model.safetensors")


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a path upwards": lambda body: _rename(body, "../secret.safetensors"),
    "an absolute path": lambda body: _rename(body, "/etc/passwd"),
    "a path through a name": lambda body: _rename(body, "model.safetensors/../../secret.safetensors"),
    "a file of its own": lambda body: body["files"].update({"weights.pt": body["files"]["model.safetensors"]}),
    "no model": lambda body: body["files"].pop("model.safetensors"),
    "a negative size": lambda body: body["files"]["model.safetensors"].update(size=-1),
    "a size as text": lambda body: body["files"]["model.safetensors"].update(size="9"),
    "another digest": lambda body: body["files"]["model.safetensors"].update(digest="md5:0"),
    "no digest": lambda body: body["files"]["model.safetensors"].pop("digest"),
    "files as a list": lambda body: body.update(files=[1]),
    "a tensor too many": lambda body: body["files"]["model.safetensors"]["tensors"].update(evil=["float32", [2]]),
    "a tensor too few": lambda body: body["files"]["model.safetensors"]["tensors"].pop("scale"),
    "another shape": lambda body: body["files"]["model.safetensors"]["tensors"].update(scale=["float32", [1 << 60]]),
    "another dtype": lambda body: body["files"]["model.safetensors"]["tensors"].update(scale=["complex128", []]),
    "an import for a dtype": lambda body: body["files"]["model.safetensors"]["tensors"].update(scale=["os.system", []]),
    "a shape as text": lambda body: body["files"]["model.safetensors"]["tensors"].update(scale=["float32", "abc"]),
    "no progress": lambda body: body.pop("progress"),
    "a negative step": lambda body: body["progress"].update(step=-1),
    "a step as text": lambda body: body["progress"].update(step="2"),
    "a field too many": lambda body: body["progress"].update(owner=1),
    "a seed as a list": lambda body: body.update(seed=[1]),
    "a reason as a number": lambda body: body.update(stopped=1),
    "history as text": lambda body: body.update(history=["abcd"]),
    "memory as a list": lambda body: body.update(memory=[1]),
    "an unknown tag": lambda body: body["memory"].update(x={"$exec": "import os"}),
    "a reference to nothing": lambda body: body["memory"].update(x={"$tensor": "nothing"}),
    "slots as text": lambda body: body["optimizer"]["slots"].update(scale="text"),
    "an optimizer as text": lambda body: body.update(optimizer="Adam"),
    "groups as a number": lambda body: body["optimizer"].update(groups=3),
    "a group without values": lambda body: body["optimizer"]["groups"][0].pop("values"),
    "buffers of no tensors": lambda body: body.update(buffers={"seen": 3}),
    "a smaller slot under a fused kernel": lambda body: body["optimizer"]["slots"]["embed.weight"].update(
        exp_avg=body["optimizer"]["slots"]["embed.weight"]["step"]
    ),
    "a step count of another kind": lambda body: body["optimizer"]["slots"]["embed.weight"].update(
        step=body["optimizer"]["slots"]["embed.weight"]["exp_avg"]
    ),
}


@pytest.mark.parametrize("change", HOSTILE)
def test_a_hostile_manifest_is_refused(run: Path, change: str) -> None:
    """A manifest that lies, with a digest that holds, gives the error for broken checkpoints, and opens no other file."""
    path = step_path(run, 2)
    shutil.copy(Path(path) / "model.safetensors", run / "checkpoints" / "secret.safetensors")
    forge(path, HOSTILE[change])
    with pytest.raises(BrokenCheckpointError, match=r"step-00000002 is broken: .*(state\.json|model\.safetensors)"):
        load(path, TASK)


@pytest.mark.parametrize(
    "old, new",
    [
        ('"seed": 5', '"seed": 5,\n"seed": 6'),
        ('"seed": 5', '"seed": NaN'),
        ('"memory": {', '"memory": {"deep": ' + "[" * 100_000 + "]" * 100_000 + ","),
        ('"seed": 5', '"seed": ' + "9" * 5000),
        ("}\n}\n", "}\n} {}\n"),
    ],
    ids=["a key twice", "no JSON", "deep", "a long number", "more behind it"],
)
def test_json_that_fnlight_does_not_write_is_refused(run: Path, old: str, new: str) -> None:
    """Only strict JSON is read, in bounded depth."""
    path = step_path(run, 2)
    forge_bytes(path, lambda text: text.replace(old, new, 1) if text.count(old) else pytest.fail(f"no {old}"))
    with pytest.raises(BrokenCheckpointError, match=r"state\.json has content that fnlight does not write"):
        load(path, TASK)


def test_a_file_cannot_switch_on_a_kernel(run: Path) -> None:
    """How an optimizer computes is decided by the code, whatever the file says: fused kernels trust their input."""
    path, task = step_path(run, 2), make_task(lambda model: adamw(model, fused=False, foreach=False))
    forge(path, lambda body: [group["configured"].update(fused=False, foreach=False) for group in body["optimizer"]["groups"]])
    assert [group["fused"] for group in load(path, task).store.optim.optimizer.param_groups] == [False, False]


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    """A file of ``torch.save`` is refused, with the way to convert it, and nothing in it runs."""

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "evil",)

    torch.save(Evil(), tmp_path / "weights.pt")
    with pytest.raises(
        BrokenCheckpointError, match=r"weights\.pt cannot be read as a safetensors file: .* pickles .* are not loaded: convert"
    ):
        load_weights(STATE, tmp_path / "weights.pt")
    assert not (tmp_path / "evil").exists()


def test_reading_changes_no_file(run: Path) -> None:
    """Loading, verifying and listing leave every byte of a run as it is."""
    flip(Path(step_path(run, 2)) / "memory.safetensors")
    before = files(run)
    with pytest.warns(CheckpointWarning, match=r"memory\.safetensors is altered"):
        load(run, TASK)
    assert verify(step_path(run, 1)) == []
    assert files(run) == before


@pytest.mark.parametrize(
    "reader", [lambda path: load(path, TASK), lambda path: restore(path, STATE), lambda path: load_weights(STATE, path)]
)
def test_no_checkpoint_is_an_error_that_says_what_is_there(tmp_path: Path, reader: Callable[[Path], Any]) -> None:
    """A wrong path is answered with what stands there instead."""
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*/none: there is no such directory"):
        reader(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*: it contains \['notes.txt'\]"):
        reader(tmp_path)


def test_steps_are_sorted_by_number(tmp_path: Path) -> None:
    """Nine digits come after eight; other names are no checkpoints."""
    for name in ("step-99999999", "step-100000000", "step-00000007", "step-7", "step-0000000x", "best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [step for step, _ in checkpoints(tmp_path)] == [7, 99_999_999, 100_000_000]
    assert checkpoints(tmp_path) == checkpoints(tmp_path / "checkpoints")
    assert checkpoints(tmp_path)[-1][1] == step_path(tmp_path, 100_000_000)


def test_a_run_loads_by_its_directory_or_by_that_of_its_checkpoints(run: Path) -> None:
    """Both give the newest; a path to one checkpoint gives that one."""
    assert unlike(load(run, TASK), STATE) == []
    assert unlike(load(run / "checkpoints", TASK), STATE) == []
    assert load(step_path(run, 1), TASK).progress.step == 1
    assert unlike(restore(run, TrainState.create(TASK)), STATE) == []


def test_weights_that_were_exported_into_a_run_are_no_checkpoint(run: Path) -> None:
    """The directory of a run is one, whatever else somebody puts there."""
    (run / "model.safetensors").write_bytes((Path(step_path(run, 1)) / "model.safetensors").read_bytes())
    assert unlike(load(run, TASK), STATE) == []


def test_an_old_manifest_without_a_version_is_not_guessed_at() -> None:
    """A manifest of format 0, which never was, is refused."""
    with pytest.raises(BrokenCheckpointError, match="was not written by fnlight, or its first line is damaged"):
        parse(render({"files": {}}).replace(f'"format": {FORMAT}'.encode(), b'"format": 0'))
