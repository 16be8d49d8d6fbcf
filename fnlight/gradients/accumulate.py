"""Gradient accumulation: one optimizer step for several batches."""

from collections.abc import Mapping
from typing import Any

from fnlight.data import num_samples
from fnlight.errors import ConfigError
from fnlight.metrics import per_sample
from fnlight.pipe import Combinator, mean_of_group
from fnlight.protocols import Gradients


def accumulate(n: int | Mapping[int, int]) -> Combinator:
    """Take one optimizer step per n batches: gradients are summed and divided by the sum of the weights.

    No step ends inside a group of batches. The last group of an epoch may be shorter; it is divided by its own weight. Each plain loss and
    each plain metric has the weight 1 in a step; in means over an epoch it is weighted by the number of samples of its batch.

    Args:
        n: Batches per step; or a mapping from start epochs to batches per step, as in ``{0: 1, 5: 4}``.

    Returns:
        A combinator from `GradFn` (of one batch) to `GradFn` (of a group). Place it directly after `grad`.

    Raises:
        ConfigError: If a number is below 1, or a mapping has no epoch 0.

    Example:
        >>> from fnlight.gradients import grad
        >>> from fnlight.pipe import pipe
        >>> print(pipe(lambda model, batch: model(batch).sum(), grad(), accumulate(4)))
        <lambda> > grad > accumulate(4)
    """
    numbers = n.values() if isinstance(n, Mapping) else (n,)
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in numbers):
        raise ConfigError(f"accumulate must be a number of batches >= 1, or a mapping from epochs to such numbers, but got {n!r}")
    if isinstance(n, Mapping) and 0 not in n:
        raise ConfigError(f"accumulate as a mapping must have a value for epoch 0, but got {dict(n)!r}; add 0: 1")
    return Combinator("accumulate", mean_of_group if n == 1 else _counting, "grad_sum", "grad", args=str(n), batches_per_step=n)


def _counting(grad_fn: Any) -> Any:
    def counted(store: Any, batch: Any, key: int) -> Gradients:
        found: Gradients = grad_fn(store, batch, key)
        return found._replace(metrics=per_sample(found.metrics, num_samples(batch)))

    return mean_of_group(counted)
