"""The digest of a batch, by which a resumed run sees that its data is what it was."""

from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor

from fnlight.tensors import leaves, version_of


def digest_of(batch: Any) -> str | None:
    """A short text that is another one for another batch.

    Args:
        batch: Any tree; of objects that are neither tensors, arrays, numbers nor texts, the class counts only.

    Returns:
        16 hexadecimal digits; None where the batch holds nothing that can be compared.

    Example:
        >>> digest_of({"x": torch.arange(3)}) == digest_of({"x": torch.arange(3)}), digest_of(object())
        (True, None)
    """
    found, known = xxhash.xxh3_64(), False
    for path, leaf in _walk(batch):
        content = _bytes(leaf)
        known = known or content is not None
        found.update(f"{path} {type(leaf).__name__} {getattr(leaf, 'dtype', '')} {list(getattr(leaf, 'shape', ()))}".encode())
        found.update(b"" if content is None else content)
    return found.hexdigest() if known else None


def versions_of(batch: Any) -> int:
    """How often the tensors of a flat batch were changed in place, which a step must not do: such a batch has no digest that means anything.

    Args:
        batch: Any tree; tensors deeper than its first level are not looked at.

    Returns:
        A number, to be compared with an earlier one.

    Example:
        >>> x = torch.zeros(1)
        >>> before = versions_of((x,))
        >>> versions_of((x.add_(1),)) - before
        1
    """
    kind = batch.__class__
    found = batch if kind is tuple or kind is list else batch.values() if kind is dict else (batch,)
    versions = 0
    for each in found:  # a loop, and no generator: this is asked for at every step
        if each.__class__ is Tensor and not each.is_inference():
            versions += version_of(each)
    return versions


def _walk(batch: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a batch; what objects of other libraries hold, if they have ``to_dict``."""
    for path, leaf in leaves(batch, prefix):
        to_dict = None if isinstance(leaf, Tensor) else getattr(leaf, "to_dict", None)
        if callable(to_dict):
            yield from _walk(to_dict(), path)
        else:
            yield path, leaf


def _bytes(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return _of_tensor(leaf.detach())
    if isinstance(leaf, str):
        return leaf.encode()
    if isinstance(leaf, bytes | bytearray):
        return bytes(leaf)
    if leaf is None or isinstance(leaf, bool | int | float | complex):
        return repr(leaf).encode()
    raw = getattr(leaf, "tobytes", None)  # arrays of NumPy, pictures
    return raw() if callable(raw) else None


def _of_tensor(tensor: Tensor) -> Any:
    if tensor.is_nested or tensor.is_quantized or tensor.device.type == "meta":
        return None
    flat = (tensor if tensor.layout is torch.strided else tensor.to_dense()).cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""
