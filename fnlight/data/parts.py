"""What a loader is made of: its data set, samplers and transforms, and the generators that they hold.

Not part of `fnlight.data.readers`, which decides how a loader is read: what is found here is told the epoch (`fnlight.data.epochs`), remembered
(`fnlight.data.counters`) or seeded (`fnlight.data.generators`).
"""

import random
import sys
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_FEW = 64
"""Entries of a list that are looked at: a list of stages or data sets is short, a list of samples is long."""

_DEEP = 6
_MOST = 1000
_CLOSED = (Tensor, nn.Module, ModuleType, type, FunctionType, BuiltinFunctionType, MethodType, torch.Generator, random.Random)
_FOREIGN = frozenset(
    {
        "grain",
        "threading",
        "multiprocessing",
        "multiprocess",
        "logging",
        "concurrent",
        "asyncio",
        "weakref",
        "io",
        "numpy",
        "pyarrow",
        "pandas",
        "PIL",
        "fsspec",
    }
)
"""Packages whose objects hold no part of a loader."""


def parts(root: Any, *, leave: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """An object, and those that it holds in its attributes, in short lists, tuples and dicts; each once.

    Args:
        root: Any object, such as a loader.
        leave: Attributes of it that are left out.

    Returns:
        An iterator of ``(path, object)``; the path of `root` is ``""``, others are such as ``dataset.stages.0``.

    Example:
        >>> from torch.utils.data import DataLoader, Subset
        >>> [path for path, _ in parts(DataLoader(Subset(range(4), [0, 1])), leave=("sampler", "batch_sampler"))]
        ['', 'dataset']
    """
    seen: set[int] = set()
    waiting = [("", root, 0)]
    while waiting and len(seen) < _MOST:
        path, node, depth = waiting.pop(0)
        if id(node) in seen or not _is_open(node):
            continue
        seen.add(id(node))
        yield path, node
        if depth == _DEEP:
            continue
        for name, value in list(vars(node).items()):
            if depth == 0 and name in leave:
                continue
            at = f"{path}.{name}" if path else name
            waiting += [(f"{at}{key}", each, depth + 1) for key, each in _entries(value)]


def _entries(value: Any) -> list[tuple[str, Any]]:
    if type(value) in (list, tuple) and len(value) <= _FEW:  # a class of the user's own may iterate in its own way
        return [(f".{i}", each) for i, each in enumerate(value)]
    if type(value) is dict and len(value) <= _FEW:
        return [(f".{key}", each) for key, each in value.items()]
    return [("", value)]


def _is_open(node: Any) -> bool:
    """Whether an object may hold parts of a loader."""
    if isinstance(node, _CLOSED) or type(getattr(node, "__dict__", None)) is not dict:
        return False
    module = type(node).__module__
    return module.partition(".")[0] not in _FOREIGN and not type(node).__name__.endswith("DataLoaderIter")


def generator_state(value: Any) -> Any:
    """Where a generator of random numbers stands, as numbers, tuples and tensors; None for anything else.

    Args:
        value: Anything.

    Returns:
        What `set_generator` takes.

    Example:
        >>> one = random.Random(0)
        >>> state, first = generator_state(one), one.random()
        >>> set_generator(one, state)
        >>> one.random() == first
        True
    """
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return _plain(value.bit_generator.state)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return _plain(value.get_state(legacy=False))
    return None


def set_generator(value: Any, state: Any) -> None:
    """Put a generator of random numbers where it stood.

    Args:
        value: The generator.
        state: What `generator_state` gave.

    Example:
        >>> one = torch.Generator()
        >>> set_generator(one, generator_state(torch.Generator().manual_seed(3)))
        >>> one.initial_seed()
        3
    """
    if isinstance(value, torch.Generator):
        value.set_state(state)
    elif isinstance(value, random.Random):
        version, numbers, gauss = state
        value.setstate((version, tuple(numbers), gauss))
    elif (bits := getattr(value, "bit_generator", None)) is not None:
        bits.state = state
    else:
        value.set_state(state)


def _plain(tree: Any) -> Any:
    """The state of a generator of NumPy without arrays, which a checkpoint does not hold."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return tree.tolist() if callable(getattr(tree, "tolist", None)) else tree
