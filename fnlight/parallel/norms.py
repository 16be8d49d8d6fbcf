"""Norms of sharded tensors: local sums of squares, summed over the processes that hold the other shards."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from fnlight.tensors import cuts, foreach_norm, is_sharded, local, local_parts


def norms(values: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of each tensor, over all of its shards; all processes must call this at the same time.

    Args:
        values: Tensors, whole or sharded.

    Returns:
        One number for each, shape [values].

    Example:
        >>> norms([torch.full((4,), 2.0), torch.zeros(1)])
        tensor([4., 0.])
    """
    parts = local_parts(values)
    squares = torch.stack([n.float() for n in foreach_norm(parts)]).square_() if parts else torch.zeros(0)
    for group, which in _groups(values):
        if len(which) == len(parts):
            distributed.all_reduce(squares, group=group)
        else:
            some = squares[which]
            distributed.all_reduce(some, group=group)
            squares[which] = some
    return squares.sqrt_()


def unit_norms(tensor: Tensor) -> Tensor:
    """Return the 2-norm of each row of a tensor, or of a vector as one, over all of its shards.

    Args:
        tensor: Any tensor, whole or sharded.

    Returns:
        Norms in a shape that broadcasts against the local shard.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[5.],
                [1.]])
    """
    part, whole = local(tensor), tensor.dim() <= 1
    found = torch.linalg.vector_norm(part) if whole else torch.linalg.vector_norm(part, dim=tuple(range(1, part.dim())), keepdim=True)
    given: Any = tensor
    across = [given.device_mesh.get_group(i) for i, dim in cuts(given.placements) if whole or dim] if is_sharded(tensor) else []
    if not across:
        return found
    squares = found.float().square_()
    for group in across:
        distributed.all_reduce(squares, group=group)
    return squares.sqrt_().to(found.dtype)


def _groups(values: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """The process groups over which tensors are sharded, each with the indices of these tensors."""
    found: dict[int, tuple[Any, list[int]]] = {}
    for i, value in enumerate(values):
        if is_sharded(value):
            for dim, _ in cuts(value.placements):
                group = value.device_mesh.get_group(dim)
                found.setdefault(id(group), (group, []))[1].append(i)
    return list(found.values())
