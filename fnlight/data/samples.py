"""How many samples a batch holds."""

from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fnlight.tensors import leaves


def num_samples(batch: Any) -> int:
    """The number of samples in a batch: the leading dimension of its first tensor that has one, or 1.

    A packed sequence, a batch of graphs and a TensorDict say it themselves. Of other batches, `fnlight.data.Source` is told with ``samples=``.

    Args:
        batch: Any tree of tensors.

    Returns:
        The number.

    Example:
        >>> import torch
        >>> num_samples({"name": "a", "x": torch.zeros(3, 2)}), num_samples("text")
        (3, 1)
    """
    first: Any = batch
    kind = batch.__class__
    if (kind is tuple or kind is list) and batch:
        first = batch[0]
    elif kind is dict:
        first = next(iter(batch.values()), None)
    if first.__class__ is Tensor:
        shape = first.shape
        if shape:
            return shape[0]
    return _search_samples(batch)


def _search_samples(batch: Any) -> int:
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    for name in ("num_graphs", "batch_size"):  # PyTorch Geometric; TensorDict
        size = None if isinstance(batch, Tensor) else getattr(batch, name, None)
        size = size[0] if isinstance(size, tuple) and size else size
        if isinstance(size, int):
            return size
    for _, leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    return 1
