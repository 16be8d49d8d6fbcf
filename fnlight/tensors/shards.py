"""Tensors of which every process holds a part: torch's ``DTensor``, as fsdp and tensor parallel make them.

Nothing is imported from ``torch.distributed``: a tensor that has a local part says so itself, and all others are taken as they are.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fnlight.tensors._private_torch import LOCAL

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""An offset and a shape."""


def is_sharded(tensor: Any) -> bool:
    """Say whether a tensor lies on several processes.

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
    """The part of a tensor that lies here: the live memory, for work that goes element by element.

    Args:
        tensor: Any value.

    Returns:
        The part; all else as it is.

    Example:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    return getattr(tensor, LOCAL, tensor)


def local_parts(values: Iterable[Any]) -> list[Any]:
    """The parts of several tensors that lie here.

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
    """Where the part that lies here is in the whole.

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
    """How a tensor is cut, in order: the dimension of the mesh and that of the tensor.

    A strided shard, which fsdp makes of what tensor parallel has cut already along the same dimension, is cut last.

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
    """The part that is left when a tensor is cut again and again, each time as ``torch.chunk`` does.

    Args:
        shape: That of the whole.
        steps: Triples of the dimension that is cut, into how many parts, and which of them is taken.

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
    """The part of a whole tensor that lies here.

    Args:
        whole: Has the shape of the whole.
        like: A tensor of that shape that lies as wanted.

    Returns:
        A view of the part; the whole where `like` lies here alone.

    Example:
        >>> own_part(torch.arange(3), torch.zeros(3))
        tensor([0, 1, 2])
    """
    offset, shape = box(like)
    for dim, (start, size) in enumerate(zip(offset, shape, strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole


def like_parts(value: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor that lies here as a tensor that lies on several processes as another one does.

    Args:
        value: The part.
        like: Says how.

    Returns:
        A ``DTensor`` that shares the memory of the part; the part itself where `like` lies here alone.

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
    """A tensor as it lies where another one does: of a whole one the own part, where that one lies on several processes.

    Args:
        value: Of the same shape.
        like: The other tensor.

    Returns:
        The value itself, where both lie alike.

    Example:
        >>> value = torch.ones(1)
        >>> lying_like(value, torch.zeros(1)) is value
        True
    """
    return like_parts(own_part(value, like).contiguous(), like) if is_sharded(like) and not is_sharded(value) else value


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a value into a tensor, in place, whichever of them lies on several processes.

    Args:
        target: Any tensor.
        value: Of the same shape: whole, or as the target lies.

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
    """Let a tensor lie in memory of its own, with the values that it has.

    Args:
        tensor: Any tensor, whole or in parts; it stays the same object.

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
