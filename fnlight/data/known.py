"""Loaders of other libraries that are read in a way of their own, told by where their classes come from: none of them is imported.

Not part of `fnlight.data.readers`: what is said here is about other people's code, and each line of it has a test with the real package.
"""

from typing import Any

from torch.utils.data import DataLoader

from fnlight.data.parts import parts
from fnlight.tensors import has_own_iterator

_TORCHDATA = "torchdata.stateful_dataloader."
"""Its ``__iter__`` does what torch's does: goes over the data set with the sampler and the workers of the loader."""


def _is_of(value: Any, package: str, *names: str) -> bool:
    return any(kind.__module__.partition(".")[0] == package and kind.__name__ in names for kind in type(value).__mro__)


def is_kind(value: Any, kind: Any) -> bool:
    """Whether something is of a class of torch's, or of torchdata's of the same name, and of no subclass.

    Args:
        value: Anything, such as a sampler.
        kind: torch's class.

    Returns:
        Whether it is.

    Example:
        >>> is_kind(3, int)
        True
    """
    own = type(value)
    return own is kind or (own.__name__ == kind.__name__ and own.__module__.startswith(_TORCHDATA))


def is_plain(loader: Any) -> bool:
    """Whether a loader is a ``DataLoader`` that is iterated in torch's way, or torchdata's, and may so be read in ours.

    torchdata's state does not hold what is needed: it repeats the random numbers of workers, and of some samplers it loses the order.

    Args:
        loader: Any loader.

    Returns:
        False for classes with an iteration of their own.

    Example:
        >>> is_plain(DataLoader([1])), is_plain([1])
        (True, False)
    """
    return isinstance(loader, DataLoader) and not has_own_iterator(loader, (_TORCHDATA,))


def resumes_itself(loader: Any) -> bool:
    """Whether a stream within torchdata's ``StatefulDataLoader`` is entered anywhere by its own state, and exactly.

    Args:
        loader: A ``DataLoader`` over an ``IterableDataset``.

    Returns:
        Whether loader and data set have a state, and no buffer whose samples it lacks, as that of ``shuffle`` of Hugging Face has.

    Example:
        >>> resumes_itself(DataLoader([1]))
        False
    """
    if not all(callable(getattr(each, name, None)) for each in (loader, loader.dataset) for name in ("state_dict", "load_state_dict")):
        return False
    return not any(_is_of(node, "datasets", "BufferShuffledExamplesIterable") for _, node in parts(loader.dataset))


def is_dataset(value: Any) -> bool:
    """Whether something gives rows rather than batches, though it can be iterated: a data set of Hugging Face.

    Args:
        value: What was given as a loader.

    Returns:
        Whether it is to be wrapped in a ``DataLoader``.

    Example:
        >>> is_dataset([1])
        False
    """
    return _is_of(value, "datasets", "Dataset", "IterableDataset")


def is_loader(value: Any) -> bool:
    """Whether something is a loader, though its class is a data set: the ``WebLoader`` of webdataset.

    Args:
        value: What was given as a loader.

    Returns:
        Whether it gives batches.

    Example:
        >>> is_loader(DataLoader([1]))
        False
    """
    return _is_of(value, "webdataset", "WebLoader")


def inexact(loader: Any) -> str | None:
    """Why a loader cannot be resumed exactly, as far as that can be seen before it is read.

    Args:
        loader: Any loader.

    Returns:
        The reason and what to change; None if there is none.

    Example:
        >>> inexact(DataLoader([1])) is None
        True
    """
    if iter_is_itself(loader):
        return (
            f"{type(loader).__name__} is an iterator: a resumed run needs one that begins at the first batch again; make it for each epoch, with "
            "fl.per_epoch(lambda seed, epoch: ...)"
        )
    for _, node in parts(loader):
        if _is_shuffle(node) and node.kw.get("seed") is None and node.kw.get("rng") is None:
            return (
                "shuffle of webdataset without a seed draws another order in every process; give it one, as in "
                "fl.per_epoch(lambda seed, epoch: ... .shuffle(1000, seed=seed + epoch) ...)"
            )
        if _is_of(node, "webdataset", "ResampledShards") and not node.deterministic:
            return (
                "resampled=True of webdataset draws other shards in every process; give WebDataset(wds.ResampledShards(urls, deterministic=True), "
                "...), or make the data set for each epoch with fl.per_epoch"
            )
    return None


def _is_shuffle(node: Any) -> bool:
    return _is_of(node, "webdataset", "FilterFunction") and getattr(node.f, "__name__", "") == "_shuffle"


def iter_is_itself(loader: Any) -> bool:
    """Whether a loader is an iterator, which can be gone over only once.

    Args:
        loader: Any loader.

    Returns:
        Whether it has ``__next__``.

    Example:
        >>> iter_is_itself(iter([1])), iter_is_itself([1])
        (True, False)
    """
    return callable(getattr(loader, "__next__", None))
