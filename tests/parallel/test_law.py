"""Law 4: 1, 2 and 4 ranks with the same global batch have the same trajectory and exactly the same counts."""

import json

import pytest
import torch

from tests.parallel.launch import ran
from tests.parallel.trajectories import ROUGH, RUNS, everything, pipes_on

RANKS = (2, 4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gives."""
    return everything(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What each rank of so many gives."""
    found = {}
    for ranks in RANKS:
        folder = tmp_path_factory.mktemp("together")
        ran("trajectories.py", ranks, folder)
        found[ranks] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return found


def distance(a, b):
    """How far two tensors are apart, in the norm of the second."""
    a, b = (torch.tensor(each, dtype=torch.float64) for each in (a, b))
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def assert_close(found, wanted, bound):
    """Numbers of the same names, each within a bound of the other."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=bound, nan_ok=True), name


@pytest.mark.parametrize(("name", "ranks"), [(name, ranks) for ranks in RANKS for name in (*RUNS, *pipes_on(ranks))])
def test_weights_do_not_depend_on_the_number_of_ranks(name, ranks, alone, together):
    """Within 1e-5 of one process (of sums in sixteen bits: within 1e-2), bitwise the same on all ranks, after the same counts."""
    found, wanted = together[ranks][0][name], alone[name]
    assert found["counts"] == wanted["counts"]
    for key, value in wanted["weights"].items():
        assert distance(found["weights"][key], value) < (1e-2 if name in ROUGH else 1e-5), key
    assert all(other[name]["weights"] == found["weights"] and other[name]["counts"] == found["counts"] for other in together[ranks])


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", RUNS)
def test_what_is_measured_does_not_depend_on_the_number_of_ranks(name, ranks, alone, together):
    """History, log and evaluation are those of one process, the same on all ranks; one rank writes the log."""
    wanted = alone[name]
    for rank, each in enumerate(together[ranks]):
        found = each[name]
        assert len(found["history"]) == len(wanted["history"])
        for mine, its in zip(found["history"], wanted["history"], strict=True):
            assert_close(mine, its, 1e-5)
        assert found["history"] == together[ranks][0][name]["history"]
        assert_close(found["evaluated"], wanted["evaluated"], 1e-5)
        assert (found["logged"] is None) == (rank > 0)
    for mine, its in zip(together[ranks][0][name]["logged"], wanted["logged"], strict=True):
        assert_close(mine, its, 1e-5)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", RUNS)
def test_predictions_come_in_the_order_of_the_data(name, ranks, alone, together):
    """Every sample is predicted on exactly once, and gathered where it stands in the loader."""
    assert all(each[name]["predicted"] == alone[name]["predicted"] for each in together[ranks])
