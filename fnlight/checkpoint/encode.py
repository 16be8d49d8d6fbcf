"""Trees as strict JSON: every value is read back with its type; tensors are references to names in a safetensors file.

JSON knows no tuples, no NaN and no keys but strings, so these are written as objects with one key, a tag that starts with ``$``.
"""

import base64
import math
import numbers
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Size, Tensor

from fnlight.errors import CheckpointError
from fnlight.metrics import SCALARS, Tally, merged

Put = Callable[[str, Tensor], str]
"""Takes the wanted name of a tensor and the tensor, gives the name under which it lies in the file."""

DEEPEST = 100
"""Containers within containers that are written and read: every walk over a tree calls itself, and the stack has an end."""

_LARGEST = 1 << 1023  # a float holds a little more
_ALIKE = 64  # keys of one hash in a dict; honest ones have hardly two, and each more is compared with all before it


def encode(tree: Any, put: Put, path: str, deep: int = 0) -> Any:
    """Turn a tree into what ``json.dumps(..., allow_nan=False)`` takes.

    Subclasses of numbers, strings, dicts and lists come back as their plain type; a ``torch.Size`` comes back as a tuple.

    Args:
        tree: Dicts, lists, tuples, tensors, numbers, strings, bytes, bools, None and `Tally`.
        put: What takes the tensors.
        path: The name of the tree, for tensors and for errors.
        deep: How many containers it is in already.

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
    if deep > DEEPEST:
        raise CheckpointError(
            f"{path:.200} is nested too deeply, or contains itself: a checkpoint holds {DEEPEST} containers within each other; keep it flat"
        )
    if isinstance(tree, Mapping):
        return _mapping(tree, put, path, deep)
    if isinstance(tree, list):
        return [encode(item, put, f"{path}/{i}", deep + 1) for i, item in enumerate(tree)]
    if kind in (tuple, Size):  # of named ones, only code could make another
        return {"$tuple": [encode(item, put, f"{path}/{i}", deep + 1) for i, item in enumerate(tree)]}
    if isinstance(tree, Tally):
        return {"$tally": _encoded_tally(tree, put, path)}
    raise CheckpointError(
        f"{path} has type {type(tree).__name__}: {tree!r:.60}, but a checkpoint holds only dicts, lists, tuples, tensors, numbers, strings, bytes, "
        "bools and None, so that loading never runs code; convert it to one of these"
    )


def _encoded_tally(tally: Tally, put: Put, path: str) -> list[Any]:
    """Totals and what was bad; where there are parts of several ranks, of all of them, and then the parts."""
    totals, bad = (tally.totals, tally.bad) if tally.parts is None else merged(tally.parts)
    head = [_mapping(totals, put, path, 0), encode(bad, put, path)]
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


def _mapping(tree: Mapping[Any, Any], put: Put, path: str, deep: int) -> dict[str, Any]:
    pairs = [(key, encode(value, put, f"{path}/{key}", deep + 1)) for key, value in tree.items()]
    if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
        return dict(pairs)
    return {"$dict": [[encode(key, _no_key, path, deep + 1), value] for key, value in pairs]}


def _no_key(path: str, _: Tensor) -> str:
    raise CheckpointError(f"{path} has a tensor as the key of a dict, which a checkpoint cannot hold; use a string or a number")


def decode(value: Any, get: Callable[[str], Any], deep: int = 0) -> Any:
    """Turn what `encode` gave back into the tree; the inverse, for untrusted input.

    Args:
        value: What ``json.loads`` gave.
        get: Gives a tensor by its name in the file.
        deep: How many containers it is in already.

    Returns:
        The tree.

    Raises:
        ValueError: If the value is nothing that `encode` gives; `KeyError` and `TypeError` likewise.

    Example:
        >>> decode({"$tuple": [1, {"$float": "-inf"}]}, {}.__getitem__)
        (1, -inf)
    """
    if not isinstance(value, list | dict):
        return value
    if deep > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    if isinstance(value, list):
        return [decode(item, get, deep + 1) if isinstance(item, list | dict) else item for item in value]
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {_plain(key): decode(item, get, deep + 1) if isinstance(item, list | dict) else item for key, item in value.items()}
    if len(value) != 1:
        raise ValueError(f"the tag {tag!r:.40} is one of several keys")
    content = value[tag]
    if tag == "$tensor":
        return get(content)
    if tag == "$float" and content in ("nan", "inf", "-inf"):
        return float(content)
    if tag == "$bytes" and isinstance(content, str):
        return base64.b64decode(content, validate=True)
    if not isinstance(content, list):
        raise ValueError(f"the tag {tag!r:.40} with the content {content!r:.40} is unknown")  # noqa: TRY004  # a file is no argument
    return _decode_items(tag, content, get, deep)


def _decode_items(tag: str, content: list[Any], get: Callable[[str], Any], deep: int) -> Any:
    if tag == "$tuple":
        return tuple(decode(item, get, deep + 1) for item in content)
    if tag == "$dict" and all(isinstance(pair, list) and len(pair) == 2 for pair in content):
        keys = [decode(key, no_tensor, deep + 1) for key, _ in content]
        return dict(zip(_apart(keys), (decode(item, get, deep + 1) for _, item in content), strict=True))
    if tag == "$complex" and len(content) == 2:
        real, imag = (decode(part, no_tensor, deep + 1) for part in content)
        return complex(real, imag)
    if tag == "$tally" and 2 <= len(content) <= 3:
        return _tally(*(decode(part, no_tensor, deep + 1) for part in content))
    raise ValueError(f"the tag {tag!r:.40} with the content {content!r:.40} is unknown")


def _apart(keys: list[Hashable]) -> list[Hashable]:
    """The keys of a dict, none of them twice, nor so many of one hash that making the dict would take forever."""
    hashes = Counter(map(hash, keys))
    if max(hashes.values(), default=0) > _ALIKE:
        raise ValueError(f"{max(hashes.values())} keys of a dict have one hash, as only those do that were made to slow a reader down")
    if len(hashes) != len(keys) and len(set(keys)) != len(keys):
        raise ValueError("a dict has a key twice")
    return keys


def _plain(key: str) -> str:
    if key.startswith("$"):
        raise ValueError(f"the tag {key!r} is among plain keys")
    return key


def no_tensor(name: str) -> Tensor:
    """Refuse a tensor where none may be; for ``decode(value, get)``.

    Args:
        name: Its name.

    Returns:
        Never.

    Raises:
        ValueError: Always.

    Example:
        >>> no_tensor("a")
        Traceback (most recent call last):
        ValueError: the tensor 'a' is where only numbers may be
    """
    raise ValueError(f"the tensor {name!r:.80} is where only numbers may be")


def _tally(totals: Any, bad: Any, parts: Any = None) -> Tally:
    if not isinstance(totals, dict):
        raise ValueError(f"the totals of a tally are {totals!r:.60}")  # noqa: TRY004  # a file is no argument
    for name, fields in totals.items():
        if not isinstance(name, str) or not isinstance(fields, list) or not _are_fields(*fields):
            raise ValueError(f"the tally of {name!r:.60} is none: {fields!r:.60}")
    if bad is not None and not (isinstance(bad, tuple | list) and len(bad) == 2 and type(bad[0]) is int and isinstance(bad[1], str)):
        raise ValueError(f"the step and the name of a tally are {bad!r:.60}")
    if parts is not None and not (isinstance(parts, list) and all(isinstance(part, list) and len(part) == 2 for part in parts)):
        raise ValueError(f"the parts of a tally are {parts!r:.60}")
    held = None if parts is None else [[each.totals, each.bad] for each in (_tally(*part) for part in parts)]
    return Tally(totals, None if bad is None else (bad[0], bad[1]), parts=held)


def _are_fields(kind: Any = None, *fields: Any) -> bool:
    """Say whether these are the fields of a monoid; what was `Last` given may be nothing."""
    if not isinstance(kind, str) or kind not in SCALARS or len(fields) != 1 + (kind == "Mean"):
        return False
    return all((is_real(field) and not isinstance(field, bool)) or (field is None and kind == "Last") for field in fields)


def is_real(value: Any) -> bool:
    """Say whether a value from a file is a number that a float can hold, such as a metric.

    Args:
        value: What `decode` gave.

    Returns:
        False for whole numbers that are too large.

    Example:
        >>> is_real(0.5), is_real(True), is_real(10**400), is_real("0.5")
        (True, True, False, False)
    """
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < _LARGEST)
