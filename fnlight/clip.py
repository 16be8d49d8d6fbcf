"""Gradients kept within bounds: combinators between `accumulate` and `apply`, by foreach kernels."""

import math
from typing import Any

import torch

from fnlight.errors import ConfigError
from fnlight.pipe import Combinator
from fnlight.protocols import Gradients
from fnlight.state import Store


def clip_norm(max_norm: float) -> Combinator:
    """Scale the gradients down so that their joint 2-norm is at most `max_norm`; the norm before is the metric ``grad_norm``.

    Args:
        max_norm: The largest norm let through.

    Returns:
        A combinator from `GradFn` to `GradFn`; it sees true gradients, after accumulation.

    Raises:
        ConfigError: If the norm is not above 0.

    Example:
        >>> print(clip_norm(1.0))
        clip_norm(1.0)

    References:
        Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks" (2013).
    """
    _positive("clip_norm", max_norm)

    def wrap(grad_fn: Any) -> Any:
        def clipped(store: Store, batches: Any, key: int) -> Gradients:
            found: Gradients = grad_fn(store, batches, key)
            held = [v for v in found.values if v is not None]
            norm = torch.nn.utils.get_total_norm(held)
            if held:
                torch._foreach_mul_(held, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
            found.metrics["grad_norm"] = norm
            return found

        return clipped

    return Combinator("clip_norm", wrap, "grad", "grad", args=str(max_norm))


def clip_value(max_value: float) -> Combinator:
    """Clamp every entry of the gradients to between ``-max_value`` and ``max_value``.

    Args:
        max_value: The largest absolute value let through.

    Returns:
        A combinator from `GradFn` to `GradFn`.

    Raises:
        ConfigError: If the value is not above 0.

    Example:
        >>> print(clip_value(0.5))
        clip_value(0.5)
    """
    _positive("clip_value", max_value)

    def wrap(grad_fn: Any) -> Any:
        def clipped(store: Store, batches: Any, key: int) -> Gradients:
            found: Gradients = grad_fn(store, batches, key)
            held = [v for v in found.values if v is not None]
            if held:
                torch._foreach_clamp_min_(held, -max_value)
                torch._foreach_clamp_max_(held, max_value)
            return found

        return clipped

    return Combinator("clip_value", wrap, "grad", "grad", args=str(max_value))


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0 or math.isinf(value):
        raise ConfigError(f"{name} must be a finite number above 0, but got {value!r}; leave it out to switch it off")
