"""Metrics as monoids: values that merge exactly over batches, micro-batches and ranks, and a tally that merges them late.

A mean of means is wrong when batches differ in size; ``Mean(total, weight)`` is not. A plain scalar counts as a mean of weight 1.
"""

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, Self

import attrs
import torch
from torch import Tensor

from fnlight.errors import StepError


@attrs.frozen(eq=False)  # tensors do not compare to one bool
class Mean:
    """A mean that is exact over uneven parts: a sum and what to divide it by.

    Args:
        total: The sum, a scalar tensor, shape [], or a number.
        weight: Samples, tokens or any other weight: a number or a scalar tensor.

    Example:
        >>> Mean(6.0, 2).merge(Mean(3.0, 1)).compute()
        3.0
    """

    total: Any
    weight: Any = 1

    @classmethod
    def empty(cls) -> Self:
        """The neutral element: merging it changes nothing."""
        return cls(0.0, 0)

    def merge(self, other: Self) -> Self:
        """The mean of both parts together."""
        return type(self)(self.total + other.total, self.weight + other.weight)

    def compute(self) -> Any:
        """The value; NaN where nothing was counted."""
        if not isinstance(self.weight, Tensor) and self.weight == 0:
            return math.nan
        return self.total / self.weight

    def __float__(self) -> float:
        return float(self.compute())


@attrs.frozen(eq=False)
class Sum:
    """A sum over all parts.

    Args:
        value: A scalar tensor, shape [], or a number.

    Example:
        >>> Sum(2).merge(Sum(3)).compute()
        5
    """

    value: Any

    @classmethod
    def empty(cls) -> Self:
        """The neutral element."""
        return cls(0)

    def merge(self, other: Self) -> Self:
        """The sum of both."""
        return type(self)(self.value + other.value)

    def compute(self) -> Any:
        """The value."""
        return self.value

    def __float__(self) -> float:
        return float(self.value)


@attrs.frozen(eq=False)
class Max:
    """The largest of all parts.

    Args:
        value: A scalar tensor, shape [], or a number.

    Example:
        >>> Max(2.0).merge(Max(3.0)).compute()
        3.0
    """

    value: Any

    @classmethod
    def empty(cls) -> Self:
        """The neutral element."""
        return cls(-math.inf)

    def merge(self, other: Self) -> Self:
        """The larger of both; NaN wins, so that it is seen."""
        return type(self)(_pick(self.value, other.value, torch.maximum, max))

    def compute(self) -> Any:
        """The value."""
        return self.value

    def __float__(self) -> float:
        return float(self.value)


@attrs.frozen(eq=False)
class Min:
    """The smallest of all parts.

    Args:
        value: A scalar tensor, shape [], or a number.

    Example:
        >>> Min(2.0).merge(Min(3.0)).compute()
        2.0
    """

    value: Any

    @classmethod
    def empty(cls) -> Self:
        """The neutral element."""
        return cls(math.inf)

    def merge(self, other: Self) -> Self:
        """The smaller of both; NaN wins, so that it is seen."""
        return type(self)(_pick(self.value, other.value, torch.minimum, min))

    def compute(self) -> Any:
        """The value."""
        return self.value

    def __float__(self) -> float:
        return float(self.value)


def _pick(a: Any, b: Any, tensors: Callable[..., Any], numbers: Callable[..., Any]) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return tensors(torch.as_tensor(a), torch.as_tensor(b))
    return next((v for v in (a, b) if v != v), None) if a != a or b != b else numbers(a, b)


@attrs.frozen(eq=False)
class Last:
    """The value of the last part.

    Args:
        value: A scalar tensor, shape [], a number, or None for "nothing yet".

    Example:
        >>> Last(2).merge(Last(3)).merge(Last.empty()).compute()
        3
    """

    value: Any

    @classmethod
    def empty(cls) -> Self:
        """The neutral element."""
        return cls(None)

    def merge(self, other: Self) -> Self:
        """The later one."""
        return self if other.value is None else other

    def compute(self) -> Any:
        """The value."""
        return self.value

    def __float__(self) -> float:
        return math.nan if self.value is None else float(self.value)


@attrs.frozen(eq=False)
class Cat:
    """All parts, concatenated, for what is no mean of parts (AUC, F1, correlation); for `eval_step`.

    Args:
        values: A tensor or a tuple of tensors with samples in the first dimension, shape [N, ...].
        fn: Maps the concatenated tensors to a scalar; None gives the tensors themselves.

    Example:
        >>> spread = lambda x: x.max() - x.min()
        >>> Cat(torch.tensor([1.0, 2.0]), spread).merge(Cat(torch.tensor([5.0]), spread)).compute()
        tensor(4.)
    """

    values: Any
    fn: Callable[..., Any] | None = None
    _parts: tuple[Any, ...] = attrs.field(default=(), alias="parts", repr=False)

    @classmethod
    def empty(cls) -> Self:
        """The neutral element."""
        return cls(None)

    def _all(self) -> tuple[Any, ...]:
        return self._parts if self.values is None else (*self._parts, self.values)

    def merge(self, other: Self) -> Self:
        """The parts of both, in order."""
        return type(self)(None, self.fn or other.fn, (*self._all(), *other._all()))

    def compute(self) -> Any:
        """The function of the concatenated tensors; NaN where there are none."""
        parts = [p if isinstance(p, tuple) else (p,) for p in self._all()]
        if not parts:
            return math.nan
        joined = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        if self.fn is not None:
            return self.fn(*joined)
        return joined[0] if len(joined) == 1 else joined

    def __float__(self) -> float:
        return float(self.compute())


@attrs.frozen(eq=False)
class Image:
    """A picture, or a batch of them drawn as a grid, for the sinks that show pictures.

    Args:
        data: A tensor, shape [C, H, W], [H, W] or [N, C, H, W]; floats in 0..1 or uint8.

    Example:
        >>> Image(torch.zeros(3, 8, 8)).data.shape
        torch.Size([3, 8, 8])
    """

    data: Any


@attrs.frozen(eq=False)
class Histogram:
    """The distribution of a tensor's values, for the sinks that show histograms.

    Args:
        data: A tensor of any shape.

    Example:
        >>> Histogram(torch.arange(3.0)).data.numel()
        3
    """

    data: Any


@attrs.frozen(eq=False)
class Figure:
    """A matplotlib figure, for the sinks that show pictures.

    Args:
        data: A ``matplotlib.figure.Figure``.

    Example:
        >>> Figure(None).data
    """

    data: Any


@attrs.frozen(eq=False)
class Text:
    """A piece of text, for the sinks that show text.

    Args:
        data: The text; TensorBoard reads it as Markdown.

    Example:
        >>> Text("a *note*").data
        'a *note*'
    """

    data: str


MEDIA = (Image, Histogram, Figure, Text)
SCALARS = {"Mean": Mean, "Sum": Sum, "Max": Max, "Min": Min, "Last": Last}

_FOLD: dict[str, Callable[[Any, Any], Any]] = {
    "Mean": lambda a, b: a + b,
    "Sum": lambda a, b: a + b,
    "Max": lambda a, b: _pick(a, b, torch.maximum, max),
    "Min": lambda a, b: _pick(a, b, torch.minimum, min),
    "Last": lambda a, b: b,
}
_NEUTRAL = {"Max": -math.inf, "Min": math.inf}  # what nothing comes to; it is no sign of a broken number
_STACK = 256  # pending steps after which their scalars are stacked on the device: bounded memory without a host sync


@attrs.define(eq=False)
class Tally:
    """Metrics of many steps, kept where they are and merged only when somebody reads.

    Adding is one list append. Reading brings everything pending to the host in one copy and adds it up in float64, one
    step after the other, so that the result does not depend on when or how often somebody read.

    Args:
        totals: Per name the kind of monoid and its merged fields on the host.
        bad: The first ``(step, name)`` whose value was NaN or infinite.

    Example:
        >>> tally = Tally()
        >>> tally.add(1, {"loss": torch.tensor(2.0)})
        >>> tally.add(2, {"loss": torch.tensor(4.0)})
        >>> tally.read()
        {'loss': 3.0}
    """

    totals: dict[str, list[Any]] = attrs.field(factory=dict)
    bad: tuple[int, str] | None = None
    _names: Any = attrs.field(default=None, init=False)
    _pending: list[tuple[int, Mapping[str, Any]]] = attrs.field(factory=list, init=False)
    _stacked: list[dict[str, tuple[str, list[int], list[Any]]]] = attrs.field(factory=list, init=False)
    _objects: dict[str, list[Any]] = attrs.field(factory=dict, init=False)

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of one step; the names must be those of the first one."""
        if metrics.keys() != self._names:
            self._accept(step, metrics)
        self._pending.append((step, metrics))
        if len(self._pending) >= _STACK:
            self._stack()

    def _accept(self, step: int, metrics: Mapping[str, Any]) -> None:
        known, names = self._names, metrics.keys()
        if known is None and self.totals:  # from a file, which holds no pictures and no texts
            known, names = self.totals.keys(), {name for name, value in metrics.items() if _kind(value)}
        if known is not None and names != known:
            missing, new = sorted(known - names), sorted(names - known)
            raise StepError(
                f"step {step}: the metrics must have the same names at every step, {sorted(known)}; "
                f"missing now: {missing}, new: {new}. Give every name each time, with Mean(0.0, 0) where there is nothing to count."
            )
        for name, value in metrics.items():
            if isinstance(value, Tensor) and value.dim():
                raise StepError(
                    f"metric {name!r} must be one number, but has shape {list(value.shape)}; reduce it, or use Mean, Cat or Histogram"
                )
            if not _kind(value) and not isinstance(value, MEDIA) and not callable(getattr(value, "merge", None)):
                raise StepError(
                    f"metric {name!r} must be a number, a scalar tensor, or a value such as Mean or Image, but got {value!r:.60}"
                )
        self._names = dict.fromkeys(metrics).keys()

    def settle(self) -> None:
        """Bring what is pending to the host and merge it; one host sync for all of it."""
        if self._pending:
            self._stack()
        for columns in self._stacked:
            hosted = _to_host([column for _, _, fields in columns.values() for column in fields])
            place = iter(hosted)
            for name, (kind, steps, fields) in columns.items():
                self._merge(name, kind, [next(place) for _ in fields], steps)
        self._stacked.clear()

    def _stack(self) -> None:
        steps = [step for step, _ in self._pending]
        rows = [metrics for _, metrics in self._pending]
        self._pending.clear()
        columns: dict[str, tuple[str, list[int], list[Any]]] = {}
        for name in self._names:
            values = [row[name] for row in rows]
            kind = _one_kind(name, values, self.totals.get(name))
            if kind is None:
                self._keep(name, values)
                continue
            at = steps
            if kind == "Last":
                at = [step for step, v in zip(steps, values, strict=True) if v.value is not None]
                values = [v for v in values if v.value is not None]
            columns[name] = (kind, at, [_column(field) for field in _fields(kind, values)])
        self._stacked.append(columns)

    def _keep(self, name: str, values: list[Any]) -> None:
        if isinstance(values[-1], MEDIA):
            self._objects[name] = values[-1:]
        else:
            self._objects.setdefault(name, []).extend(values)

    def _merge(self, name: str, kind: str, fields: list[list[Any]], steps: list[int]) -> None:
        fold, neutral = _FOLD[kind], _NEUTRAL.get(kind)
        merged = self.totals.get(name)
        old = merged[1:] if merged else [None] * len(fields)
        new = list[Any]()
        for total, values in zip(old, fields, strict=True):
            for step, value in zip(steps, values, strict=True):
                total = value if total is None else fold(total, value)
                if not math.isfinite(value) and value != neutral and (self.bad is None or step < self.bad[0]):
                    self.bad = (step, name)
            new.append(total)
        if steps:
            self.totals[name] = [kind, *new]

    def read(self) -> dict[str, Any]:
        """Settle, then give names to floats (and to media, where there are any)."""
        self.settle()
        scalars = {name: float(SCALARS[kind](*fields).compute()) for name, (kind, *fields) in self.totals.items()}
        objects = {name: _compute(name, values) for name, values in self._objects.items()}
        found = {**scalars, **objects}
        return {name: found.get(name, math.nan) for name in self._names or found}

    def is_empty(self) -> bool:
        """Say whether nothing was added since the last `clear`."""
        return not (self._pending or self._stacked or self.totals or self._objects)

    def clear(self) -> None:
        """Start afresh; the names stay."""
        self.totals, self.bad = {}, None
        self._pending.clear()
        self._stacked.clear()
        self._objects.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tally":
        self.settle()
        twin = Tally({name: list(fields) for name, fields in self.totals.items()}, self.bad)
        twin._names, twin._objects = self._names, {name: list(values) for name, values in self._objects.items()}
        return twin


def _one_kind(name: str, values: list[Any], total: list[Any] | None) -> str | None:
    """The one kind of all values of a metric, those that were merged before among them."""
    kinds = {_kind(value) for value in values} if len(set(map(type, values))) > 1 else {_kind(values[0])}
    if len(kinds | {total[0]} if total else kinds) > 1:
        names = sorted({type(value).__name__ for value in values} | ({total[0]} if total else set()))
        raise StepError(
            f"metric {name!r} must be of one kind at every step, but came as {' and as '.join(names)}; always give the same type"
        )
    return kinds.pop()


def _kind(value: Any) -> str | None:
    """The monoid that a metric value stands for; None for what is merged as an object."""
    if isinstance(value, Tensor | int | float):
        return "Mean"
    name = type(value).__name__
    return name if SCALARS.get(name) is type(value) else None


def _fields(kind: str, values: list[Any]) -> list[list[Any]]:
    if kind != "Mean":
        return [[v.value for v in values]]
    pairs = [(v.total, v.weight) if isinstance(v, Mean) else (v, 1) for v in values]
    return [[total for total, _ in pairs], [weight for _, weight in pairs]]


def _column(values: list[Any]) -> Any:
    """A column of scalars: one stacked tensor where all are tensors of one type, else the list itself, so that no number is rounded."""
    if len({(v.dtype, v.device) if isinstance(v, Tensor) else None for v in values}) != 1 or not isinstance(values[0], Tensor):
        return values
    return torch.stack([t.detach().reshape(()) for t in values])


def _to_host(columns: list[Any]) -> list[list[Any]]:
    """The columns as lists of numbers, with one copy from the device for all columns of one type."""
    out: list[Any] = [[v.item() if isinstance(v, Tensor) else v for v in c] if isinstance(c, list) else c for c in columns]
    by_type: dict[Any, list[int]] = {}
    for i, column in enumerate(columns):
        if isinstance(column, Tensor):
            by_type.setdefault((column.dtype, column.device, len(column)), []).append(i)
    for places in by_type.values():
        rows = torch.stack([columns[i] for i in places]).tolist()
        for i, row in zip(places, rows, strict=True):
            out[i] = row
    return out


def _compute(name: str, values: list[Any]) -> Any:
    if isinstance(values[0], MEDIA):
        return values[-1]
    found = reduce(lambda a, b: a.merge(b), values).compute()
    if isinstance(found, Tensor) and found.numel() != 1 or not isinstance(found, Tensor | int | float):
        raise StepError(
            f"metric {name!r} must come to one number, but {type(values[0]).__name__}.compute() gave {type(found).__name__}"
            f"{list(found.shape) if isinstance(found, Tensor) else ''}; pass Cat(values, fn) a function that gives a scalar"
        )
    return float(found)
