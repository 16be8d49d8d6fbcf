"""The host of eager steps does everything on the spot."""

import torch
from torch import nn

from fnlight.optim import Optim
from fnlight.runtime import HostCallbacks
from fnlight.state import Progress, Store


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
    """Conditions and reasons are for graphs."""
    store = Store(nn.Linear(1, 1), Optim(None), {})
    assert not HostCallbacks().traced
    store.host.only_if(store, lambda live: False)
    store.host.refuse("it may well be eager")
