"""Batches of samples of similar length, so that batches contain little padding."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from fnlight.errors import LoaderError


def _as_lengths(given: Any) -> Tensor:
    found = given.detach().cpu() if isinstance(given, Tensor) else torch.as_tensor(list(given))
    if found.dim() != 1 or not len(found) or found.is_floating_point() or found.dtype == torch.bool or bool((found < 0).any()):
        raise LoaderError(
            f"LengthBuckets needs the length of every sample, integers >= 0 of shape [samples], but got {found.dtype} of shape {list(found.shape)}"
            f"{', some below 0' if found.dim() == 1 and len(found) and bool((found < 0).any()) else ''}"
        )
    return found.to(torch.int64)


@attrs.frozen(eq=False)
class LengthBuckets:
    """A batch sampler for a ``DataLoader``: batches of samples of similar length.

    Samples are sorted by length once and divided into buckets of about equal size. In every epoch each bucket is shuffled and cut into
    batches, and the batches are shuffled; in a run that is a function of (seed, epoch), so a run resumes at any batch without reading those
    before it, and every sample has the random numbers that it has in any other order. The number of batches is the same in every epoch.

    Args:
        lengths: The length of every sample of the dataset, shape [samples], int64.
        batch_size: Samples per batch; a single batch of the epoch is smaller if they do not divide.
        max_tokens: In its place: the positions that a padded batch has at most, its longest sample times its samples. The samples a batch
            follow from the longest sample of a bucket; the last batch of each bucket may be smaller.
        buckets: How many buckets there are: many make little padding and batches that are less mixed; one shuffles everything.
        shuffle: False takes the samples from the shortest to the longest, the same in every epoch, for evaluations.
        drop_last: True leaves out batches that are smaller than others of their bucket.

    Raises:
        LoaderError: If an argument is not valid, a sample is longer than `max_tokens`, or no batch is left.

    Example:
        >>> sampler = LengthBuckets([3, 9, 4, 8, 2, 7], batch_size=2, buckets=3, shuffle=False)
        >>> list(sampler), len(sampler), round(sampler.padding(sampler), 2)
        ([[4, 0], [2, 5], [3, 1]], 3, 0.13)
    """

    lengths: Tensor = attrs.field(converter=_as_lengths)
    batch_size: int | None = None
    max_tokens: int | None = attrs.field(default=None, kw_only=True)
    buckets: int = attrs.field(default=16, kw_only=True)
    shuffle: bool = attrs.field(default=True, kw_only=True)
    drop_last: bool = attrs.field(default=False, kw_only=True)
    _cuts: Sequence[tuple[Tensor, int]] = attrs.field(init=False, repr=False)  # the samples of a bucket, and how many make a batch

    def __attrs_post_init__(self) -> None:
        if (self.batch_size is None) == (self.max_tokens is None):
            raise LoaderError(
                f"LengthBuckets takes either batch_size or max_tokens, but got batch_size={self.batch_size}, max_tokens={self.max_tokens}"
            )
        for name in ("batch_size", "max_tokens", "buckets"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise LoaderError(f"LengthBuckets({name}=...) must be a whole number of at least 1, but got {value!r}")
        object.__setattr__(self, "_cuts", self._cut())
        if len(self) == 0:
            raise LoaderError(
                f"LengthBuckets has no batch: no bucket of its {len(self.lengths)} samples fills a batch, and drop_last is True; use fewer buckets"
            )

    def _cut(self) -> list[tuple[Tensor, int]]:
        order = self.lengths.sort(stable=True).indices
        size = -(-len(order) // self.buckets)
        if self.batch_size is not None:
            size = -(-size // self.batch_size) * self.batch_size  # whole batches, but in the last bucket
        return [(members, self._samples(members)) for members in order.split(size)]

    def _samples(self, members: Tensor) -> int:
        if self.batch_size is not None:
            return self.batch_size
        assert self.max_tokens is not None
        longest = int(members[-1])
        length = int(self.lengths[longest])
        if length > self.max_tokens:
            raise LoaderError(
                f"sample {longest} has length {length}, which is more than max_tokens={self.max_tokens}; truncate it, leave it out, or raise "
                "max_tokens"
            )
        return max(1, self.max_tokens // max(1, length))

    def __len__(self) -> int:
        """Batches in an epoch, in every one."""
        return sum(len(members) // size if self.drop_last else -(-len(members) // size) for members, size in self._cuts)

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of an epoch outside of a run, drawn from torch's generator."""
        return iter(self.order(torch.default_generator))

    def order(self, generator: torch.Generator | None) -> list[list[int]]:
        """The batches of an epoch: the numbers of the samples of each.

        Args:
            generator: What a shuffled epoch is drawn from; None takes the samples from the shortest to the longest.
        """
        mixed = generator if self.shuffle else None
        found: list[list[int]] = []
        for members, size in self._cuts:
            drawn = members if mixed is None else members[torch.randperm(len(members), generator=mixed)]
            found += [part.tolist() for part in drawn.split(size) if not self.drop_last or len(part) == size]
        return found if mixed is None else [found[i] for i in torch.randperm(len(found), generator=mixed).tolist()]

    def padding(self, batches: Iterable[Sequence[int]]) -> float:
        """The fraction of padding in some batches, if each is padded to its longest sample.

        Args:
            batches: The numbers of the samples of each, such as this sampler, or those of another order to compare with.

        Returns:
            A number in 0..1.
        """
        taken = [self.lengths[torch.as_tensor(indices, dtype=torch.int64)] for indices in batches]
        held, padded = sum(int(t.sum()) for t in taken), sum(int(t.max()) * len(t) for t in taken if len(t))
        return 1 - held / padded if padded else 0.0
