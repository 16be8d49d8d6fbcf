"""Steps with several optimizers, and hand-written steps, have graphs, too."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fnlight as fl
from fnlight.testing import assert_trees_equal
from tests.laws.tasks import TASKS


def ended(task: fl.Task, data: Any, **config: Any) -> fl.TrainState:
    """Two epochs, with no word about a step without a graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", fl.errors.CompileWarning)
        return fl.fit(fl.TrainState.create(task, seed=2), data, fl.FitConfig(max_epochs=2, progress=False, device="cpu", **config))


def test_several_optimizers_are_traced_bitwise() -> None:
    """Weights, slots, memory, averages and the history are those of the eager step; each phase has its own graphs."""
    case = TASKS["two optimizers"]
    one, two = (ended(case.make(), case.batches(), compile=level, ema=0.9) for level in (None, "trace"))
    for key in ("params", "buffers", "opt_state", "memory", "history"):
        assert_trees_equal(getattr(one, key), getattr(two, key))
    assert one.progress == two.progress


def test_a_step_by_hand_with_an_optimizer_is_a_graph() -> None:
    """What goes backward and steps by itself is traced with all of it."""

    def update(store: Any, batches: Any, key: int) -> dict[str, Any]:
        loss = F.mse_loss(store.module(batches[0]), batches[0])
        loss.backward()
        store.optim.optimizer.step()
        return {"loss": loss.detach()}

    torch.manual_seed(0)
    task = fl.Task(
        nn.Linear(4, 4), fl.pipe(update, fl.manual()), configure_optimizers=lambda model: torch.optim.Adam(model.parameters(), lr=0.1)
    )
    data = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    one, two = (ended(task, data, compile=level) for level in (None, "trace"))
    assert_trees_equal([one.params, one.opt_state], [two.params, two.opt_state])


def test_several_updates_in_a_call_are_of_one_optimizer() -> None:
    """It is said before any work."""
    case = TASKS["two optimizers"]
    with pytest.raises(fl.errors.ConfigError, match="needs a step with one optimizer, built by apply"):
        fl.compose(case.make(), fl.FitConfig(max_steps=4, compile="trace", unroll=2))
