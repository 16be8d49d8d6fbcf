"""Every optimizer of torch and of torch_optimizer trains as it does in a plain loop, and its state is a value."""

from typing import Any

import pytest
import torch
from torch import nn

from fnlight import tree
from fnlight.pipe import pipe
from fnlight.state import TrainState
from fnlight.update import apply, grad
from tests.optim.table import CASES, FOUND, FUSED, LEFT_OUT, Case, train_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:This overload of .* is deprecated:UserWarning"),  # what torch_optimizer calls
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),  # what torch's SparseAdam makes
]
STEPS = 3


def plain_loop(case: Case, steps: int) -> tuple[nn.Module, Any]:
    """The loop that everybody writes."""
    model = case.model()
    optimizer = case.optimizer(model, **({"fused": True} if case.name in FUSED else {}))
    for batch in case.batches(steps):

        def closure(batch: Any = batch) -> Any:
            optimizer.zero_grad()
            loss = train_step(model, batch)
            loss.backward()
            return loss

        if case.name.endswith("LBFGS"):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return model, optimizer


def trained(case: Case, steps: int) -> TrainState:
    """A state after some steps of the smallest pipe."""
    state, step = TrainState.create(case.task(), seed=0), pipe(train_step, grad(), apply())
    for batch in case.batches(steps):
        state, _ = step(state, batch)
    return state


def test_no_optimizer_is_forgotten() -> None:
    """Every class that torch and torch_optimizer have is tested, or left out for a written reason."""
    assert set(CASES) | set(LEFT_OUT) == set(FOUND)
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
def test_an_optimizer_trains_as_in_a_plain_loop_bitwise(name: str) -> None:
    """After three steps parameters and the optimizer's memory are those of a plain loop with the same optimizer."""
    case = CASES[name]
    state = trained(case, STEPS)
    model, optimizer = plain_loop(case, STEPS)
    assert list(tree.differences(dict(state.params), dict(model.named_parameters()))) == []
    ours = state.store.optim.optimizer.state_dict()
    theirs = optimizer.state_dict()
    assert list(tree.differences(ours["state"], theirs["state"])) == []
    for group in ours["param_groups"]:
        del group["initial_lr"]
    assert list(tree.differences(ours["param_groups"], theirs["param_groups"])) == []
    assert not tree.equal(dict(state.params), dict(case.model().named_parameters()))


@pytest.mark.parametrize("name", CASES)
def test_a_copy_of_a_state_is_independent_and_goes_on_bitwise(name: str) -> None:
    """A copy stays what it was while the original goes on, and its next step is bitwise the original's."""
    case = CASES[name]
    state, step = trained(case, STEPS), pipe(train_step, grad(), apply())
    last = case.batches(STEPS + 1)[-1]
    kept = state.copy()
    before = (tree.map_tensors(torch.clone, dict(kept.params)), tree.map_tensors(torch.clone, memory(kept)))
    after, _ = step(state, last)
    assert tree.equal((dict(kept.params), memory(kept)), before)
    assert not tree.equal(dict(after.params), before[0])
    again, _ = step(kept, last)
    assert list(tree.differences(dict(again.params), dict(after.params))) == []
    assert list(tree.differences(memory(again), memory(after))) == []


def memory(state: TrainState) -> Any:
    """What the optimizer of a state remembers, of parameters and of groups."""
    return {name: dict(slots) for name, slots in state.opt_state.items()}, state.live.optim.optimizer.state_dict()["param_groups"]
