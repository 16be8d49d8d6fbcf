"""Checkpoints that several ranks have written: complete for every reader, checked part by part, and read byte by byte as needed."""

import json
import re
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import fnlight as fl
from fnlight.checkpoint import at, chunks, parse, verify
from fnlight.checkpoint.layout import Layout, overlap
from fnlight.checkpoint.manifest import render
from fnlight.checkpoint.pieces import read_pieces
from fnlight.cli import run
from fnlight.errors import BrokenCheckpointError
from tests.checkpoint.golden import CASES
from tests.checkpoint.parted import GRID, ROWS, save_in_parts
from tests.checkpoint.tasks import unlike

CASE = CASES["norm, dropout, schedule"]


@pytest.fixture(scope="module")
def state():
    """A state with memory of every kind."""
    return CASE.on(fl.TrainState.create(CASE.task(), seed=7), 4)


def changed(path: Path, change) -> None:
    """Let a manifest say something else, with a digest that holds."""
    body = {key: value for key, value in parse((path / "state.json").read_bytes()).items() if key not in ("format", "digest")}
    change(body)
    (path / "state.json").write_bytes(render(body))


def read_by_torch(found, folder) -> None:
    """Fill tensors by torch's reader of Hugging Face checkpoints."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


@pytest.mark.parametrize("layout", [ROWS, GRID], ids=["rows", "rows and columns"])
@pytest.mark.parametrize("place", ["folder", "store"])
def test_parts_are_read_as_the_whole(state, tmp_path, layout, place):
    """`load` and `restore` give bitwise the state, from a folder and from a store."""
    path = f"{tmp_path}/a" if place == "folder" else f"local://{tmp_path}/a"
    (tmp_path / "a").mkdir()
    save_in_parts(state, path, layout)
    assert unlike(fl.load(path, CASE.task()), state) == []
    assert unlike(fl.restore(path, like=fl.TrainState.create(CASE.task())), state) == []


def test_other_readers_find_the_parts_and_their_places(state, tmp_path):
    """A safetensors reader reads each file; torch's reader for Hugging Face checkpoints puts them together."""
    path = save_in_parts(state, tmp_path / "a")
    (tmp_path / "b").mkdir()
    for file in path.glob("model-*"):
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    with safe_open(path / "model-00002-of-00003.safetensors", "pt") as file:
        assert json.loads(file.metadata()["DCP_SHARDING_INFO"])["0.weight"] == {"saved_offsets": [2, 0]}
    found = {name: torch.zeros_like(p) for name, p in state.params.items()}
    read_by_torch(found, tmp_path / "b")
    assert all(torch.equal(found[name], p) for name, p in state.params.items())


def test_export_puts_them_together(state, tmp_path, capsys):
    """One file that ordinary readers, and torch's, take for the model's weights."""
    path, file = save_in_parts(state, tmp_path / "a"), tmp_path / "b" / "model.safetensors"
    file.parent.mkdir()
    assert run(["export", str(path), str(file)]) == 0
    assert all(torch.equal(load_file(file)[name], p) for name, p in state.params.items())
    found = {name: torch.zeros_like(p) for name, p in state.params.items()}
    read_by_torch(found, file.parent)
    assert all(torch.equal(found[name], p) for name, p in state.params.items())


def test_the_command_line_knows_parts(state, tmp_path, capsys):
    """`inspect` lists the files, `verify` names what is missing, and `diff` finds no difference to the whole."""
    parts, whole = save_in_parts(state, tmp_path / "parts"), fl.save(state, tmp_path / "whole")
    assert run(["inspect", str(parts)]) == 0
    assert "model-00002-of-00003.safetensors" in capsys.readouterr().out
    assert run(["diff", str(parts), str(whole)]) == 0
    assert run(["verify", str(parts)]) == 0
    (parts / "optimizer-00003-of-00003.safetensors").unlink()
    capsys.readouterr()
    assert run(["verify", str(parts)]) != 0
    assert "optimizer-00003-of-00003.safetensors is missing" in capsys.readouterr().out


def test_missing_and_altered_parts_are_named(state, tmp_path):
    """Which file of which rank it is stands in the error; the checkpoint before is taken."""
    path = save_in_parts(state, tmp_path / "a")
    data = (path / "model-00003-of-00003.safetensors").read_bytes()
    (path / "model-00003-of-00003.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BrokenCheckpointError, match=r"model-00003-of-00003\.safetensors is altered"):
        fl.load(path, CASE.task())
    (path / "model-00001-of-00003.safetensors").unlink()
    assert verify(path) == [
        "model-00001-of-00003.safetensors is missing",
        "model-00003-of-00003.safetensors is altered: its digest differs from the one in state.json",
    ]
    with pytest.raises(BrokenCheckpointError, match=r"model-00001-of-00003\.safetensors is missing"):
        fl.load(path, CASE.task())


def _set(name, value):
    return lambda body: body["files"]["model.safetensors"].update({name: value})


HOSTILE = {
    "a layout of other files": lambda body: body["layouts"][0].update(files=[0, 1, 7]),
    "a layout with too few files": lambda body: body["layouts"][0].update(files=[0, 1]),
    "a negative dimension": lambda body: body["layouts"][0].update(cuts=[[-1, 3]]),
    "a dimension that there is not": lambda body: body["layouts"][0].update(cuts=[[5, 3]]),
    "no parts": lambda body: body["layouts"][0].update(cuts=[[0, 0]], files=[]),
    "a layout that is not listed": lambda body: body["files"]["model.safetensors"]["cut"].update({"0.weight": 3}),
    "a size that is no number": _set("parts", [["8", "sha256:" + "0" * 64]] * 3),
    "an enormous tensor": lambda body: body["files"]["model.safetensors"]["tensors"].update({"0.weight": ["float32", [1 << 40, 1 << 10]]}),
    "the name of a part": lambda body: body["files"].update({"model-00001-of-00003.safetensors": body["files"].pop("model.safetensors")}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_manifest_that_lies_about_parts_is_refused(state, tmp_path, name):
    """Nothing is allocated and no other file is opened for what does not fit together."""
    path = save_in_parts(state, tmp_path / "a")
    changed(path, HOSTILE[name])
    with pytest.raises(BrokenCheckpointError, match="is broken"):
        fl.load(path, CASE.task())


def test_parts_that_do_not_fit_their_manifest_are_named(state, tmp_path):
    """Another cut than the files have is found by `verify` from the headers, and by `load`."""
    path = save_in_parts(state, tmp_path / "a")
    changed(path, lambda body: body["files"]["model.safetensors"]["cut"].pop("0.weight"))
    says = "model-00001-of-00003.safetensors holds 0.weight as torch.float32 [2, 3], but state.json says torch.float32 [6, 3]"
    assert verify(path)[0] == says
    assert len(verify(path)) == 3
    with pytest.raises(BrokenCheckpointError, match=re.escape(says)):
        fl.load(path, CASE.task())


def boxes(shape):
    """Some parts of a shape."""
    for starts in product(*(range(0, n, 2) for n in shape)):
        yield starts, tuple(min(3, n - s) for s, n in zip(starts, shape, strict=True))


@pytest.mark.parametrize("layout", [Layout(), ROWS, GRID, Layout(((0, 2), (0, 2)), (0, 1, 2, 3)), Layout(((1, 5),), (4, 3, 2, 1, 0))])
@pytest.mark.parametrize("kind", [torch.float32, torch.complex128, torch.bfloat16])
def test_any_part_is_read_from_any_cut(layout, kind, monkeypatch):
    """However it is cut in files, and whatever part is wanted, the values are those of the whole."""
    whole = torch.arange(7 * 5).reshape(7, 5).to(kind)
    files = {}
    for number in range(1 + max(layout.files)):
        own = dict(("x", cell[1:]) for cell in layout.part(number, whole.shape))  # noqa: C402  # one or none
        cut = {name: whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))] for name, box in own.items()}
        name = f"a-{number + 1:05d}-of-{1 + max(layout.files):05d}.b"
        files[name] = b"".join(bytes(chunk) for chunk in chunks(cut, {name: box[0] for name, box in own.items()}))
    entry = {"parts": [[0, ""]] * len(files), "tensors": {"x": [str(kind)[6:], [7, 5]]}, "cut": {"x": 0}}
    read = lambda name, start, end: files[name][start:end]  # too short for a name
    into = lambda name, start, view: view.__setitem__(slice(None), files[name][start : start + len(view)])
    for box in boxes(whole.shape):
        monkeypatch.setattr("fnlight.checkpoint.pieces.box", lambda home, box=box: box)
        monkeypatch.setattr("fnlight.checkpoint.pieces.like_parts", lambda value, home: value)
        for straight in (None, into):
            found = read_pieces(read, lambda name: len(files[name]), "a.b", entry, [layout], lambda name, shape: whole, straight)["x"]
            assert torch.equal(found, whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))])


def test_only_the_rows_that_are_wanted_are_read(monkeypatch):
    """Of a file of 64 rows a rank that holds two asks for two, besides the header."""
    data = b"".join(bytes(chunk) for chunk in chunks({"x": torch.zeros(64, 1024)}))
    monkeypatch.setattr("fnlight.checkpoint.pieces.box", lambda home: ((6, 0), (2, 1024)))
    monkeypatch.setattr("fnlight.checkpoint.pieces.like_parts", lambda value, home: value)
    asked = list[int]()

    def read(name, start, end):
        asked.append(end - start)
        return data[start:end]

    read_pieces(read, lambda name: len(data), "a", {"tensors": {"x": ["float32", [64, 1024]]}}, [], lambda name, shape: torch.zeros(1))
    assert max(asked) == 2 * 4096
    assert sum(asked) < 2 * 4096 + 512


def test_boxes_overlap_where_both_reach():
    """In every dimension."""
    assert overlap(((0, 0), (2, 2)), ((1, 1), (4, 4))) == ((1, 1), (1, 1))
    assert overlap(((0, 0), (2, 2)), ((2, 0), (4, 4))) is None


def test_a_checkpoint_of_parts_is_replaced_whole(state, tmp_path):
    """Files of another number of ranks do not stay behind, neither in a folder nor in a store; others' files are refused."""
    for path in (f"{tmp_path}/a", f"local://{tmp_path}/b"):
        (tmp_path / path[-1]).mkdir()
        save_in_parts(state, path)
        fl.save(state, path)
        assert not [name for name in at(path).names() if "-of-" in name]
    save_in_parts(state, tmp_path / "c")
    (tmp_path / "c" / "notes.txt").write_text("mine")
    with pytest.raises(fl.errors.CheckpointError, match="it contains notes.txt"):
        fl.save(state, tmp_path / "c")
