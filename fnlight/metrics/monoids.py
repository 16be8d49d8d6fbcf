"""Values that merge exactly: ``empty``, ``merge`` and ``compute``."""

import math
from collections.abc import Callable
from typing import Any, Self

import attrs
import torch
from torch import Tensor

from fnlight.metrics.wide import alike


@attrs.frozen(eq=False)  # tensors do not compare to one bool
class Mean:
    """A mean that is exact over uneven parts: a sum and its weight.

    Args:
        total: The sum, a scalar tensor, shape [], or a number.
        weight: Samples, tokens or any other weight: a number or a scalar tensor.
        exact: For fnlight: what plain numbers count in means over the data, where each of them is the mean of a batch; a sum and its samples,
            True where it is the samples of the step, or None for a mean that says its own weight.

    Example:
        >>> Mean(6.0, 2).merge(Mean(3.0, 1)).compute()
        3.0
    """

    total: Any
    weight: Any = 1
    _exact: Any = attrs.field(default=None, alias="exact", repr=False)

    @classmethod
    def empty(cls) -> Self:
        """The neutral element: merging it changes nothing."""
        return cls(0.0, 0)

    def merge(self, other: Self) -> Self:
        """The mean of both parts together."""
        exact = None if self._exact is None and other._exact is None else _exact(self, other)
        return type(self)(_sum(self.total, other.total), _sum(self.weight, other.weight), exact)

    def compute(self) -> Any:
        """The value; NaN where nothing was counted."""
        if not isinstance(self.weight, Tensor) and self.weight == 0:
            return math.nan
        return self.total / self.weight

    def __float__(self) -> float:
        return _float(self.compute())


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
        return type(self)(_sum(self.value, other.value))

    def compute(self) -> Any:
        """The value."""
        return self.value

    def __float__(self) -> float:
        return _float(self.value)


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
        return _float(self.value)


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
        return _float(self.value)


def _float(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _exact(a: Mean, b: Mean) -> Any:
    """The sums over samples of both; None where one of them does not know its own, and counts."""
    counted = [each._exact for each in (a, b) if each._exact is not None or isinstance(each.weight, Tensor) or each.weight]
    found = [each for each in counted if isinstance(each, tuple)]
    if len(found) < len(counted):
        return None
    return found[0] if len(found) == 1 else tuple(_sum(x, y) for x, y in zip(*found, strict=True))


def _sum(a: Any, b: Any) -> Any:
    """The sum of both, in a type that holds it: ten bools are 10, not True."""
    a, b = alike(a, b)
    return a + b


def _pick(a: Any, b: Any, tensors: Callable[..., Any], numbers: Callable[..., Any]) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = alike(a, b)
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
        return math.nan if self.value is None else _float(self.value)


@attrs.frozen(eq=False)
class Cat:
    """All parts, concatenated, for metrics that are not means of parts (AUC, F1, correlation); for `eval_step`.

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
