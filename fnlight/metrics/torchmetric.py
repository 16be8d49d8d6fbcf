"""Metrics of the package torchmetrics, which keep their state themselves; the package is never imported here, only its objects are called.

An `eval_step` updates such a `Metric` or `MetricCollection` and returns it. It is read once, at the end of the evaluation, and reset.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fnlight.errors import StepError


def is_torchmetric(value: Any) -> bool:
    """Say whether a value is a metric of torchmetrics, or of a class that is derived from one.

    Args:
        value: Anything.

    Returns:
        True for a ``Metric`` and a ``MetricCollection``.

    Example:
        >>> is_torchmetric(torch.tensor(1.0))
        False
    """
    return any(kind.__module__.partition(".")[0] == "torchmetrics" for kind in type(value).__mro__)


def parted(metrics: Any) -> tuple[Any, dict[str, Any]]:
    """The metrics of a batch without those of torchmetrics, and those.

    Args:
        metrics: What an `eval_step` returned; a ``MetricCollection`` may be returned alone; its name is then "".

    Returns:
        Names to values, twice.

    Example:
        >>> parted({"loss": 1.0})
        ({'loss': 1.0}, {})
    """
    if not isinstance(metrics, Mapping):
        return ({}, {"": metrics}) if is_torchmetric(metrics) and _is_collection(metrics) else (metrics, {})
    held = {name: value for name, value in metrics.items() if is_torchmetric(value)}
    return ({name: value for name, value in metrics.items() if name not in held} if held else metrics), held


def updates(metrics: Mapping[str, Any]) -> int:
    """The largest number of updates of a metric since its reset.

    Args:
        metrics: Names to metrics of torchmetrics.

    Returns:
        The number of updates.

    Raises:
        StepError: If one of them was not updated at all.

    Example:
        >>> updates({})
        0
    """
    counts = {name: max((each.update_count for each in _all(metric).values()), default=0) for name, metric in metrics.items()}
    for name, count in counts.items():
        if not count:
            raise StepError(
                f"eval_step returned the torchmetrics {type(metrics[name]).__name__} {name!r} without an update of it; call its .update(...) first, "
                "and return the same object that was updated"
            )
    return max(counts.values(), default=0)


def states_of(metrics: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """What metrics have gathered so far: copies of their states, by name and by part.

    Args:
        metrics: Names to metrics of torchmetrics.

    Returns:
        A tree of tensors and lists of tensors.

    Example:
        >>> states_of({})
        {}
    """
    return {name: {part: copy.deepcopy(each.metric_state) for part, each in _all(metric).items()} for name, metric in metrics.items()}


def put_states(metrics: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Write the states that `states_of` returned into metrics.

    Args:
        metrics: Names to metrics of torchmetrics.
        states: By name and part.

    Example:
        >>> put_states({}, {})
    """
    for name, metric in metrics.items():
        for part, each in _all(metric).items():
            for attribute, value in states[name][part].items():
                setattr(each, attribute, value)
            each._computed = None  # a cached result of other states


def read_torchmetrics(metrics: Mapping[str, Any], gather: Callable[[Any], list[Any]] | None = None) -> dict[str, float]:
    """Compute metrics at the end of an evaluation, over all ranks if there are several, and reset them.

    Args:
        metrics: Names to metrics of torchmetrics; a rank without a batch has none.
        gather: Collects the values of all ranks; None in a single process.

    Returns:
        Names to floats; of a collection, or of a metric that computes a dict, ``NAME/key``.

    Raises:
        StepError: If a metric computes something other than numbers.

    Example:
        >>> read_torchmetrics({})
        {}
    """
    if gather is None:
        return _computed(metrics)
    ranks = [each for each in gather(states_of(metrics)) if each]
    if not ranks:
        return {}
    if metrics and len(ranks) > 1:
        put_states(metrics, {name: _merged(metric, [each[name] for each in ranks]) for name, metric in metrics.items()})
    return gather(_computed(metrics))[0]  # the rank of the first batch, which every evaluation has


def _computed(metrics: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        parts = list(_all(metric).values())
        asked = [part.distributed_available_fn for part in parts]
        for part in parts:
            part.distributed_available_fn = _alone  # fnlight merges the states of ranks; otherwise they would count twice
        try:
            value = metric.compute()
        finally:
            for part, fn in zip(parts, asked, strict=True):
                part.distributed_available_fn = fn
            metric.reset()
        each = value if isinstance(value, Mapping) else {None: value}
        found |= {_number_name(name, key): _number(_number_name(name, key), number) for key, number in each.items()}
    return found


def _alone() -> bool:
    return False


def _number_name(name: str, key: Any) -> str:
    return name if key is None else f"{name}/{key}" if name else str(key)


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if isinstance(value, int | float):
        return float(value)
    got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise StepError(f"metric {name!r} must come to one number, but its compute() gave {got}; choose an average, e.g. average='macro'")


def _is_collection(value: Any) -> bool:
    return any(kind.__name__ == "MetricCollection" for kind in type(value).__mro__)


def _all(metric: Any) -> dict[str, Any]:
    """A metric and the metrics inside it, by path; a collection itself is not a metric."""
    return {path: each for path, each in metric.named_modules() if is_torchmetric(each) and not _is_collection(each)}


def _merged(metric: Any, ranks: list[Any]) -> dict[str, dict[str, Any]]:
    """Merge the states of all ranks, each with the reduction of its metric; with the reduction None, `compute` gets one row per rank."""
    return {
        part: {state: _reduced(each._reductions[state], [rank[part][state] for rank in ranks]) for state in ranks[0][part]}
        for part, each in _all(metric).items()
    }


def _reduced(reduce: Any, values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [each for value in values for each in value]
    stacked = torch.stack(values)
    return stacked if reduce is None else reduce(stacked)
