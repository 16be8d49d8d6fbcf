"""Laws of `fnlight.protocols`: each contract is written down, and what fnlight makes fits it."""

import inspect
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

from fnlight import protocols
from fnlight.gradients import accumulate, clip_norm, clip_quantile, clip_value, grad, grad_noise
from fnlight.metrics import Mean
from fnlight.nonfinite import skip_nonfinite
from fnlight.pipe import pipe
from fnlight.protocols import Gradients
from fnlight.schedules import cosine
from fnlight.state import Task, TrainState
from fnlight.step import apply
from fnlight.testing import assert_trees_equal

VIEWS = {"StoreView"}  # no functions, but what functions are given
NOT_CALLED = {"Protocol", *VIEWS}
KINDS = {n: k for n, k in vars(protocols).items() if inspect.isclass(k) and getattr(k, "_is_protocol", False) and n not in NOT_CALLED}
PARAMETERS = {"GradFn": 3, "LossFn": 2, "EvalFn": 2, "PredictFn": 2, "Step": 2, "When": 1, "Rule": 1, "Sink": 1, "Schedule": 1}


def train_step(model: nn.Module, batch: Any) -> Any:
    """A loss and a metric."""
    loss = model(batch).pow(2).mean()
    return loss, {"twice": 2 * loss}


def task() -> Task:
    """A small task."""
    return Task(nn.Linear(2, 1), train_step, configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))


def test_every_protocol_is_listed() -> None:
    """The table of this test names all protocols and the number of their parameters."""
    assert set(KINDS) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_contract_stands_at_the_call(name: str) -> None:
    """Each protocol is one call, with its contract in the docstring, every type given, and parameters by position only."""
    call = KINDS[name].__call__
    _, *parameters = inspect.signature(call).parameters.values()
    assert len(parameters) == PARAMETERS[name]
    assert all(p.kind is p.POSITIONAL_ONLY for p in parameters)
    assert (inspect.getdoc(call) or "").split("\n")[0].endswith(".")
    assert set(get_type_hints(call)) == {*(p.name for p in parameters), "return"}


def test_a_grad_fn_gives_gradients_in_the_order_of_the_store() -> None:
    """What `grad` makes fits GradFn: one value a trainable parameter, a detached scalar loss, its weight and the metrics."""
    store = TrainState.create(task()).live
    found = pipe(train_step, grad()).fn(store, torch.ones(3, 2), 0)
    assert isinstance(found, Gradients)
    assert [v if v is None else v.shape for v in found.values] == [p.shape for p in store.params]
    assert (found.loss.shape, found.loss.requires_grad, found.weight, found.finite) == (torch.Size([]), False, 1.0, None)
    assert list(found.metrics) == ["loss", "twice"]


class View:
    """A store of which only what `StoreView` names can be touched."""

    def __init__(self, store: Any) -> None:
        object.__setattr__(self, "store", store)

    def __getattr__(self, name: str) -> Any:
        assert name in {*protocols.StoreView.__annotations__, "seed"}, (
            f"a GradFn touches {name!r} of the store, which StoreView does not name"
        )
        return getattr(self.store, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AssertionError(f"a GradFn writes {name!r} of the store")


def test_gradient_functions_touch_only_what_their_protocol_names() -> None:
    """The library's own gradient functions give the same through a view that refuses all that StoreView does not name, and all writing."""
    stages = (accumulate(2), skip_nonfinite(), clip_value(0.9), clip_norm(0.5), clip_quantile(0.5, window=2), grad_noise(0.1))
    step = pipe(train_step, grad(), *stages, apply())
    state = TrainState.create(task(), seed=3)
    step.adopt(state)
    twin, batches = state.copy(), (torch.ones(3, 2), torch.zeros(1, 2))
    grad_fn = pipe(train_step, grad(), *stages).fn
    one, two = grad_fn(state.live, batches, 7), grad_fn(View(twin.live), batches, 7)
    assert_trees_equal(one.values, two.values)
    assert_trees_equal(dict(state.memory), dict(twin.memory))


def test_gradients_say_whether_their_losses_were_plain() -> None:
    """A Python float is the number of plain losses, whoever has written it; any other weight is of a mean."""
    weights = (1.0, 3.0, 2, torch.tensor(2.0))
    assert [Gradients([], torch.zeros(()), weight, {}).plain for weight in weights] == [True, True, False, False]
    store = TrainState.create(task()).live
    found = pipe(lambda model, batch: Mean(model(batch).sum(), 3.0), grad()).fn(store, torch.ones(3, 2), 0)
    assert (found.plain, float(found.weight)) == (False, 3.0)


def test_a_step_maps_state_and_batch_to_state_and_metrics() -> None:
    """What `apply` makes fits Step."""
    state, metrics = pipe(train_step, grad(), apply())(TrainState.create(task()), torch.ones(3, 2))
    assert isinstance(state, TrainState)
    assert state.progress.step == 1
    assert {name: v.requires_grad for name, v in metrics.items()} == {"loss": False, "twice": False}


def test_a_schedule_maps_a_count_to_a_factor() -> None:
    """What `schedules` makes fits Schedule: a pure function of the completed count, here half of the way down."""
    schedule = cosine(10)
    assert [schedule(5), schedule(0), schedule(5)] == pytest.approx([0.5, 1.0, 0.5])
