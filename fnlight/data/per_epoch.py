"""A loader for each epoch, made by a function of (seed, epoch): what suits streams of every kind.

Not part of `fnlight.data.combine`, which joins loaders that are there: here none is, until its epoch begins.
"""

import inspect
from collections.abc import Callable
from typing import Any

import attrs

from fnlight.errors import LoaderError, check_type
from fnlight.tensors import LOADER, fold_in

_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@attrs.frozen(eq=False)
class PerEpoch:
    """How the loader of an epoch is made; see `per_epoch`.

    Args:
        make: ``(seed, epoch) -> loader``, or ``(seed, epoch, start) -> loader``.
        num_batches: Batches in an epoch, if that is known.

    Example:
        >>> PerEpoch(lambda seed, epoch: [epoch]).made(0, 3)
        [3]
    """

    make: Callable[..., Any]
    num_batches: int | None = None

    @property
    def enters(self) -> bool:
        """Whether `make` takes the batch to begin with."""
        return len(_parameters(self.make)) == 3

    def made(self, seed: int, epoch: int, start: int = 0) -> Any:
        """The loader of an epoch; one that takes `start` begins there.

        Args:
            seed: Any key; `make` is given the same number if it has less than 32 bits, else one of 31 bits that follows from it.
            epoch: The epoch, from 0 on.
            start: The batch to begin with.
        """
        small = seed if seed < 1 << 31 else fold_in(seed, LOADER) >> 33
        loader = self.make(small, epoch, start) if self.enters else self.make(small, epoch)
        if loader is None:
            raise LoaderError(
                f"per_epoch(make): make(seed={small}, epoch={epoch}) must give a loader, but gave None; does it return what it makes?"
            )
        return loader


def per_epoch(make: Callable[..., Any], num_batches: int | None = None) -> PerEpoch:
    """A loader that is made for each epoch, as a function of the seed and the epoch.

    That is all that a run needs to resume exactly: it makes the loader of the epoch that is under way, and reads the batches that are done once
    more. A loader may be anything that gives batches: a ``DataLoader``, a generator, a pipeline of webdataset or Grain.

    Args:
        make: ``(seed, epoch) -> loader``; equal arguments must give equal batches. The seed is that of the state, below 2**31. With a third
            parameter, ``(seed, epoch, start) -> loader``, what it gives begins with batch `start`, and nothing is read again.
        num_batches: Batches in an epoch, if that is known: for a progress bar, a fraction as a limit, and `fnlight.total_steps`.

    Returns:
        A value that is taken wherever a loader is.

    Raises:
        TypeError: If `make` is no function of two or three arguments.

    Example:
        >>> from fnlight.data.source import Source
        >>> loader = per_epoch(lambda seed, epoch: (i * 10 + epoch for i in range(3)))
        >>> [[batch for batch, samples, last in Source(loader).epoch(seed=0, epoch=epoch)] for epoch in (0, 1)]
        [[0, 10, 20], [1, 11, 21]]
    """
    check_type("per_epoch(make)", make, Callable, "a function of seed and epoch that gives a loader")
    check_type("per_epoch(num_batches=...)", num_batches, int | None, "a number of batches, or None")
    if len(_parameters(make)) not in (2, 3):
        raise TypeError(
            f"per_epoch(make) must be a function of (seed, epoch), or of (seed, epoch, start), but takes {_parameters(make)}; write "
            "fl.per_epoch(lambda seed, epoch: ...)"
        )
    return PerEpoch(make, num_batches)


def _parameters(make: Callable[..., Any]) -> list[str]:
    found = inspect.signature(make).parameters.items()
    return [name for name, p in found if p.kind in _BY_PLACE and (p.default is p.empty or name == "start")]
