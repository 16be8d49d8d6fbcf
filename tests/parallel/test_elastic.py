"""Ranks that die, raise or change in number: a run resumes from the newest valid checkpoint, with the same result."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.parallel.launch import ran, torchrun
from tests.parallel.test_law import distance


def result(folder: Path):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run on two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ran("runs.py", 2, folder)
    return folder


def test_a_rank_that_is_killed_changes_nothing(undisturbed, tmp_path):
    """torchrun starts both again; weights, averages and history are bitwise those of the run that was not disturbed."""
    ran("runs.py", 2, tmp_path, "kill", restarts=1)
    assert (tmp_path / "read-1-0.txt").exists(), "nobody was killed"
    assert result(tmp_path) == result(undisturbed)


def test_other_numbers_of_ranks_train_on_the_same_samples(undisturbed, tmp_path):
    """Four ranks, then two, then three: every epoch has every sample once, and the weights are those of two ranks within 1e-5."""
    for ranks, steps in ((4, 5), (2, 8), (3, 12)):
        ran("runs.py", ranks, tmp_path, "", steps)
    found, wanted = result(tmp_path), result(undisturbed)
    assert (found["step"], found["samples"]) == (wanted["step"], wanted["samples"])
    for name, value in wanted["weights"].items():
        assert distance(found["weights"][name], value) < 1e-5
    for epoch, (mine, its) in enumerate(zip(found["history"], wanted["history"], strict=True)):
        # in the third epoch the number changes: there plain numbers have counted once for each rank
        same = [name for name in its if epoch != 2 or name.startswith("val/")]
        assert {name: mine[name] for name in same} == pytest.approx({name: its[name] for name in same}, rel=1e-5)
    read = Counter(line for path in tmp_path.glob("read-*.txt") for line in path.read_text().split())
    assert set(read) == {str(i) for i in range(24)}
    assert torch.tensor(list(read.values())).float().mean() < 7  # six epochs, and what was read ahead of an end


@pytest.mark.parametrize(("fault", "says"), [("raise", "ValueError: sample"), ("kill", "Signal 9 (SIGKILL)")])
def test_a_rank_that_is_lost_ends_the_others_within_half_a_minute(tmp_path, fault, says):
    """Nobody waits for it; one that raises is heard before whatever the others say of a connection that is gone."""
    done = torchrun("runs.py", 2, tmp_path, fault)
    lost = (tmp_path / "read-0-1.txt").stat().st_mtime  # when it read its last sample
    assert done.returncode != 0
    assert time.time() - lost < 30
    assert says in done.stderr
    if fault == "raise":
        assert "Connection" not in done.stderr[: done.stderr.index(says)]
