"""Trees as strict JSON: every value is read back with its type; tensors are references to names in a safetensors file.

JSON knows no tuples, no NaN and no keys but strings, so these are written as objects with one key, a tag that starts with ``$``.
"""

import base64
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from torch import Size, Tensor

from fnlight.errors import CheckpointError
from fnlight.metrics import SCALARS, Tally, merged

Put = Callable[[str, Tensor], str]
"""Takes the wanted name of a tensor and the tensor, gives the name under which it lies in the file."""


def encode(tree: Any, put: Put, path: str) -> Any:
    """Turn a tree into what ``json.dumps(..., allow_nan=False)`` takes.

    Subclasses of numbers, strings, dicts and lists come back as their plain type; a ``torch.Size`` comes back as a tuple.

    Args:
        tree: Dicts, lists, tuples, tensors, numbers, strings, bytes, bools, None and `Tally`.
        put: What takes the tensors.
        path: The name of the tree, for tensors and for errors.

    Returns:
        Dicts with string keys, lists, strings, finite numbers, bools and None.

    Raises:
        CheckpointError: If the tree holds anything else.

    Example:
        >>> encode({"a": (1, None), 0.5: [float("nan")]}, lambda name, tensor: name, "memory")
        {'$dict': [['a', {'$tuple': [1, None]}], [0.5, [{'$float': 'nan'}]]]}
    """
    kind = type(tree)
    if tree is None or kind is bool or kind is str or kind is int:  # most of a history
        return tree
    if kind is float:
        return tree if math.isfinite(tree) else {"$float": str(tree)}
    if isinstance(tree, Tensor):
        return {"$tensor": put(path, tree)}
    if isinstance(tree, str | bytes | numbers.Complex):
        return _scalar(tree)
    if isinstance(tree, Mapping):
        return _mapping(tree, put, path)
    if isinstance(tree, list):
        return [encode(item, put, f"{path}/{i}") for i, item in enumerate(tree)]
    if kind in (tuple, Size):  # of named ones, only code could make another
        return {"$tuple": [encode(item, put, f"{path}/{i}") for i, item in enumerate(tree)]}
    if isinstance(tree, Tally):
        return {"$tally": _encoded_tally(tree, put, path)}
    raise CheckpointError(
        f"{path} has type {type(tree).__name__}: {tree!r:.60}, but a checkpoint holds only dicts, lists, tuples, tensors, numbers, strings, bytes, "
        "bools and None, so that loading never runs code; convert it to one of these"
    )


def _encoded_tally(tally: Tally, put: Put, path: str) -> list[Any]:
    """Totals and what was bad; where there are parts of several ranks, of all of them, and then the parts."""
    totals, bad = (tally.totals, tally.bad) if tally.parts is None else merged(tally.parts)
    head = [_mapping(totals, put, path), encode(bad, put, path)]
    return head if tally.parts is None else [*head, encode(tally.parts, put, path)]


def _scalar(value: Any) -> Any:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else {"$float": str(number)}
    whole = complex(value)
    return {"$complex": [_scalar(whole.real), _scalar(whole.imag)]}


def _mapping(tree: Mapping[Any, Any], put: Put, path: str) -> dict[str, Any]:
    pairs = [(key, encode(value, put, f"{path}/{key}")) for key, value in tree.items()]
    if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
        return dict(pairs)
    return {"$dict": [[encode(key, _no_key, path), value] for key, value in pairs]}


def _no_key(path: str, _: Tensor) -> str:
    raise CheckpointError(f"{path} has a tensor as the key of a dict, which a checkpoint cannot hold; use a string or a number")


def decode(value: Any, get: Callable[[str], Tensor]) -> Any:
    """Turn what `encode` gave back into the tree; the inverse, for untrusted input.

    Args:
        value: What ``json.loads`` gave.
        get: Gives a tensor by its name in the file.

    Returns:
        The tree.

    Raises:
        ValueError: If the value is nothing that `encode` gives; `KeyError` and `TypeError` likewise.

    Example:
        >>> decode({"$tuple": [1, {"$float": "-inf"}]}, {}.__getitem__)
        (1, -inf)
    """
    if isinstance(value, list):
        return [decode(item, get) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {_plain(key): decode(item, get) for key, item in value.items()}
    (content,) = value.values()
    if tag == "$tensor":
        return get(content)
    if tag == "$tuple":
        return tuple(decode(item, get) for item in content)
    if tag == "$dict":
        return {decode(key, get): decode(item, get) for key, item in content}
    return _decode_scalar(tag, content)


def _plain(key: str) -> str:
    if key.startswith("$"):
        raise ValueError(f"the tag {key!r} is among plain keys")
    return key


def _decode_scalar(tag: str, content: Any) -> Any:
    if tag == "$float" and content in ("nan", "inf", "-inf"):
        return float(content)
    if tag == "$bytes":
        return base64.b64decode(content, validate=True)
    if tag == "$complex":
        real, imag = (decode(part, _no_tensor) for part in content)
        return complex(real, imag)
    if tag == "$tally":
        return _tally(*(decode(part, _no_tensor) for part in content))
    raise ValueError(f"the tag {tag!r} with the content {content!r:.40} is unknown")


def _no_tensor(name: str) -> Tensor:
    raise ValueError(f"the tensor {name!r} is where only numbers are allowed")


def _tally(totals: Any, bad: Any, parts: Any = None) -> Tally:
    held = None if parts is None else [[each.totals, each.bad] for each in (_tally(*part) for part in parts)]
    for name, (kind, *fields) in totals.items():
        if kind not in SCALARS or len(fields) != 1 + (kind == "Mean") or not all(isinstance(f, int | float | None) for f in fields):
            raise ValueError(f"the tally of {name!r} is not valid: {[kind, *fields]!r:.60}")
    if bad is not None:
        step, name = bad
        if type(step) is not int or not isinstance(name, str):
            raise ValueError(f"the step and the name of a tally are {bad!r:.60}")
        bad = (step, name)
    return Tally(totals, bad, parts=held)
