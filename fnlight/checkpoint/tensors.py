"""The safetensors format, written and read tensor by tensor, so that there is no second copy of the state in memory."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from fnlight.checkpoint.digest import Digest
from fnlight.checkpoint.header import CODES, MAX_HEADER, MAX_TENSORS, read_header
from fnlight.errors import CheckpointError

_PIECE = 1 << 20  # bytes that are read at a time: they are still in the processor's cache when they are digested
_AS_REAL = {torch.complex128: torch.float64, torch.complex32: torch.float16}  # no code of their own: a last dimension of 2


def describe(tensor: Tensor) -> list[Any]:
    """The dtype and shape of a tensor, as the manifest lists them.

    Args:
        tensor: Any tensor.

    Returns:
        ``[dtype, shape]``.

    Example:
        >>> describe(torch.zeros(2, 3))
        ['float32', [2, 3]]
    """
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


@attrs.frozen(repr=False)
class Chunks:
    """The bytes of a safetensors file, which can be gone over again; made by `chunks`.

    Args:
        tensors: Names to tensors.
        offsets: Where each is in the whole, if these are parts.

    Example:
        >>> found = Chunks({"x": torch.zeros(2)})
        >>> sum(map(len, found)) == sum(map(len, found))
        True
    """

    tensors: Mapping[str, Tensor]
    offsets: Mapping[str, Sequence[int]] | None = None

    def __iter__(self) -> Iterator[memoryview]:
        return _chunks(self.tensors, self.offsets)


def chunks(tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]] | None = None) -> Chunks:
    """The bytes of a safetensors file: its header, then one tensor at a time.

    Equal tensors give equal bytes. Large elements come first, so that all are aligned in a mapped file.

    Args:
        tensors: Names to dense tensors of any shape, strides and device.
        offsets: Where each is in the whole, if these are parts: the header says so as that of torch's own files does.

    Returns:
        An iterable of views; each is valid until the next one is asked for.

    Raises:
        CheckpointError: If a tensor has no bytes to write (sparse, meta), or a dtype or name that the format lacks.

    Example:
        >>> sum(len(chunk) for chunk in chunks({"x": torch.zeros(2)})) % 8
        0
    """
    return Chunks(tensors, offsets)


def _chunks(tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]] | None) -> Iterator[memoryview]:
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    order = sorted(tensors, key=lambda name: (-_stored(tensors[name]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # one key only: several are written in random order by the library
    if offsets is not None:
        places = {name: {"saved_offsets": [*offsets[name], *([0] if tensors[name].dtype in _AS_REAL else [])]} for name in order}
        header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(places, separators=(",", ":"))
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.itemsize
        shape = [*tensor.shape, 2] if tensor.dtype in _AS_REAL else list(tensor.shape)
        header[name] = {"dtype": CODES[_stored(tensor)], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(tensors) > MAX_TENSORS or len(text) > MAX_HEADER:
        raise CheckpointError(
            f"{len(tensors)} tensors with a header of {len(text)} bytes are too many for one file, which has at most {MAX_TENSORS} tensors and "
            f"a header of {MAX_HEADER} bytes; stack small tensors into fewer"
        )
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        if tensors[name].numel():
            yield _bytes(tensors[name])


def _stored(tensor: Tensor) -> torch.dtype:
    return _AS_REAL.get(tensor.dtype, tensor.dtype)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that the format cannot hold.

    Args:
        name: Its name in the file.
        tensor: Any tensor.

    Raises:
        CheckpointError: If it has no bytes to write (sparse, meta), or a dtype or name that the format lacks.

    Example:
        >>> check_tensor("x", torch.zeros(2))
    """
    if name == "__metadata__":
        raise CheckpointError("a parameter or buffer has the name '__metadata__', which the safetensors format reserves; rename it")
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"sparse ({tensor.layout})"
        raise CheckpointError(f"{name} is {kind}, but a checkpoint holds only dense tensors with values; convert it, e.g. with .to_dense()")
    if _stored(tensor) not in CODES:
        known = ", ".join(str(d).removeprefix("torch.") for d in CODES)
        raise CheckpointError(f"{name} is {tensor.dtype}, but the safetensors format supports only {known}; convert it")


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    if flat.dtype in _AS_REAL:
        flat = torch.view_as_real(flat).reshape(-1)
    return _view(flat.contiguous())


def _view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, as they lie in memory."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def fetch(readinto: Callable[[memoryview], int | None], size: int, kind: str) -> tuple[dict[str, Tensor], str]:
    """Read a safetensors file from its begin to its end, each byte once, into tensors of their own.

    They are no views of a file: whoever writes over it later changes nothing, and they are aligned as torch aligns its own.

    Args:
        readinto: Fills a view from where the last one ended, or a part of it, and says how many bytes.
        size: Bytes of the file.
        kind: The kind of digest, of `fnlight.checkpoint.digest.KINDS`.

    Returns:
        Names to tensors, and the digest of the very bytes that they were filled with.

    Raises:
        ValueError: If the file is no safetensors file, or ends too early.

    Example:
        >>> import io
        >>> data = b"".join(chunks({"x": torch.ones(2)}))
        >>> fetch(io.BytesIO(data).readinto, len(data), "xxh3")[0]
        {'x': tensor([1., 1.])}
    """
    digest = Digest(kind)

    def fill(view: memoryview) -> memoryview:
        for start in range(0, len(view), _PIECE):
            piece = rest = view[start : start + _PIECE]
            while rest:
                count = readinto(rest)
                if not count:
                    raise ValueError(f"the file ends before the {size} bytes that it should have")
                rest = rest[count:]
            digest.update(piece)
        return view

    places = read_header(lambda start, end: bytes(fill(memoryview(bytearray(end - start)))), size)
    found: dict[str, Tensor] = {}
    for name in sorted(places, key=lambda name: places[name].start):
        found[name] = roomy(places[name].shape, places[name].dtype)
        if found[name].numel():
            fill(_view(found[name]))
    return found, str(digest)


def roomy(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor to be filled, if this machine has room for it: a file without content may be said to be of any size.

    Args:
        shape: Its shape.
        dtype: Its dtype.

    Returns:
        The tensor, on the CPU.

    Raises:
        CheckpointError: If it is larger than the memory of the machine.

    Example:
        >>> roomy((1 << 30, 1 << 20), torch.float32)
        Traceback (most recent call last):
        fnlight.errors.CheckpointError: a tensor of shape [1073741824, 1048576] takes 4194304.0 GiB, more than the memory of this machine
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        if size <= memory_of_machine():
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    except RuntimeError as error:  # of the allocator
        raise CheckpointError(
            f"a tensor of shape {list(shape)} takes {size / (1 << 30):.1f} GiB, which this machine does not give: {error!s:.200}"
        ) from error
    raise CheckpointError(f"a tensor of shape {list(shape)} takes {size / (1 << 30):.1f} GiB, more than the memory of this machine")


def memory_of_machine() -> int:
    """How much memory this machine has.

    Returns:
        Bytes; a very large number where the machine does not say.

    Example:
        >>> memory_of_machine() > 1 << 20
        True
    """
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 1 << 62


def as_listed(found: Mapping[str, Tensor], listed: Mapping[str, Any]) -> dict[str, Tensor]:
    """Give the tensors of a file the dtypes that the manifest lists, and check that both agree.

    Args:
        found: What the safetensors file holds.
        listed: Names to ``[dtype, shape]``.

    Returns:
        Names to tensors, in the order of the manifest.

    Raises:
        ValueError: If a name, dtype or shape differs.

    Example:
        >>> as_listed({"x": torch.zeros(1, 2)}, {"x": ["float32", [1, 2]]})["x"].shape
        torch.Size([1, 2])
    """
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape) in listed.items():
        tensor, stored = found.get(name), [*shape, 2] if dtype in ("complex128", "complex32") else shape
        if tensor is not None and len(stored) > len(shape) and list(tensor.shape) == stored:
            tensor = torch.view_as_complex(tensor)
        if tensor is None or describe(tensor) != [dtype, shape]:
            held = "nothing" if tensor is None else describe(tensor)
            raise ValueError(f"{name:.80} is {held} in the file, but {[dtype, shape]} in state.json")
        tensors[name] = tensor
    if len(found) != len(tensors):
        raise ValueError(f"the file has {sorted(set(found) - set(tensors))[:5]}, but state.json does not list them")
    return tensors
