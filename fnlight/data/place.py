"""The position of a state in an epoch, counted in batches of the current loader."""

from itertools import accumulate
from typing import Any

import attrs
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from fnlight.data.known import is_kind
from fnlight.data.samples import num_samples
from fnlight.data.source import Source
from fnlight.data.tensor_loader import TensorLoader
from fnlight.errors import LoaderError
from fnlight.state import Progress


def placed(source: Source, progress: Progress, *, earlier: bool = False) -> Progress:
    """Return the progress with `batch` computed from `epoch_samples`: the same position in an epoch, although the batch size may have changed.

    Only loaders whose batches can be counted in samples are looked at: a list, a `TensorLoader`, or a map-style ``DataLoader`` with
    a ``batch_size``. With others, and where the samples are not known, the count of batches is believed.

    Args:
        source: The training data.
        progress: Where a state stands.
        earlier: True goes back to the end of the last whole batch where the place lies within one, so that some samples are seen twice.

    Returns:
        The progress, its `batch` counted anew.

    Raises:
        LoaderError: If the place lies within a batch, unless `earlier`.

    Example:
        >>> source = Source(DataLoader(range(12), batch_size=3))
        >>> placed(source, Progress(step=3, batch=3, samples=6, epoch_samples=6)).batch
        2
    """
    done = progress.epoch_samples
    if not progress.batch or not done:
        return progress
    found = _whole_batches(source.loader, progress.batch, done)
    if found is None or found == (progress.batch, done):
        return progress
    batch, samples = found
    if samples != done and not earlier:
        raise LoaderError(
            f"the state is {done} samples into epoch {progress.epoch}, within a batch of this {type(source.loader).__name__}: its batches end "
            f"after {samples} and {_next(source.loader, batch, samples)} samples, so batch_size differs from when the state was saved; use "
            f'batches that end at {done} samples, or continue from sample {samples} with allow=("batch_size",): the samples in between are then seen twice'
        )
    return attrs.evolve(progress, batch=batch, epoch_samples=samples, samples=progress.samples - (done - samples))


def _whole_batches(loader: Any, batch: int, done: int) -> tuple[int, int] | None:
    """The batches that end at or before a sample, and the samples that they hold; None where a loader does not say."""
    size = _size(loader)
    if size is not None:
        return done // size, done // size * size
    if not isinstance(loader, list | tuple):
        return None
    counts = list(map(num_samples, loader))
    if sum(counts[:batch]) == done:
        return batch, done
    ends = [end for end in accumulate(counts) if end <= done]
    return len(ends), ends[-1] if ends else 0


def _size(loader: Any) -> int | None:
    if isinstance(loader, TensorLoader):
        return loader.batch_size
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    outer: Any = loader.batch_sampler
    return outer.batch_size if is_kind(outer, BatchSampler) else loader.batch_size


def _next(loader: Any, batch: int, samples: int) -> int:
    return samples + (_size(loader) or (num_samples(loader[batch]) if batch < len(loader) else 0))
