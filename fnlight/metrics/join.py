"""Merge the metrics of two batches, or of two steps."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fnlight.metrics.monoids import Mean


def join_metrics(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the metrics of two batches, or of two steps: a plain number counts as a mean of weight 1.

    Args:
        a: Names to values.
        b: The same names to values.

    Returns:
        Names to merged values.

    Example:
        >>> join_metrics({"loss": 1.0}, {"loss": 3.0})["loss"].compute()
        2.0
    """
    return {name: _join(value, b[name]) for name, value in a.items() if name in b}


def _join(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor | int | float):
        return _once(a).merge(b if isinstance(b, Mean) else _once(b))
    if isinstance(a, Mean) and not isinstance(b, Mean):
        return a.merge(_once(b))
    merge = getattr(a, "merge", None)
    return b if merge is None else merge(b)


def _once(value: Any) -> Mean:
    """A plain number counts once; many of few digits would add up to less."""
    few = isinstance(value, Tensor) and value.is_floating_point() and value.itemsize < 4
    return Mean(value.float() if few else value, 1)
