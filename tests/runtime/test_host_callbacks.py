"""The host callbacks of eager steps run at once."""

import torch
from torch import nn

from fnlight.optim import Optim
from fnlight.runtime import HostCallbacks
from fnlight.state import Progress, Store


def test_a_number_is_computed_for_the_current_step() -> None:
    """It is computed from the live store at once."""
    store = Store(nn.Linear(1, 1), Optim(None), {})
    store.progress = Progress(step=4)
    assert store.host.number(store, lambda live: 0.5 * live.progress.step) == 2.0


def test_a_check_runs_at_once() -> None:
    """In an eager step, `later` does not delay the call."""
    store = Store(nn.Linear(1, 1), Optim(None), {"mine": {"seen": torch.ones(()), "count": 0}})
    store.host.later(store, lambda live: live.memory["mine"].update(count=int(live.memory["mine"]["seen"])))
    assert store.memory["mine"]["count"] == 1


def test_conditions_of_graphs_do_not_stop_an_eager_step() -> None:
    """`only_if` and `refuse` have an effect on graphs only."""
    store = Store(nn.Linear(1, 1), Optim(None), {})
    assert not HostCallbacks().traced
    store.host.only_if(store, lambda live: False)
    store.host.refuse("it may well be eager")
