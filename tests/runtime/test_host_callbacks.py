"""The host of eager steps does everything on the spot."""

import torch
from torch import nn

from fnlight.gradients import grad
from fnlight.optim import Optim
from fnlight.pipe import Combinator, pipe
from fnlight.runtime import HostCallbacks
from fnlight.state import Progress, Store
from fnlight.step import apply
from fnlight.testing import assert_trees_equal
from tests.small_steps import created, data, loss_fn


def test_a_number_is_that_of_the_step_that_is_under_way() -> None:
    """It is computed from the live store, at once."""
    store = Store(nn.Linear(1, 1), Optim(None), {})
    store.step.begin(Progress(step=4))
    assert store.host.number(store, lambda live: 0.5 * live.progress.step) == 2.0


def test_a_look_happens_at_once() -> None:
    """Behind an eager stage there is nothing to wait for."""
    store = Store(nn.Linear(1, 1), Optim(None), {"mine": {"seen": torch.ones(()), "count": 0}})
    store.host.later(store, lambda live: live.memory["mine"].update(count=int(live.memory["mine"]["seen"])))
    assert store.memory["mine"]["count"] == 1


def test_nothing_keeps_an_eager_step_from_being_taken() -> None:
    """Conditions and reasons are for graphs: an eager step with both is taken, bitwise, and the condition is not asked."""
    asked = []

    def speaking(grad_fn):
        def fn(store, batch, key):
            store.host.only_if(store, lambda live: bool(asked.append(live)))
            store.host.refuse("it may well be eager")
            return grad_fn(store, batch, key)

        return fn

    state = created()
    plain, _ = pipe(loss_fn, grad(), apply())(state.copy(), data())
    after, _ = pipe(loss_fn, grad(), Combinator("speaking", speaking, "grad", "grad"), apply())(state.copy(), data())
    assert after.progress.step == 1
    assert_trees_equal(after.params, plain.params)
    assert not asked
    assert not HostCallbacks().traced
