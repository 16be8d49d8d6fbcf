"""Types that hold sums of many values, and what a metric of one step must be; the monoids add in them, so they cannot say it themselves."""

import copy
import dataclasses
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor

from fnlight.errors import StepError

_WIDE = MappingProxyType(
    {
        **dict.fromkeys((torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32), torch.int64),
        torch.uint64: torch.float64,
        **dict.fromkeys((torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2), torch.float32),
    }
)


def wide(value: Any) -> Any:
    """A value in a type that holds a sum of many such values.

    Args:
        value: A tensor of any shape, or anything else, which stays as it is.

    Returns:
        Bools and integers as int64 (uint64 as float64), floats of less than 32 bits as float32.

    Example:
        >>> wide(torch.tensor(True)), wide(torch.tensor(0.5, dtype=torch.half)).dtype, wide(3)
        (tensor(1), torch.float32, 3)
    """
    dtype = _WIDE.get(value.dtype) if isinstance(value, Tensor) else None
    return value if dtype is None else value.to(dtype)


def alike(a: Any, b: Any) -> tuple[Any, Any]:
    """Two values to be added or compared: an integer beside a float becomes float64, since float32 rounds integers beyond 2**24.

    Args:
        a: A tensor or a number.
        b: Another one.

    Returns:
        Both, wide.

    Example:
        >>> alike(torch.tensor(2**24 + 1), torch.tensor(0.0))
        (tensor(16777217., dtype=torch.float64), tensor(0.))
    """
    a, b = wide(a), wide(b)
    if _is_whole(a) and _is_float(b):
        return a.double(), b
    return (a, b.double()) if _is_whole(b) and _is_float(a) else (a, b)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int64


def _is_float(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float)


def check_scalar(name: str, value: Any) -> None:
    """Refuse a value that is no single real number.

    Args:
        name: Of the metric.
        value: A tensor, a number, or a field of a metric.

    Raises:
        StepError: If it is something else.

    Example:
        >>> check_scalar("loss", torch.tensor(2.0))
    """
    if isinstance(value, Tensor):
        if value.dim():
            raise StepError(
                f"metric {name!r} must be one number, but has shape {list(value.shape)}; reduce it, or use Mean, Cat or Histogram"
            )
        if value.is_complex():
            raise StepError(f"metric {name!r} must be one real number, but is complex; take e.g. its .abs()")
    elif not isinstance(value, int | float):
        raise StepError(f"metric {name!r} must be a number or a scalar tensor, but is {type(value).__name__}: {value!r:.60}")


def detached(value: Any) -> Any:
    """A metric without graphs, which would keep the activations of its step alive until it is read.

    Args:
        value: A tensor, or an object that holds tensors in its fields, such as `Max`, `Cat`, or a class of the user's.

    Returns:
        The value itself where it holds no graph, else a copy with its tensors detached.

    Example:
        >>> detached(torch.ones((), requires_grad=True) * 2)
        tensor(2.)
    """
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(map(detached, value)) if any(detached(each) is not each for each in value) else value
    found = {name: new for name in _fields(value) if (new := detached(old := getattr(value, name))) is not old}
    if not found:
        return value
    value = copy.copy(value)
    for name, new in found.items():
        object.__setattr__(value, name, new)  # of a frozen class, too: it is our copy
    return value


def _fields(value: Any) -> Iterable[str]:
    kind = type(value)
    if attrs.has(kind):
        return [field.name for field in attrs.fields(kind)]
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return list(getattr(value, "__dict__", ())) if callable(getattr(value, "merge", None)) else ()
