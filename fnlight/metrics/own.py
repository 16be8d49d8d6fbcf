"""A metric as a step gives it away; on its own, since `wide` knows no monoids, which are made of it."""

from typing import Any

from torch import Tensor

from fnlight.metrics.monoids import Last, Max, Mean, Min, Sum
from fnlight.metrics.wide import check_scalar, detached

_ONE = (Sum, Max, Min, Last)


def own_metric(name: str, value: Any) -> Any:
    """A metric as a step may give it away: without a graph, and one number where it is to be one.

    Args:
        name: Its name.
        value: Its value.

    Returns:
        The value, its tensors detached.

    Raises:
        StepError: If it is no single real number.

    Example:
        >>> own_metric("accuracy", 0.5)
        0.5
    """
    for field in scalars_of(value):
        check_scalar(name, field)
    return detached(value)


def scalars_of(value: Any) -> tuple[Any, ...]:
    """What of a metric must be one number.

    Args:
        value: A metric.

    Returns:
        The value itself, or its fields; nothing of `Cat`, media and classes of the user's.

    Example:
        >>> scalars_of(Mean(6.0, 2))
        (6.0, 2)
    """
    if isinstance(value, Tensor | int | float):
        return (value,)
    if value.__class__ is Mean:
        return (value.total, value.weight)
    return (value.value,) if value.__class__ in _ONE and value.value is not None else ()
