"""The header of an untrusted safetensors file: its entries are checked before a byte of a tensor is read.

Every bound holds for what fnlight writes, too, so that nothing is written that could not be read.
"""

import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

MAX_HEADER = 100_000_000
"""Bytes of a header, as in the safetensors library."""

MAX_TENSORS = 1 << 18
"""Tensors in a file."""

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""The dtypes that are written and read."""

_DTYPES = {code: dtype for dtype, code in CODES.items()}
_MOST = 1 << 62  # elements or bytes that torch can count


@attrs.frozen
class Place:
    """The position of a tensor in a file.

    Args:
        dtype: Its dtype.
        shape: Its shape.
        start: Its first byte, counted from the begin of the file.
        end: The byte behind its last one.

    Example:
        >>> Place(torch.float32, (2,), 80, 88).meta().shape
        torch.Size([2])
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def meta(self) -> Tensor:
        """A tensor of this kind without any bytes."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def mapped(self, whole: Tensor) -> Tensor:
        """The tensor, as a view of all bytes of the file; a copy where it is not aligned."""
        if self.start == self.end:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        own = whole[self.start : self.end]
        return (own.clone() if self.start % self.dtype.itemsize else own).view(self.dtype).reshape(self.shape)

    def tensor(self, data: bytearray, offset: int) -> Tensor:
        """The tensor, as a view of bytes of which the first stands at an offset of the file."""
        if self.start == self.end:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        count = (self.end - self.start) // self.dtype.itemsize
        return torch.frombuffer(data, dtype=self.dtype, count=count, offset=self.start - offset).reshape(self.shape)


def read_header(read: Callable[[int, int], bytes], size: int) -> dict[str, Place]:
    """Read and check the header of a safetensors file.

    Args:
        read: Gives the bytes from a start to an end.
        size: Bytes of the file.

    Returns:
        Names to places, which lie one behind the other and fill the file.

    Raises:
        ValueError: If the file is not a safetensors file, or its header has impossible entries.

    Example:
        >>> data = b'@' + bytes(7) + b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(64) + bytes(4)
        >>> read_header(lambda start, end: data[start:end], len(data))["x"].shape
        (1,)
    """
    if size < 8:
        raise ValueError(f"{size} bytes are too few for a header")
    length = int.from_bytes(read(0, 8), "little")
    if length > min(size - 8, MAX_HEADER):
        raise ValueError(f"the header would have {length} bytes, in a file of {size}; the limit is {MAX_HEADER}")
    text = read(8, 8 + length)
    if text.count(b"{") > MAX_TENSORS + 2 or text.count(b",") > 16 * MAX_TENSORS:
        raise ValueError(f"the header lists more than {MAX_TENSORS} tensors, or much else")
    with uncollected():
        return _places(text, 8 + length, size)


def _places(text: bytes, begin: int, size: int) -> dict[str, Place]:
    try:
        listed = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the header is not valid JSON: {type(error).__name__}") from error
    if not isinstance(listed, dict):
        raise ValueError(f"the header is no JSON object, but {type(listed).__name__}")  # noqa: TRY004  # a file is no argument
    metadata = listed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"the metadata of the header is {metadata!r:.80}")
    places = {name: _place(name, entry, begin) for name, entry in listed.items()}
    end = begin
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != end:
            raise ValueError(f"{name:.80} starts at byte {place.start}, but the data before it ends at {end}")
        end = place.end
    if end != size:
        raise ValueError(f"the tensors end at byte {end}, but the file has {size}")
    return places


def _place(name: str, entry: Any, begin: int) -> Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name:.80} is listed as {entry!r:.80}")
    dtype, shape, offsets = _DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    counts = [shape, offsets]
    if (
        dtype is None
        or not all(isinstance(c, list) and all(type(n) is int and 0 <= n < _MOST for n in c) for c in counts)
        or len(offsets) != 2
    ):
        raise ValueError(f"{name:.80} is listed as {entry!r:.80}")
    if len(shape) > 64 or math.prod(n for n in shape if n) * dtype.itemsize >= _MOST:
        raise ValueError(f"{name:.80} has the shape {shape!r:.80}")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name:.80} of {entry['dtype']} {shape!r:.80} does not match the bytes {offsets}")
    return Place(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


@contextmanager
def uncollected() -> Iterator[None]:
    """Let Python make many objects without looking for garbage among them again and again, which takes ten times as long as making them.

    Example:
        >>> with uncollected():
        ...     gc.isenabled()
        False
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict; for ``json.loads(object_pairs_hook=...)``.

    Args:
        pairs: Keys and values.

    Returns:
        The dict.

    Raises:
        ValueError: If a key occurs twice.

    Example:
        >>> unique([("a", 1)])
        {'a': 1}
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def no_constant(name: str) -> None:
    """Raise for constants that are not JSON; for ``json.loads(parse_constant=...)``.

    Args:
        name: ``NaN``, ``Infinity`` or ``-Infinity``.

    Raises:
        ValueError: Always.

    Example:
        >>> no_constant("NaN")
        Traceback (most recent call last):
        ValueError: NaN is not valid JSON
    """
    raise ValueError(f"{name} is not valid JSON")
