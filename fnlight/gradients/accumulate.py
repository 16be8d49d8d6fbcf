"""Gradient accumulation: one step of several batches."""

from collections.abc import Mapping
from typing import Any

from fnlight.data import num_samples
from fnlight.errors import ConfigError
from fnlight.metrics import per_sample
from fnlight.pipe import Combinator, mean_of_group
from fnlight.protocols import Gradients


def accumulate(n: int | Mapping[int, int]) -> Combinator:
    """Make one step of n batches: gradients are summed over them and divided by their summed weight.

    A state never stands inside a group; the last group of an epoch may be shorter and is divided by its own size. Each plain loss and
    each plain metric counts once in a step; in means over an epoch it counts with the samples of its batch.

    Args:
        n: Batches a step; or a mapping from the epoch at which it starts to batches, as in ``{0: 1, 5: 4}``.

    Returns:
        A combinator from `GradFn` (of one batch) to `GradFn` (of a group); it stands directly behind `grad`.

    Raises:
        ConfigError: If a number is below 1, or a mapping says nothing about epoch 0.

    Example:
        >>> from fnlight.gradients import grad
        >>> from fnlight.pipe import pipe
        >>> print(pipe(lambda model, batch: model(batch).sum(), grad(), accumulate(4)))
        <lambda> > grad > accumulate(4)
    """
    numbers = n.values() if isinstance(n, Mapping) else (n,)
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in numbers):
        raise ConfigError(f"accumulate must be a number of batches >= 1, or epochs to such numbers, but got {n!r}")
    if isinstance(n, Mapping) and 0 not in n:
        raise ConfigError(f"accumulate as a mapping must say what holds from epoch 0 on, but got {dict(n)!r}; add 0: 1")
    return Combinator("accumulate", mean_of_group if n == 1 else _counting, "grad_sum", "grad", args=str(n), batches_per_step=n)


def _counting(grad_fn: Any) -> Any:
    def counted(store: Any, batch: Any, key: int) -> Gradients:
        found: Gradients = grad_fn(store, batch, key)
        return found._replace(metrics=per_sample(found.metrics, num_samples(batch)))

    return mean_of_group(counted)
