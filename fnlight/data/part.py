"""A part of a batch: some of its samples, and the weight of a plain loss of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from fnlight.data.samples import num_samples
from fnlight.metrics import Mean, uncounted, wide


class Part(NamedTuple):
    """A part of a batch, which a `GradFn` may get instead of a batch.

    Args:
        batch: Some of the samples of a batch.
        share: The weight of a plain loss of them: their fraction of the samples, so that the shares of one batch sum to 1 (those of
            all ranks to the number of ranks). Share 0: a zero-weight dummy batch.
        most: The number of samples of the largest part among the ranks, if each rank has its own data, and the parts differ in size.

    Example:
        >>> import torch
        >>> loss_fn, batch = Part(torch.tensor([1.0, 3.0]), 0.5).taken(lambda model, batch: batch.mean())
        >>> loss_fn(None, batch)
        Mean(total=tensor(1.), weight=0.5)
    """

    batch: Any
    share: float
    most: int | None = None

    def taken(self, loss_fn: Any) -> tuple[Any, Any]:
        """The loss function of this part, and the batch to call it with: what counts with weight 1 counts with its share."""

        def shared(model: Any, batch: Any) -> Any:
            if not self.share:
                with _standing_in(model):
                    return _uncounted(loss_fn(model, batch))
            out = loss_fn(model, batch)
            if out.__class__ is tuple and len(out) == 2 and isinstance(out[1], Mapping):
                count = num_samples(batch)
                return _shared(out[0], self.share), {name: _shared(value, self.share, count) for name, value in out[1].items()}
            return _shared(out, self.share)

        return shared, self.batch


@contextmanager
def _standing_in(model: Any) -> Iterator[None]:
    """What brings samples of all ranks together within a model leaves those of this one out."""
    found = [m for m in model.modules() if getattr(m, "counts_samples", None) is True] if isinstance(model, nn.Module) else []
    for each in found:
        vars(each)["counts_samples"] = False
    try:
        yield
    finally:
        for each in found:
            vars(each)["counts_samples"] = True


def _shared(value: Any, share: float, samples: int | None = None) -> Any:
    number = not value.dim() if isinstance(value, Tensor) else isinstance(value, int | float)
    return Mean(value * share, share, None if samples is None else (wide(value) * samples, samples)) if number else value


def _uncounted(out: Any) -> Any:
    """A loss that every parameter still has a gradient of, and metrics that change nothing."""
    if out.__class__ is tuple and len(out) == 2 and isinstance(out[1], Mapping):
        return _uncounted(out[0]), uncounted(out[1])
    return Mean((out.total if isinstance(out, Mean) else out) * 0.0, 0.0)
