"""`ddp`: the gradients of all ranks are those of one process, and bit-identical to those of torch alone."""

import json

import pytest
import torch
from torch import nn

from fnlight.errors import ConfigError, ParallelError
from fnlight.parallel import World, ddp
from tests.parallel.launch import ran
from tests.parallel.steps import by_hand, plain, weighted


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two ranks say."""
    folder = tmp_path_factory.mktemp("ranks")
    ran("steps.py", 2, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def close(a, b):
    return all(torch.allclose(torch.tensor(a[n]), torch.tensor(b[n]), rtol=1e-5, atol=1e-7) for n in b) and a.keys() == b.keys()


def test_ranks_agree_bitwise(found):
    """After every step all ranks hold the same weights."""
    for name in ("plain", "accumulated", "weighted"):
        assert found[0][name] == found[1][name], name


@pytest.mark.parametrize("name", ["", " accumulated"])
def test_ddp_is_bitwise_what_torch_alone_does(found, name):
    """The wrapper around the loss function changes nothing of what DistributedDataParallel computes."""
    assert found[0][name.strip() or "plain"] == found[0][f"torch{name}"]


def test_two_ranks_train_as_one_process(found):
    """Half a batch on each of two ranks is the whole batch on one, for a mean and over a group."""
    assert close(found[0]["plain"], by_hand(plain, [8], World()))
    assert close(found[0]["accumulated"], by_hand(plain, [8], World(), group=2))


def test_weights_are_summed_over_ranks(found):
    """Five samples here and three there count as eight: a `Mean` is exact however they are spread."""
    assert close(found[0]["weighted"], by_hand(weighted, [8], World(), group=2))


def test_a_parameter_without_a_gradient_is_named(found):
    """What the loss does not depend on is named before the optimizer steps; and looked for where that is asked for."""
    said, steps = found[0]["unused"]
    assert "idle.weight, idle.bias" in said
    assert "find_unused_parameters=True" in said
    assert steps == "2"


def test_a_group_is_left_where_it_was_joined(found):
    """`join` brings the processes together for as long as its block lasts."""
    assert [(each["left"], each["joined afterwards"]) for each in found] == [(True, False)] * 2


def test_what_makes_no_sense_is_refused(monkeypatch):
    """A bucket of nothing, and a placement before anybody has joined."""
    with pytest.raises(ConfigError, match=r"bucket_cap_mb=\.\.\.\) must be megabytes above 0"):
        ddp(bucket_cap_mb=0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ParallelError, match=r"is rank 1 of 2, but has not joined the other ranks; write `with fl\.parallel\.join"):
        ddp().place(nn.Linear(1, 1))
