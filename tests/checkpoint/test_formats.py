"""Older formats: every one is read, each migration is pure, and a run that an older version saved resumes to the same weights."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fnlight as fl
from fnlight.checkpoint import parse
from fnlight.checkpoint.migrations import FORMAT, MIGRATIONS, migrate
from fnlight.tensors import differences
from tests.checkpoint.golden import ASSETS, CASES, IN_PARTS, case_of, draw, held, machine, plain, unpacked, values

GOLDEN = sorted(ASSETS.glob("format-*/*.json"), key=lambda path: (int(path.parent.name.partition("-")[2]), path.name))
NEW = {"epoch_samples", "parts", "skipped"}  # what a later format added, and what is therefore not in the record of an older one


def golden(path: Path) -> dict[str, Any]:
    """What is kept of one checkpoint."""
    return json.loads(path.read_text(encoding="ascii"))


def name_of(path: Path) -> str:
    """How a test of it is called."""
    return f"{path.parent.name}/{path.stem}"


def raw(path: Path, folder: Path) -> dict[str, Any]:
    """The sections of a kept manifest as they were written."""
    body = json.loads((unpacked(golden(path), folder) / "state.json").read_bytes())
    return {key: value for key, value in body.items() if key not in ("format", "digest")}


def test_every_format_has_checkpoints_that_are_kept() -> None:
    """Of each format up to the present one there is a checkpoint of every case that there was then."""
    assert {(path.parent.name, golden(path)["case"]) for path in GOLDEN} == {
        *((f"format-{n}", name) for name, case in CASES.items() for n in range(case.since, FORMAT + 1)),
        *((f"format-{n}", IN_PARTS) for n in range(3, FORMAT + 1)),
    }


@pytest.mark.parametrize("path", GOLDEN, ids=name_of)
def test_a_kept_checkpoint_is_read_to_the_bit(path: Path, tmp_path: Path) -> None:
    """Weights, slots, memory, history and counts are those that were written."""
    kept = golden(path)
    state = fl.load(unpacked(kept, tmp_path / "a"), case_of(kept["case"]).task())
    found = held(state)
    assert {name: found.get(name) for name in kept["saved"]} == kept["saved"]
    assert {name.rpartition("/")[2] for name in found.keys() - kept["saved"].keys()} <= NEW


@pytest.mark.parametrize("path", GOLDEN, ids=name_of)
def test_a_kept_run_goes_on_to_the_weights_that_it_reached(path: Path, tmp_path: Path) -> None:
    """Bitwise where torch and this machine round as those of the record did; elsewhere sums of floats may be taken in another order.

    Where the record holds the last state whole, averages, optimizer states, history and counts are compared as well.
    """
    kept = golden(path)
    case = case_of(kept["case"])
    if case.draws and draw() != kept["draw"]:
        pytest.skip("the generator of this machine gives other dropout masks")
    recorded = kept.get("plain") or golden(path.with_name("own-position.json"))["end"]  # of the same day, on the same machine
    last = case.on(fl.load(unpacked(kept, tmp_path / "a"), case.task()), case.total - case.saved)
    end, ended = values(last), held(last)
    if machine() == kept["machine"] and plain() == recorded:
        assert end == kept["end"]
        wanted = {name: value for name, value in kept.get("ended", {}).items() if name != "progress/seconds"}
        assert {name: ended.get(name) for name in wanted} == wanted
    assert end.keys() == kept["end"].keys()
    for name in end.keys() - case.unsure:
        torch.testing.assert_close(torch.tensor(end[name]), torch.tensor(kept["end"][name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", range(1, FORMAT))
def test_a_migration_is_pure(number: int, tmp_path: Path) -> None:
    """It leaves its input as it is, and gives the same for the same."""
    for i, path in enumerate(path for path in GOLDEN if path.parent.name == f"format-{number}"):
        body = raw(path, tmp_path / f"{i}")
        before = copy.deepcopy(body)
        assert MIGRATIONS[number - 1](body) == MIGRATIONS[number - 1](body) != before
        assert list(differences(body, before)) == []


def test_the_present_format_is_not_migrated(tmp_path: Path) -> None:
    """What was written today is read as it stands."""
    body = raw(GOLDEN[-1], tmp_path / "a")
    assert migrate(body, FORMAT) is body


def test_an_older_format_says_what_it_can_of_the_samples_of_an_epoch() -> None:
    """They are known in the first epoch and between two, and unknown, which is 0, within a later one."""
    known = {(0, 3): 12, (1, 0): 0, (1, 3): 0}
    for (epoch, batch), samples in known.items():
        body = migrate({"progress": {"epoch": epoch, "batch": batch, "samples": 12}}, 1)
        assert body["progress"]["epoch_samples"] == samples


def test_a_kept_manifest_of_the_first_format_is_brought_to_the_present_one(tmp_path: Path) -> None:
    """`parse` gives the sections of today, whatever the format."""
    folder = unpacked(golden(GOLDEN[0]), tmp_path / "a")
    assert (folder / "state.json").read_bytes().startswith(b'{"format": 1,')
    assert parse((folder / "state.json").read_bytes())["progress"]["epoch_samples"] >= 0
