"""Loaders and data sets that want to know the epoch are told, before each one, resumed or not."""

from collections.abc import Callable
from functools import partial
from typing import Any

from fnlight.data.parts import parts

Listener = Callable[[int], Any]

_SAMPLERS = ("sampler", "batch_sampler")


def listeners(loader: Any, *, samplers: bool = True) -> tuple[Listener, ...]:
    """What wants to be told the epoch: a loader, its sampler, its batch sampler, its data set, and what these are made of.

    That is what has a ``set_epoch``, or a ``next_epoch`` that can be set, as MosaicML's streams have. Who is told passes it on: nothing is told
    that is held by what has a ``set_epoch`` itself, but for the parts of the loader.

    Args:
        loader: A loader, or a data set.
        samplers: False leaves out the samplers of the loader, where a copy of them is read.

    Returns:
        Functions of the number of the epoch.

    Example:
        >>> from types import SimpleNamespace
        >>> [tell(3) for tell in listeners(SimpleNamespace(dataset=SimpleNamespace(set_epoch=lambda epoch: epoch)))]
        [3]
    """
    found: list[Listener] = []
    told: list[str] = []
    for path, node in parts(loader, leave=() if samplers else _SAMPLERS):
        if any(path.startswith(f"{each}.") for each in told):
            continue
        tell = _listener(node)
        if tell is not None:
            found.append(tell)
            told += [path] if path else []
    return tuple(found)


def _listener(node: Any) -> Listener | None:
    tell = getattr(node, "set_epoch", None)
    if callable(tell):
        return tell
    counted = getattr(type(node), "next_epoch", None)
    return partial(setattr, node, "next_epoch") if isinstance(counted, property) and counted.fset is not None else None


def tell_epoch(loader: Any, epoch: int, *, samplers: bool = True) -> None:
    """Tell a loader, and what it is made of, which epoch begins.

    Args:
        loader: A loader, or a data set.
        epoch: The epoch, from 0 on.
        samplers: False leaves out the samplers of the loader.

    Example:
        >>> tell_epoch([1, 2], 0)  # a list does not want to know
    """
    for tell in listeners(loader, samplers=samplers):
        tell(epoch)
