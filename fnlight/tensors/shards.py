"""Sharded tensors, of which every process holds a part: torch's ``DTensor``, made by fsdp and tensor parallel.

Nothing is imported from ``torch.distributed``: a sharded tensor is recognized by its attributes, and all others are used unchanged.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fnlight.tensors._private_torch import LOCAL

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""An offset and a shape."""


def is_sharded(tensor: Any) -> bool:
    """Say whether a tensor is a ``DTensor``, distributed over several processes.

    Args:
        tensor: Any value.

    Returns:
        True for a ``DTensor``, also where each process holds a copy of all of it.

    Example:
        >>> is_sharded(torch.zeros(2))
        False
    """
    return getattr(tensor, LOCAL, None) is not None


def local(tensor: Any) -> Any:
    """Return the local shard of a tensor (not a copy), for elementwise work.

    Args:
        tensor: Any value.

    Returns:
        The shard; any other value unchanged.

    Example:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    return getattr(tensor, LOCAL, tensor)


def local_parts(values: Iterable[Any]) -> list[Any]:
    """Return the local shards of several tensors.

    Args:
        values: Any tensors, or None.

    Returns:
        One for each.

    Example:
        >>> local_parts([torch.ones(1), None])
        [tensor([1.]), None]
    """
    return [getattr(v, LOCAL, v) for v in values]


def box(tensor: Tensor) -> Box:
    """Return the position of the local shard in the whole tensor.

    Args:
        tensor: Any tensor.

    Returns:
        Its offset and its shape.

    Example:
        >>> box(torch.zeros(2, 3))
        ((0, 0), (2, 3))
    """
    if not is_sharded(tensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    given: Any = tensor
    mesh, placements = given.device_mesh, given.placements
    coordinates = mesh.get_coordinate() or [0] * mesh.ndim
    return box_of(tensor.shape, [(dim, mesh.size(i), coordinates[i]) for i, dim in cuts(placements)])


def cuts(placements: Sequence[Any]) -> list[tuple[int, int]]:
    """Return how a tensor is sharded, in order: the mesh dimension and the tensor dimension of each cut.

    A strided shard, which fsdp makes of a tensor that tensor parallel has sharded along the same dimension, is cut last.

    Args:
        placements: Those of a ``DTensor``.

    Returns:
        Pairs of mesh dimension and tensor dimension.

    Example:
        >>> from types import SimpleNamespace
        >>> cuts([SimpleNamespace(dim=0, split_factor=2), SimpleNamespace(dim=0)])
        [(1, 0), (0, 0)]
    """
    found = [(getattr(p, "split_factor", 1) > 1, i, p.dim) for i, p in enumerate(placements) if getattr(p, "dim", None) is not None]
    return [(i, dim) for _, i, dim in sorted(found, key=lambda each: each[0])]


def box_of(shape: Sequence[int], steps: Iterable[tuple[int, int, int]]) -> Box:
    """Return the part that remains after a tensor is cut several times, each time as ``torch.chunk`` does.

    Args:
        shape: The shape of the whole tensor.
        steps: Triples of the dimension that is cut, the number of parts, and the index of the part that is kept.

    Returns:
        Offset and shape of the part; its shape holds a 0 where there are fewer rows than parts.

    Example:
        >>> box_of((5, 2), [(0, 2, 1)])
        ((3, 0), (2, 2))
    """
    offset, size = [0] * len(shape), list(shape)
    for dim, parts, index in steps:
        each = -(-size[dim] // parts)
        start = min(each * index, size[dim])
        offset[dim] += start
        size[dim] = min(each, size[dim] - start)
    return tuple(offset), tuple(size)


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that belongs to this process.

    Args:
        whole: A whole tensor.
        like: A tensor of the same shape with the wanted sharding.

    Returns:
        A view of the part; the whole tensor if `like` is not sharded.

    Example:
        >>> own_part(torch.arange(3), torch.zeros(3))
        tensor([0, 1, 2])
    """
    offset, shape = box(like)
    for dim, (start, size) in enumerate(zip(offset, shape, strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole


def like_parts(value: Tensor, like: Tensor) -> Tensor:
    """Make a sharded tensor from a local shard, with the sharding of another tensor.

    Args:
        value: The local shard.
        like: A tensor with the wanted sharding.

    Returns:
        A ``DTensor`` that shares memory with the shard; the shard itself if `like` is not sharded.

    Example:
        >>> like_parts(torch.ones(1), torch.zeros(1))
        tensor([1.])
    """
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor  # heavy, and there already where such a tensor is

    given: Any = like
    return DTensor.from_local(value, given.device_mesh, given.placements, run_check=False, shape=like.shape, stride=like.stride())


def lying_like(value: Tensor, like: Tensor) -> Tensor:
    """Give a tensor the sharding of another: a whole tensor is cut to this process's shard if the other one is sharded.

    Args:
        value: A tensor of the same shape.
        like: The other tensor.

    Returns:
        The new tensor; the value itself if `like` is not sharded, or `value` is sharded already.

    Example:
        >>> value = torch.ones(1)
        >>> lying_like(value, torch.zeros(1)) is value
        True
    """
    return like_parts(own_part(value, like).contiguous(), like) if is_sharded(like) and not is_sharded(value) else value


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a value into a tensor, in place, also if one of them is sharded.

    Args:
        target: Any tensor.
        value: A tensor of the same shape: whole, or with the sharding of the target.

    Example:
        >>> weight = torch.zeros(1)
        >>> assign(weight, torch.ones(1)); weight
        tensor([1.])
    """
    if is_sharded(target):
        value = local(value) if is_sharded(value) else own_part(value, target)
    with torch.no_grad():
        local(target).copy_(value)


def give_memory(tensor: Tensor) -> None:
    """Move a tensor to newly allocated memory, with the same values.

    Args:
        tensor: Any tensor, whole or sharded; it stays the same object.

    Example:
        >>> weight = torch.zeros(2)
        >>> other = weight.data
        >>> give_memory(other)
        >>> other.add_(1), weight
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    if is_sharded(tensor):
        setattr(tensor, LOCAL, local(tensor).clone())
    else:
        tensor.data = tensor.data.clone(memory_format=torch.preserve_format)
