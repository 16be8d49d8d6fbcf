"""Every kind of byte of every file, flipped, cut off or overwritten: found, named, and the checkpoint before it used."""

import json
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnlight import load, save, verify
from fnlight.checkpoint import step_path
from fnlight.errors import CheckpointWarning
from tests.checkpoint.tasks import make_task, trained, unlike

TASK, OLD = make_task(), trained(steps=1)
TENSORS = ("model.safetensors", "optimizer.safetensors", "memory.safetensors")
REGIONS = [
    *((name, region) for name in TENSORS for region in ("length of the header", "header", "tensors")),
    *(("state.json", region) for region in ("format", "digest", "list of files", "digests of files", "anything else")),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run with the checkpoints of two steps."""
    run = tmp_path_factory.mktemp("runs") / "a"
    save(OLD, step_path(run, 1))
    save(trained(steps=2), step_path(run, 2))
    return run


def region_of(data, name, region):
    """The first and last place of a region of a file."""
    if name != "state.json":
        header = 8 + int.from_bytes(data[:8], "little")
        return {"length of the header": (0, 8), "header": (8, header), "tensors": (header, len(data))}[region]
    first = data.index(b"\n") + 1
    listed = data.index(b'"files"')
    digest = re.compile(rb"[a-z0-9]+:[0-9a-f]{16,}").search(data, listed)
    assert digest is not None
    return {
        "format": (0, data.index(b"digest")),
        "digest": (data.index(b"digest"), first),
        "list of files": (listed, len(data)),
        "digests of files": digest.span(),
        "anything else": (first, listed),
    }[region]


def damaged(data, start, stop, kind, place, bit):
    """The bytes after one kind of damage in a region."""
    at = start + int(place * (stop - start - 1))
    if kind == "flipped":
        return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
    if kind == "cut off":
        return data[:at]
    if kind == "zeroed":
        return data[:at] + bytes(min(8, stop - at)) + data[at + min(8, stop - at) :]
    if kind == "missing":
        return data[:at] + data[at + 1 :]
    return data[:at] + bytes([bit]) + data[at:]  # one too many


@pytest.mark.parametrize(("name", "region"), REGIONS, ids=[f"{region} of {name}" for name, region in REGIONS])
def test_damage_anywhere_is_found_and_the_previous_checkpoint_is_used(sound, name, region):
    """Sampled over places, bits and kinds of damage in each region: the file is named, nothing damaged is loaded, the one before it is."""

    @settings(max_examples=settings.default.max_examples // 4)
    @given(st.sampled_from(["flipped", "cut off", "zeroed", "missing", "too many"]), st.floats(0, 1), st.integers(0, 7))
    def found(kind, place, bit):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(shutil.copytree(sound, Path(folder) / "a"))
            file = Path(step_path(run, 2)) / name
            data = file.read_bytes()
            changed = damaged(data, *region_of(data, name, region), kind, place, bit)
            if changed == data:
                return
            file.write_bytes(changed)
            problems = verify(file.parent)
            assert any(name in problem for problem in problems), (kind, place, problems)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                state = load(run, TASK)
            assert [w.category for w in caught] == [CheckpointWarning]
            assert re.search(rf"skipped a broken checkpoint: .*step-00000002 is broken: .*{name}", str(caught[0].message), re.DOTALL)
            assert unlike(state, OLD) == []

    found()


def test_the_regions_are_the_whole_of_every_file(sound):
    """No byte is left out of the list above."""
    path = Path(step_path(sound, 2))
    assert {p.name for p in path.iterdir()} == {name for name, _ in REGIONS}
    for name in {name for name, _ in REGIONS}:
        data = (path / name).read_bytes()
        spans = sorted(region_of(data, name, region) for other, region in REGIONS if other == name)
        reached = 0
        for start, stop in spans:
            assert start <= reached, (name, spans)
            reached = max(reached, stop)
        assert reached == len(data)
    assert json.loads((path / "state.json").read_bytes())["seed"] == 5
