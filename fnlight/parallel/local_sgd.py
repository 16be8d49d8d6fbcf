"""Local SGD and DiLoCo: ranks train independently and average their weights every n steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, distributed

from fnlight.errors import ConfigError, ParallelError, check_type
from fnlight.parallel.ddp import Replicated
from fnlight.pipe import Combinator
from fnlight.protocols import Gradients
from fnlight.state import Store, TrainState
from fnlight.tensors import foreach_add_, foreach_copy_, foreach_div_, foreach_mul_
from fnlight.triggers import Tick, condition


def local_sgd() -> "LocalSGD":
    """Every rank holds the whole model and trains independently on its part of the data; `diloco` averages the weights from time to time.

    Returns:
        A placement.

    Example:
        >>> local_sgd()
        local_sgd()
    """
    return LocalSGD({})


@attrs.frozen(eq=False, repr=False)
class LocalSGD(Replicated):
    """The placement that `local_sgd` returns; `Placement` documents its methods.

    Args:
        options: None are needed.

    Example:
        >>> LocalSGD({}).place(torch.nn.Linear(1, 1)) is None  # alone there is nothing to do
        True
    """

    def __repr__(self) -> str:
        return "local_sgd()"

    def begin(self, store: Any, last: bool) -> None:
        """Nothing is sent."""

    def loss(self, store: Any, fn: Any, batch: Any) -> Any:
        """Call a loss function on the live module."""
        return fn(store.module, batch)

    def finish(self, store: Any, found: Gradients) -> Gradients:  # noqa: ARG002  # of the contract
        """This rank's gradients."""
        return found

    def mean_weight(self, found: Gradients) -> Any:
        """This rank's weight."""
        return found.weight


def diloco(every: Callable[[Tick], bool], *, lr: float = 0.7, momentum: float = 0.9) -> Combinator:
    """Average the weights of independent ranks when the trigger fires: one outer step of SGD with Nesterov momentum along their mean change.

    It needs the placement `local_sgd`. With ``lr=1.0, momentum=0.0`` it is local SGD: weights are averaged. With ``every=steps(n)``
    there is n times less communication. Between two outer steps the ranks hold different weights, so evaluate and save at an outer step.
    Each rank keeps its own optimizer state; a checkpoint holds that of rank 0.

    Args:
        every: When an outer step is taken: a trigger, such as ``steps(100)``.
        lr: Learning rate of the outer step.
        momentum: Momentum of the outer step; 0 for none.

    Returns:
        A combinator from `Step` to `Step`.

    Raises:
        ConfigError: If a number is out of its range.
        ParallelError: In a run, if the state has another placement than `local_sgd`.

    Example:
        >>> from fnlight.triggers import steps
        >>> print(diloco(steps(100)))
        diloco(every=steps(100), lr=0.7, momentum=0.9)

    References:
        Douillard et al., "DiLoCo: distributed low-communication training of language models" (2023); Stich, "Local SGD converges fast and
        communicates little" (2019).
    """
    due = condition(every, "diloco(every=...)")
    check_type("diloco(lr=...)", lr, int | float, "a number above 0")
    check_type("diloco(momentum=...)", momentum, int | float, "a number in 0..1")
    if not lr > 0 or not 0 <= momentum < 1:
        raise ConfigError(f"diloco takes lr above 0 and momentum in 0..1, but got lr={lr!r}, momentum={momentum!r}")

    def init(store: Store) -> dict[str, dict[str, Tensor]]:
        anchor = {name: p.detach().clone() for name, p in store.named.items() if p.requires_grad}
        return {"anchor": anchor, "velocity": {name: torch.zeros_like(p) for name, p in anchor.items()} if momentum else {}}

    def wrap(step: Any) -> Any:
        def meeting(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
            before = state.progress
            state, metrics = step(state, batch)
            if due(Tick(before, state.progress)):
                _meet(state.store, state.store.memory["diloco"], lr, momentum)
            return state, metrics

        return meeting

    label = f"every={every}, lr={lr}, momentum={momentum}"
    return Combinator("diloco", wrap, "step", "step", args=label, key="diloco", init=init, phase="update", start=_check)


def _check(state: TrainState) -> TrainState:
    if state.store.place is not None and not isinstance(state.store.place, LocalSGD):
        raise ParallelError(
            f"diloco averages the weights of ranks that train independently, but {state.store.place} averages gradients in every step; create the "
            "state with place=fl.parallel.local_sgd()"
        )
    return state


@torch.no_grad()
def _meet(store: Store, tree: Mapping[str, Mapping[str, Tensor]], lr: float, momentum: float) -> None:
    names, anchor = list(tree["anchor"]), list(tree["anchor"].values())
    if not anchor:
        return
    params: Sequence[Tensor] = [store.named[name].detach() for name in names]
    way = [a - p for a, p in zip(anchor, params, strict=True)]
    if store.place is not None:
        for each in way:
            distributed.all_reduce(each)
        foreach_div_(way, store.place.world.size)
    if momentum:
        velocity = list(tree["velocity"].values())
        foreach_mul_(velocity, momentum)
        foreach_add_(velocity, way)
        foreach_add_(way, velocity, alpha=momentum)
    foreach_add_(anchor, way, alpha=-lr)
    foreach_copy_(params, anchor)
