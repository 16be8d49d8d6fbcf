"""Metrics of a step whose update may be skipped, so that they must not count."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fnlight.metrics.monoids import Max, Mean, Min, Sum
from fnlight.metrics.wide import wide

_NEUTRAL: Mapping[type, Mapping[str, float]] = {
    Mean: {"total": 0.0, "weight": 0.0}, Sum: {"value": 0.0}, Max: {"value": -math.inf}, Min: {"value": math.inf},
}  # fmt: skip


def uncounted(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a step as neutral elements: the names are kept, and no mean, sum, maximum or minimum changes.

    Args:
        metrics: Names to values.

    Returns:
        The same names, each with the neutral element of its kind.

    Example:
        >>> uncounted({"loss": torch.tensor(float("nan"))})
        {'loss': Mean(total=0.0, weight=0)}
    """
    return {name: _empty(value) for name, value in metrics.items()}


def _empty(value: Any) -> Any:
    if isinstance(value, Tensor | int | float):
        return Mean.empty()
    make = getattr(type(value), "empty", None)
    return value if make is None else make()  # a picture or a text is no number that could be counted


def counted_where(metrics: Mapping[str, Any], finite: Tensor) -> dict[str, Any]:
    """The metrics of a step, which count only where `finite` is True; decided on the device.

    Args:
        metrics: Names to values.
        finite: A bool tensor, shape [].

    Returns:
        The same names; plain numbers as a `Mean` whose weight is 1 or 0.

    Example:
        >>> float(counted_where({"loss": torch.tensor(2.0)}, torch.tensor(True))["loss"])
        2.0
    """
    broken, once = finite.logical_not(), finite.float()
    return {name: _where(value, finite, broken, once) for name, value in metrics.items()}


def _where(value: Any, finite: Tensor, broken: Tensor, once: Tensor) -> Any:
    if isinstance(value, Tensor | int | float):
        value = Mean(wide(value), 1, True)  # of the samples of the step, if it counts
    if value.__class__ is Mean and value.weight == 1 and not isinstance(value.weight, Tensor) and _is_plain(value.total, finite):
        return Mean(value.total.masked_fill(broken, 0.0), once, _exact_where(value, finite))  # most metrics are such
    fields = _NEUTRAL.get(type(value))
    if fields is None:
        return value
    kept = [_tensor_where(finite, getattr(value, name), neutral) for name, neutral in fields.items()]
    return Mean(kept[0], kept[1], _exact_where(value, finite)) if value.__class__ is Mean else type(value)(*kept)


def _exact_where(value: Mean, finite: Tensor) -> Any:
    exact = value._exact
    return tuple(_tensor_where(finite, each, 0.0) for each in exact) if isinstance(exact, tuple) else exact


def _is_plain(value: Any, finite: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.device == finite.device


def _tensor_where(finite: Tensor, value: Any, neutral: float) -> Tensor:
    kept = wide(value) if isinstance(value, Tensor) else torch.tensor(value)
    if not kept.is_floating_point():  # where() would make float32 of an integer, which rounds large ones
        kept, neutral = (kept, 0) if neutral == 0 else (kept.double(), neutral)
    return torch.where(finite.to(kept.device), kept, neutral)
