"""Batches from tensors in memory, on any device: no dataset, no workers, no collation."""

from collections.abc import Iterator
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from fnlight.data.combine import Triple
from fnlight.data.order import Span, check_start
from fnlight.data.part import Part
from fnlight.data.permutation import Permutation, permutation
from fnlight.data.share import Share
from fnlight.errors import LoaderError
from fnlight.tensors import leaves, map_tensors

_CHUNK = 64  # batches gathered at a time: one kernel a tensor for all of them, in bounded memory


@attrs.frozen(eq=False)
class TensorLoader:
    """A loader over tensors in memory.

    Shuffled, it yields the same batches as ``DataLoader(TensorDataset(*tensors), batch_size, shuffle=True)`` in a run, without fetching and
    collating samples one by one: rows are gathered on the device that the tensors lie on, many batches at a time. Unshuffled batches are
    views of the tensors, so a step must not change them, as it must not change any batch.

    Args:
        tensors: A tensor, or any tree of tensors (tuple, dict, ...), all of shape [samples, ...]; a batch is the same tree of shape [batch_size, ...].
        batch_size: Samples per batch.
        shuffle: True takes another order in every epoch: in a run a function of (seed, epoch), outside drawn from torch's generator.
        drop_last: True leaves out a last batch that is smaller.
        device: Where the tensors are moved to, once; None leaves them where they are.

    Raises:
        TypeError: If the tree holds something else than tensors with a leading dimension.
        LoaderError: If the tensors differ in their number of samples, or there is no batch.

    Example:
        >>> loader = TensorLoader((torch.arange(5), torch.arange(5) * 10), batch_size=2)
        >>> len(loader), [(x.tolist(), y.tolist()) for x, y in loader]
        (3, [([0, 1], [0, 10]), ([2, 3], [20, 30]), ([4], [40])])
    """

    tensors: Any
    batch_size: int
    shuffle: bool = False
    drop_last: bool = False
    device: torch.device | None = attrs.field(default=None, kw_only=True, converter=attrs.converters.optional(torch.device))

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.batch_size, int) or isinstance(self.batch_size, bool) or self.batch_size < 1:
            raise LoaderError(f"TensorLoader(batch_size=...) must be a whole number of at least 1, but got {self.batch_size!r}")
        _check_rows(self.tensors)
        if len(self) == 0:
            raise LoaderError(
                f"TensorLoader has no batch: its {self.num_samples} samples do not fill a batch of batch_size={self.batch_size}"
                f"{' and drop_last is True' if self.drop_last else ''}; check how the data is read"
            )
        if self.device is not None:
            device = self.device
            object.__setattr__(self, "tensors", map_tensors(lambda t: t.to(device), self.tensors))

    @property
    def num_samples(self) -> int:
        """Samples in the tensors."""
        return next(leaf.shape[0] for _, leaf in leaves(self.tensors))

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.num_samples // self.batch_size if self.drop_last else -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """The batches of one epoch, outside of a run."""
        order = torch.randperm(self.num_samples) if self.shuffle else None
        return (batch for batch, _ in self.cut(order, 0, len(self)))

    def share(self, order: Tensor | Permutation | None, start: int, stop: int, share: Share) -> Iterator[tuple[Any, int]]:
        """Of the batches those of a rank, or its part of them; with the samples of the whole batch.

        Args:
            order: As for `cut`.
            start: The first batch.
            stop: The batch before which to end.
            share: Says which part.
        """
        size, total = self.batch_size, self.num_samples
        numbers = range(start, stop)
        for number, counts in share.rounds(numbers) if share.whole else ((number, None) for number in numbers):
            low, count = number * size, min(total, (number + 1) * size) - number * size
            a, b, counts = (0, count, counts) if share.whole else share.portion(count)
            rows = slice(low + a, low + b)
            batch = map_tensors(lambda t, rows=rows: t[rows] if order is None else _gathered(t, order[rows]), self.tensors)
            yield batch if counts is None else Part(batch, counts), count

    def cut(self, order: Tensor | Permutation | None, start: int, stop: int) -> Iterator[tuple[Any, int]]:
        """Batches and their numbers of samples.

        Args:
            order: The numbers of samples in the order in which they are taken, [samples], int64; None takes them as they lie.
            start: The first batch.
            stop: The batch before which to end.
        """
        held = [leaf for _, leaf in leaves(self.tensors)]
        places: Any = {t.device: order.to(t.device) if isinstance(order, Tensor) else order for t in held}
        size, total, tree = self.batch_size, self.num_samples, self.tensors
        flat = tree.__class__ is tuple and all(isinstance(each, Tensor) for each in tree)
        for first in range(start, stop, _CHUNK):
            begin, end = first * size, min(total, min(stop, first + _CHUNK) * size)
            rows = [t[begin:end] if order is None else _gathered(t, places[t.device][begin:end]) for t in held]
            for parts in zip(*(chunk.split(size) for chunk in rows), strict=True):
                yield parts if flat else _filled(tree, iter(parts)), parts[0].shape[0]


def _gathered(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.index_select(0, rows.to(tensor.device, non_blocking=True))


def _filled(tree: Any, parts: Iterator[Tensor]) -> Any:
    return map_tensors(lambda _: next(parts), tree)


def _check_rows(tensors: Any) -> None:
    found = list(leaves(tensors))
    for path, leaf in found:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            what = f"a tensor of shape {list(leaf.shape)}" if isinstance(leaf, Tensor) else f"{type(leaf).__name__}: {leaf!r:.40}"
            raise TypeError(
                f"TensorLoader takes tensors of shape [samples, ...], but {path or 'its argument'} is {what}; "
                "turn it into a tensor with one row per sample, or use a DataLoader"
            )
    sizes = {path: leaf.shape[0] for path, leaf in found}
    if len(set(sizes.values())) != 1:
        raise LoaderError(
            f"TensorLoader takes tensors with the same number of samples, but got {sizes or 'no tensor'}; give each one row per sample"
        )


@attrs.frozen(eq=False, repr=False)
class Held:
    """The reader of a `TensorLoader`.

    Args:
        loader: The user's loader.
        shuffle: False takes the data as it lies.

    Example:
        >>> reader = Held(TensorLoader(torch.arange(3), batch_size=2), shuffle=True)
        >>> [(batch.tolist(), samples, last) for batch, samples, last in reader.epoch(Span(seed=0, epoch=0))]
        [([0, 1], 2, False), ([2], 1, True)]
    """

    loader: TensorLoader
    shuffle: bool
    shares: ClassVar[bool] = True

    def length(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def epoch(self, span: Span) -> Iterator[Triple]:
        """A part of an epoch."""
        loader = self.loader
        end = len(loader) if span.stop is None else min(len(loader), span.stop)
        check_start(span, end, loader)
        order = permutation(span.order_key, loader.num_samples) if self.shuffle and loader.shuffle else None
        found = loader.cut(order, span.start, end) if span.share is None else loader.share(order, span.start, end, span.share)
        for number, (batch, samples) in enumerate(found, span.start + 1):
            yield batch, samples, number == end
