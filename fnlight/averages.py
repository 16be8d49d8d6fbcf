"""Averages of weights, kept in the state's memory beside the weights themselves."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fnlight.errors import ConfigError
from fnlight.pipe import Combinator
from fnlight.state import Store, TrainState
from fnlight.update import Update


def ema(decay: float, name: str = "ema") -> Combinator:
    """Keep an exponential moving average of the parameters in the state's memory.

    Args:
        decay: What stays of the average at each step, in 0..1: ``average = decay * average + (1 - decay) * params``.
        name: Where it lies in the memory; `evaluate` and `predict` take it as ``weights="ema"``.

    Returns:
        A combinator from `Step` to `Step`.

    Raises:
        ConfigError: If the decay is not between 0 and 1.

    Example:
        >>> print(ema(0.999))
        ema(0.999)

    References:
        Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992).
    """
    if not isinstance(decay, int | float) or isinstance(decay, bool) or not 0 <= decay < 1:
        raise ConfigError(f"ema must be a decay of at least 0 and below 1, but got {decay!r}")

    def init(store: Store) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in store.named.items() if p.is_floating_point()}

    def average(store: Store) -> None:
        averages, named = store.memory[name], store.named
        if averages:
            with torch.no_grad():
                torch._foreach_lerp_(list(averages.values()), [named[n] for n in averages], 1 - decay)  # by name: files do not keep order

    def wrap(step: Any) -> Any:
        if isinstance(step, Update):
            return step.then(average, name)

        def averaged(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
            state, metrics = step(state, batch)
            average(state.store)
            return state, metrics

        return averaged

    label = f"{decay}" if name == "ema" else f"{decay}, {name!r}"
    return Combinator("ema", wrap, "step", "step", args=label, key=name, init=init, phase="update")
