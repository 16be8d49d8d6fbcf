"""Checkpoints of several ranks: saved by some, read by any other number of them, and never lost."""

import json

import pytest
import torch

import fnlight as fl
from fnlight.checkpoint import newest, verify
from tests.parallel.launch import ran, torchrun
from tests.parallel.saved import content, fitted, on
from tests.parallel.sharded import make, numbers

SAVED = ("fsdp", "hsdp", "tensor parallel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where four ranks have saved, then two have read, saved and begun, one was killed, and two have gone on."""
    found = tmp_path_factory.mktemp("saved")
    ran("saved.py", 4, "four", found)
    ran("saved.py", 2, "two", found)
    torchrun("saved.py", 2, "kill", found)
    (found / "after the kill").write_text(newest(found / "killed") or "none")
    ran("saved.py", 2, "go on", found)
    return found


def told(folder, what, rank=0):
    return json.loads((folder / f"{what} {rank}.json").read_text())


def near(a, b):
    return a.keys() == b.keys() and all(torch.allclose(torch.tensor(a[n]), torch.tensor(b[n]), rtol=1e-5, atol=1e-6) for n in b)


@pytest.mark.parametrize("name", SAVED)
def test_four_ranks_save_what_two_load(folder, name):
    """Parameters, slots and averages are bitwise those that were saved, and parts again; training goes on from there."""
    saved, loaded = told(folder, "four"), told(folder, "two", 1)["fsdp"]
    assert loaded[name] == saved[name]
    assert loaded[f"{name}, cut"] == [True, True]
    assert loaded[f"{name}, restored"]
    assert near(loaded[f"{name}, later"], saved[f"{name}, later"])


@pytest.mark.parametrize("name", SAVED)
def test_four_ranks_save_what_one_process_loads(folder, name):
    """Alone, all of it is whole, and every file is sound."""
    saved = told(folder, "four")
    assert verify(folder / name) == []
    state = fl.load(folder / name, make())
    assert content(state) == saved[name]
    assert near(numbers(on(state, 2).params), saved[f"{name}, later"])


def test_replicas_write_once(folder):
    """Of the groups of hsdp one writes, and where layers are cut as well, every part has one writer."""
    names = {name: sorted(p.name for p in (folder / name).glob("model-*")) for name in SAVED}
    assert [len(names[name]) for name in SAVED] == [4, 2, 4]


def test_as_many_ranks_go_on_bitwise(folder):
    """Four ranks that load what four have saved end in the very weights that those would have had."""
    saved = told(folder, "four")
    assert saved["loaded"]["fsdp, later"] == saved["fsdp, later"]


def test_placements_read_each_other(folder):
    """DDP reads what FSDP saved, and the other way round."""
    saved, two = told(folder, "four"), told(folder, "two")
    assert two["ddp"]["fsdp"] == saved["fsdp"]
    assert two["ddp"]["fsdp, cut"] == [False, False]
    assert two["ddp as fsdp"]["ddp"] == two["saved by ddp"]["ddp"]
    assert two["ddp as fsdp"]["ddp, cut"] == [True, True]
    assert near(two["ddp as fsdp"]["ddp, later"], two["saved by ddp"]["ddp, later"])


def test_a_rank_reads_only_what_it_holds(folder):
    """From a store, into a model that was made without values: a half of the bytes, the manifest and headers."""
    for rank in range(2):
        found = told(folder, "two", rank)["bytes"]
        assert found["same"]
        assert found["read"] < 0.6 * found["there"]


def test_a_rank_that_cannot_write_is_named_by_all(folder):
    """The older checkpoint stands, and nothing is left beside it."""
    for rank in range(2):
        found = told(folder, "two", rank)["full"]
        assert "rank 1: [Errno 28] No space left on device" in found["told"]
        assert (found["stands"], found["beside"]) == (0, [])


def test_a_run_of_ranks_goes_on_bitwise(folder):
    """`fit` to 4 and on to 6 is `fit` to 6: weights, history with evaluations of an odd number of batches, and predictions."""
    whole, parts = told(folder, "two")["whole run"], told(folder, "go on")["whole run"]
    assert parts == whole
    assert whole["step"] == 6


def test_ranks_save_as_fast_as_all_their_disks_take_it(folder):
    """`continuous` saves at the same steps on all ranks, more than once, and the end of a run always."""
    first, second = (told(folder, "two", rank)["whenever"] for rank in range(2))
    assert first == second
    for steps, same in first:
        assert steps[-1] == 60
        assert len(steps) > 2
        assert same


def test_a_run_of_ranks_is_that_of_one_process(folder, tmp_path):
    """The same counts, and the same numbers but for rounding."""
    whole, alone = told(folder, "two")["whole run"], fitted(tmp_path / "alone", 6, None, parallel=None)
    assert near(whole["params"], alone["params"])
    assert torch.allclose(torch.tensor(whole["predicted"]), torch.tensor(alone["predicted"]), rtol=1e-4, atol=1e-5)
    assert [step for step, _ in whole["history"]] == [step for step, _ in alone["history"]]


def test_a_rank_that_is_killed_in_a_save_loses_nothing(folder):
    """The checkpoint before is the newest, and a run that goes on from it ends in the very weights of one that was not killed."""
    assert (folder / "after the kill").read_text().endswith("step-00000002")
    assert not (folder / "kill 0.json").exists()
    assert told(folder, "go on")["after a kill"] == told(folder, "two")["whole run"]
    assert not [p.name for p in (folder / "killed" / "checkpoints").iterdir() if p.name.startswith(".")]
