"""Every optimizer of torch and of the packages beside it trains as it does in a plain loop, and its state is a value."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fnlight.gradients import grad
from fnlight.optim import Lookahead, optimizer_class
from fnlight.pipe import pipe
from fnlight.state import TrainState
from fnlight.step import apply
from fnlight.tensors import TRAIN, fold_in, isolated, seed_generators, tree
from tests.optim.table import CASES, FOUND, FUSED, LEFT_OUT, OF_TORCH, OPTIONS, SOURCES, Case, memory, train_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:This overload of .* is deprecated:UserWarning"),  # what torch_optimizer calls
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),  # what torch's SparseAdam makes
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_optimizer"),
]
STEPS = 3


def plain_loop(case: Case, steps: int) -> tuple[nn.Module, Any]:
    """The loop that everybody writes; random numbers are drawn as fnlight draws them."""
    model = case.model()
    kind, options = optimizer_class(case.name), OPTIONS.get(case.name, {})
    fused = {"fused": True} if case.name in FUSED else {}
    optimizer = case.optimizer(model) if kind is Lookahead else kind(model.parameters(), **options, **fused)
    for i, batch in enumerate(case.batches(steps)):
        seed_generators(fold_in(fold_in(fold_in(0, TRAIN), i), 0), torch.device("cpu"))

        def closure(batch: Any = batch) -> Any:
            optimizer.zero_grad()
            loss = train_step(model, batch)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
                loss.backward(create_graph=case.name == "torch_optimizer.Adahessian")
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
    """Every class of every source is tested, or left out for a written reason; and no source has lost its classes."""
    assert set(CASES) | set(LEFT_OUT) == set(FOUND)
    assert not set(CASES) & set(LEFT_OUT)
    for source, least in SOURCES.items():
        assert sum(name.startswith(f"{source}.") for name in CASES) >= least, source


@pytest.mark.parametrize("name", OF_TORCH)
def test_an_optimizer_trains_as_in_a_plain_loop_bitwise(name: str) -> None:
    """After three steps parameters and the optimizer's memory are those of a plain loop with the same optimizer."""
    case = CASES[name]
    state = trained(case, STEPS)
    with isolated():
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
    state, step = trained(case, case.first), pipe(train_step, grad(), apply())
    last = case.batches(case.first + 1)[-1]
    kept = state.copy()
    before = (tree.map_tensors(torch.clone, dict(kept.params)), tree.map_tensors(torch.clone, memory(kept)))
    after, _ = step(state, last)
    assert tree.equal((dict(kept.params), memory(kept)), before)
    assert not tree.equal(dict(after.params), before[0])
    again, _ = step(kept, last)
    assert list(tree.differences(dict(again.params), dict(after.params))) == []
    assert list(tree.differences(memory(again), memory(after))) == []
