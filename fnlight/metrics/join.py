"""Merge the metrics of two batches, or of two steps."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from torch import Tensor

from fnlight.errors import StepError
from fnlight.metrics.monoids import Mean
from fnlight.metrics.wide import wide


def join_metrics(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the metrics of two batches, or of two steps: a plain number counts as a mean of weight 1, see `per_sample`.

    Args:
        a: Names to values.
        b: The same names to values.

    Returns:
        Names to merged values.

    Raises:
        StepError: If the names differ, or a value is of another kind.

    Example:
        >>> join_metrics({"loss": 1.0}, {"loss": 3.0})["loss"].compute()
        2.0
    """
    if a.keys() != b.keys():
        missing, new = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
        raise StepError(
            f"the metrics must have the same names at every batch of a step, {sorted(a)}; missing now: {missing}, new: {new}. "
            "Give every name each time, with Mean(0.0, 0) where there is nothing to count."
        )
    return {name: _join(name, value, b[name]) for name, value in a.items()}


def join_all(found: Sequence[Mapping[str, Any]], samples: Sequence[int]) -> Mapping[str, Any]:
    """The metrics of several updates as those of all; of one update they stay as they are.

    Args:
        found: By update, names to values.
        samples: By update, the samples of its batches.

    Returns:
        Names to merged values.

    Example:
        >>> join_all([{"loss": 1.0}, {"loss": 4.0}], [2, 1])["loss"].compute()
        2.5
    """
    return found[0] if len(found) == 1 else reduce(join_metrics, map(per_sample, found, samples))


def per_sample(metrics: Mapping[str, Any], samples: float) -> dict[str, Any]:
    """Metrics whose plain numbers know the samples of their batch, so that means over an epoch are exact means over the data.

    Args:
        metrics: Names to values.
        samples: Samples in the batch.

    Returns:
        The same names, with a `Mean` in the place of each plain number, which counts once like its batch.

    Example:
        >>> per_sample({"acc": 0.5}, 8)
        {'acc': Mean(total=0.5, weight=1)}
    """
    return {name: _known(value, samples) for name, value in metrics.items()}


def _known(value: Any, samples: float) -> Any:
    if isinstance(value, Tensor | int | float):
        return Mean(wide(value), 1, (wide(value) * samples, samples))
    if value.__class__ is Mean and value._exact is True:
        return Mean(value.total, value.weight, (value.total * samples, value.weight * samples))
    return value


def _join(name: str, a: Any, b: Any) -> Any:
    a, b = (Mean(value, 1) if isinstance(value, Tensor | int | float) else value for value in (a, b))
    if type(a) is not type(b):
        raise StepError(
            f"metric {name!r} must be of one kind at every batch of a step, but came as {type(a).__name__} and as {type(b).__name__}; "
            "always give the same type"
        )
    merge = getattr(a, "merge", None)
    return b if merge is None else merge(b)
