"""The processes of a loader: how they are started, and that they do not outlive the process that they read for."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader, get_worker_info

from fnlight.runtime import held_back, leave_to_parent, listening, worker_death

_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)
_ON_DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl: which signal comes when the thread that started this process ends


def owner(context: Any) -> int | None:
    """Return the process whose death ends the workers of a loader.

    Args:
        context: The loader's ``multiprocessing_context``; None is the standard one.

    Returns:
        The id of this process. None where a worker cannot follow it: on other systems than Linux; in a thread that may end before the
        process does, for it is the thread that the system watches; where a server forks the workers.

    Example:
        >>> owner(multiprocessing.get_context("forkserver")) is None
        True
    """
    method = (context or multiprocessing).get_start_method()
    watched = sys.platform == "linux" and threading.current_thread() is threading.main_thread()
    return os.getpid() if watched and method in ("fork", "spawn") else None


def follow(parent: int | None) -> None:
    """Let the system kill this process as soon as its parent is dead, whatever either of them does at that moment.

    Args:
        parent: What `owner` gave in the parent.

    Example:
        >>> follow(None)
    """
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_ON_DEATH, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before it could be watched
        os.kill(os.getpid(), signal.SIGKILL)


@attrs.frozen(eq=False, repr=False)
class Started:
    """A loader of ours whose workers are started while signals are held back, and are named when they die.

    Args:
        loader: The loader.

    Example:
        >>> list(Started(DataLoader([1, 2], batch_size=None)))
        [1, 2]
    """

    loader: DataLoader[Any]

    def __iter__(self) -> Iterator[Any]:
        """What the loader yields."""
        with held_back():
            found = iter(self.loader)
        return _named(found)


@contextmanager
def early() -> Iterator[None]:
    """What is wrong with the next epoch is said when it is its turn, if it comes to that; but not that a worker of this one has died.

    Example:
        >>> with early():
        ...     raise ValueError("of the next epoch")
    """
    try:
        yield
    except Exception as error:
        if worker_death(error) is not None:
            raise


def _named(found: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from found
    except RuntimeError as error:
        dead = worker_death(error)
        if dead is None:
            raise
        raise dead from error


@attrs.frozen(eq=False, repr=False)
class Begin:
    """What a worker does first: follow its parent into death, leave signals to it, show the user's own dataset to ``worker_init_fn`` and ``get_worker_info``.

    Args:
        fn: The user's ``worker_init_fn``.
        listening: The signals that are left to the parent.
        parent: Whose death is followed; None for nobody's.

    Example:
        >>> Begin(None, (), None)(0)
    """

    fn: Callable[[int], None] | None
    listening: tuple[int, ...]
    parent: int | None

    def __call__(self, worker_id: int) -> None:
        """Begin."""
        follow(self.parent)
        leave_to_parent(self.listening)
        info = get_worker_info()
        ours: Any = None if info is None else info.dataset
        if type(ours).__module__.startswith("fnlight.data."):
            object.__setattr__(info, "dataset", ours.dataset)  # it refuses to be written otherwise
        if self.fn is not None:
            self.fn(worker_id)


def options_of(loader: DataLoader[Any], key: int, workers: int | None = None) -> dict[str, Any]:
    """How the user's loader loads; with a generator of its own, so that the global one is not drawn from.

    Args:
        loader: The user's loader.
        key: What the generator is seeded from.
        workers: How many workers there shall be; None for as many as the loader has.

    Returns:
        Arguments of a ``DataLoader``.

    Example:
        >>> options_of(DataLoader([1, 2]), key=3)["num_workers"]
        0
    """
    options = {name: getattr(loader, name) for name in _OPTIONS if name != "in_order" or getattr(loader, name, None) is not None}
    if getattr(loader, "pin_memory_device", ""):
        options["pin_memory_device"] = loader.pin_memory_device
    count = options["num_workers"] if workers is None else workers
    if count != options["num_workers"]:
        options |= {"num_workers": count, "persistent_workers": False}
        options |= {} if count else {"prefetch_factor": None, "timeout": 0, "multiprocessing_context": None}
    generator = torch.Generator().manual_seed(key >> 1)  # workers are seeded from what it gives
    begin = Begin(loader.worker_init_fn, listening(), owner(loader.multiprocessing_context)) if count else None
    return {**options, "generator": generator, "worker_init_fn": begin}
