"""Trees: any nesting of dicts, lists, tuples, namedtuples, dataclasses and attrs objects, with tensors at the leaves.

Nothing here runs over many leaves in every step; the loop uses flat dicts and lists. Torch's own functions for trees are private
(``torch.utils._pytree``, torch 2.13) and know attrs classes and dataclasses only if they are registered.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor


def _children(node: Any) -> list[tuple[str, Any]] | None:
    """The named children of a container, or None for a leaf."""
    if isinstance(node, Mapping):
        return [(str(k), v) for k, v in node.items()]
    if isinstance(node, tuple) and getattr(node, "_fields", None) is not None:
        return list(zip(node._fields, node, strict=True))  # pyright: ignore[reportAttributeAccessIssue]  # a namedtuple
    if isinstance(node, list | tuple):
        return [(str(i), v) for i, v in enumerate(node)]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(f.name, getattr(node, f.name)) for f in dataclasses.fields(node)]
    if attrs.has(type(node)):
        return [(f.name, getattr(node, f.name)) for f in attrs.fields(type(node))]
    return None


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the leaves of a tree with their paths, in the order of the containers.

    Args:
        tree: Any nesting of containers.
        prefix: A prefix of every path.

    Returns:
        An iterator of ``(path, leaf)``; the parts of a path are joined with ``/``.

    Example:
        >>> list(leaves({"x": (1, 2), "y": [3]}))
        [('x/0', 1), ('x/1', 2), ('y/0', 3)]
    """
    children = _children(tree)
    if children is None:
        yield prefix, tree
        return
    for name, child in children:
        yield from leaves(child, f"{prefix}/{name}" if prefix else name)


def map_tensors(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to every tensor of a tree; the tree keeps its types, and other leaves are unchanged.

    Args:
        fn: A function of a tensor.
        tree: Any nesting of containers.

    Returns:
        A new tree of the same types.

    Example:
        >>> map_tensors(lambda t: t.tolist(), {"x": torch.ones(2), "n": 3})
        {'x': [1.0, 1.0], 'n': 3}
    """
    if isinstance(tree, Tensor):
        return fn(tree)
    children = _children(tree)
    if children is None:
        return tree
    values = [map_tensors(fn, child) for _, child in children]
    return _rebuild(tree, values)


def map_nodes(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to the nodes of a tree, containers before their contents; the tree keeps its types.

    Args:
        fn: Maps a node to its replacement, or returns ``NotImplemented``: then it is applied to the node's children.
        tree: Any nesting of containers.

    Returns:
        A new tree of the same types.

    Example:
        >>> map_nodes(lambda node: node[:1] if isinstance(node, list) else NotImplemented, {"x": ([1, 2], 3)})
        {'x': ([1], 3)}
    """
    found = fn(tree)
    if found is not NotImplemented:
        return found
    children = _children(tree)
    return tree if children is None else _rebuild(tree, [map_nodes(fn, child) for _, child in children])


def _rebuild(node: Any, values: list[Any]) -> Any:
    kind: Any = type(node)
    if isinstance(node, Mapping):
        pairs = dict(zip(node, values, strict=True))
        return pairs if kind is dict else _rebuild_mapping(node, pairs)
    if isinstance(node, tuple) and getattr(node, "_fields", None) is not None:
        return kind(*values)
    if isinstance(node, list | tuple):
        return kind(values)
    twin = copy.copy(node)  # no constructor runs: it may take other arguments, or compute what is given here
    for (name, _), value in zip(_children(node) or (), values, strict=True):
        object.__setattr__(twin, name, value)
    return twin


def _rebuild_mapping(node: Mapping[Any, Any], pairs: dict[Any, Any]) -> Any:
    default = getattr(node, "default_factory", None)
    return type(node)(pairs) if default is None else type(node)(default, pairs)  # pyright: ignore[reportCallIssue]  # a defaultdict


def equal(a: Any, b: Any) -> bool:
    """Say whether two trees are bit-identical: types, shapes, dtypes and values; NaN equals NaN.

    Args:
        a: A tree.
        b: Another tree.

    Returns:
        True if nothing differs.

    Example:
        >>> equal({"x": torch.zeros(2)}, {"x": torch.zeros(2)}), equal({"x": 1}, {"x": 2})
        (True, False)
    """
    return next(differences(a, b), None) is None


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """List where two trees differ, one line per difference.

    Args:
        a: A tree.
        b: Another tree.
        path: A prefix of every path.

    Returns:
        An iterator of lines such as ``params/weight: largest difference 0.5``.

    Example:
        >>> list(differences({"x": torch.zeros(2)}, {"x": torch.tensor([0.0, 0.5])}))
        ['x: largest difference 0.5']
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        yield from _tensor_differences(a, b, path)
        return
    left, right = _children(a), _children(b)
    if left is None or right is None:
        if not _same_leaf(a, b):
            yield f"{path}: {a!r} against {b!r}"
        return
    if type(a) is not type(b) and not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        yield f"{path}: {type(a).__name__} against {type(b).__name__}"
        return
    one, two = dict(left), dict(right)
    for name in [*one, *(n for n in two if n not in one)]:
        where = f"{path}/{name}" if path else name
        if name not in one or name not in two:
            yield f"{where}: only in the {'first' if name in one else 'second'}"
        else:
            yield from differences(one[name], two[name], where)
    if isinstance(a, Mapping) and one.keys() == two.keys() and a.keys() != b.keys():
        yield f"{path}: keys of other types, {list(a)} against {list(b)}"


def _same_leaf(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if getattr(a, "dtype", None) is None:
        return bool(a == b or (a != a and b != b))
    if a.shape != b.shape or a.dtype != b.dtype:  # arrays and scalars of NumPy
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _tensor_differences(a: Tensor, b: Tensor, path: str) -> Iterator[str]:
    if a.shape != b.shape or a.dtype != b.dtype:
        yield f"{path}: {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}"
        return
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.is_sparse or b.is_sparse:
        a, b = a.to_dense(), b.to_dense()
    known = (a == a) & (b == b)
    if torch.equal(a != a, b != b) and torch.equal(_bits(a[known]), _bits(b[known])):
        return
    wide = torch.complex128 if a.is_complex() else torch.float64
    largest = float((a.to(wide) - b.to(wide)).abs().max())
    yield f"{path}: largest difference {largest:g}" if largest else f"{path}: zeros of another sign"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
