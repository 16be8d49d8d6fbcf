"""Read parts of tensors from files that are split in another way; only the needed bytes are read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fnlight.checkpoint.header import Place, read_header
from fnlight.checkpoint.layout import WHOLE, Layout, overlap, part_name
from fnlight.checkpoint.tensors import roomy
from fnlight.tensors import Box, box, like_parts

Part = Callable[[str, int, int], Any]
"""Gives the bytes of a file from a start to an end."""

Into = Callable[[str, int, memoryview], None]
"""Fills memory with the bytes of a file from a start on."""

Like = Callable[[str, tuple[int, ...]], Tensor | None]
"""The tensor that a name of a file shall lie like, of its shape; None where all of it is wanted."""

Stored = tuple[torch.dtype, tuple[int, ...]]
"""The dtype and shape of a tensor in a file."""

_PIECE = 1 << 26  # bytes that are asked for at once
_AS_REAL = ("complex128", "complex32")  # stored with a last dimension of 2


def read_pieces(
    part: Part,
    size: Callable[[str], int | None],
    file: str,
    entry: Mapping[str, Any],
    layouts: Sequence[Layout],
    like: Like,
    into: Into | None = None,
) -> dict[str, Tensor]:
    """Read the tensors of a file, or what is wanted of each.

    Args:
        part: Gives bytes of a file.
        size: Gives the bytes that a file has.
        file: Its name in the manifest.
        entry: What the manifest says of it.
        layouts: The layouts that the manifest lists.
        like: How each shall lie here.
        into: Reads bytes into memory that is there already, where that can be done.

    Returns:
        Names to tensors, in the order of the manifest.

    Raises:
        ValueError: If a file is none, or holds other tensors than the manifest says.

    Example:
        >>> from fnlight.checkpoint import chunks
        >>> data = b"".join(chunks({"x": torch.arange(3.0)}))
        >>> entry = {"tensors": {"x": ["float32", [3]]}}
        >>> read_pieces(lambda name, start, end: data[start:end], lambda name: len(data), "a", entry, [], lambda name, shape: None)
        {'x': tensor([0., 1., 2.])}
    """
    found: dict[str, Tensor] = {}
    wishes: dict[int, list[Any]] = {}
    homes: dict[str, Tensor | None] = {}
    for name, (kind, shape) in entry["tensors"].items():
        home = homes[name] = like(name, tuple(shape))
        wanted: Box = ((0,) * len(shape), tuple(shape)) if home is None else box(home)
        stored = (*wanted[1], 2) if kind in _AS_REAL else wanted[1]
        found[name] = roomy(stored, _stored(kind))
        layout = layouts[entry["cut"][name]] if name in entry.get("cut", ()) else WHOLE
        for index, offset, cell in layout.cells(shape, wanted):
            common = overlap(wanted, (offset, cell))
            if common is not None:
                wishes.setdefault(index, []).append((name, wanted[0], common, (offset, cell)))
    count = len(entry["parts"]) if "parts" in entry else None
    for index, wanted_here in sorted(wishes.items()):
        _fill(part, size, file if count is None else part_name(file, index, count), wishes=wanted_here, found=found, into=into)
    return {name: _placed(found[name], entry["tensors"][name][0], homes[name]) for name in found}


def joined(
    file: str, entry: Mapping[str, Any], layouts: Sequence[Layout], fetch: Callable[[str], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The whole tensors of a file that is cut into parts, each of which is read from its begin to its end.

    Args:
        file: Its name in the manifest.
        entry: What the manifest says of it.
        layouts: The layouts that the manifest lists.
        fetch: Reads a part: names to tensors.

    Returns:
        Names to tensors, as they are stored.

    Raises:
        ValueError: If a part holds other tensors than the manifest says.

    Example:
        >>> entry = {"parts": [[0, ""], [0, ""]], "tensors": {"x": ["float32", [2]]}, "cut": {"x": 0}}
        >>> joined("a.b", entry, [Layout(((0, 2),), (0, 1))], lambda name: {"x": torch.ones(1)})
        {'x': tensor([1., 1.])}
    """
    found = {
        name: roomy((*shape, 2) if kind in _AS_REAL else tuple(shape), _stored(kind)) for name, (kind, shape) in entry["tensors"].items()
    }
    for index in range(len(entry["parts"])):
        name = part_name(file, index, len(entry["parts"]))
        held = dict(fetch(name))
        for key, (offset, size) in cells_of(entry, layouts, index).items():
            target, value = found[key], held.pop(key, None)
            for dim, (start, count) in enumerate(zip(offset, size, strict=True)):
                target = target.narrow(dim, start, count)
            if value is None or value.shape != target.shape or value.dtype != target.dtype:
                raise ValueError(f"{name} does not have the part of {key:.80} that state.json lists, {target.dtype} {list(target.shape)}")
            target.copy_(value)
        if held:
            raise ValueError(f"{name} has {sorted(held)[:5]}, but state.json does not list them")
    return found


def compare_header(part: Part, name: str, size: int, stored: Mapping[str, Stored]) -> str | None:
    """Hold the header of a file against the manifest; no tensor is read.

    Args:
        part: Gives bytes of a file.
        name: The file.
        size: Its bytes.
        stored: What it should hold, see `stored_in`.

    Returns:
        What is wrong, if anything is.

    Example:
        >>> from fnlight.checkpoint import chunks
        >>> data = b"".join(chunks({"x": torch.ones(1)}))
        >>> compare_header(lambda name, start, end: data[start:end], "a.b", len(data), {"x": (torch.float32, (2,))})
        'a.b holds x as torch.float32 [1], but state.json says torch.float32 [2]'
    """
    try:
        places = read_header(lambda start, end: bytes(part(name, start, end)), size)
    except ValueError as error:
        return f"{name} cannot be read: {error}"
    for key in sorted(stored.keys() | places.keys()):
        held = (places[key].dtype, places[key].shape) if key in places else None
        if held != stored.get(key):
            says = ["nothing" if each is None else f"{each[0]} {list(each[1])}" for each in (held, stored.get(key))]
            return f"{name} holds {key:.80} as {says[0]}, but state.json says {says[1]}"
    return None


def stored_in(entry: Mapping[str, Any], layouts: Sequence[Layout], index: int) -> dict[str, Stored]:
    """What one file holds, as it is stored.

    Args:
        entry: What the manifest says of the file, or of all its parts.
        layouts: The layouts that the manifest lists.
        index: The number of the part, from 0 on.

    Returns:
        Names to dtypes and shapes.

    Example:
        >>> stored_in({"tensors": {"x": ["complex128", [3]]}}, [], 0)
        {'x': (torch.float64, (3, 2))}
    """
    kinds = {name: kind for name, (kind, _) in entry["tensors"].items()}
    if "parts" in entry:
        shapes = {name: size for name, (_, size) in cells_of(entry, layouts, index).items()}
    else:
        shapes = {name: shape for name, (_, shape) in entry["tensors"].items()}
    return {name: (_stored(kinds[name]), (*shape, *([2] if kinds[name] in _AS_REAL else []))) for name, shape in shapes.items()}


def cells_of(entry: Mapping[str, Any], layouts: Sequence[Layout], index: int) -> dict[str, Box]:
    """What one part of a file holds.

    Args:
        entry: What the manifest says of the file.
        layouts: The layouts that the manifest lists.
        index: The number of the part, from 0 on.

    Returns:
        Names to offsets and shapes.

    Example:
        >>> cells_of({"tensors": {"x": ["float32", [3]]}, "cut": {"x": 0}}, [Layout(((0, 2),), (0, 1))], 1)
        {'x': ((2,), (1,))}
    """
    found: dict[str, Box] = {}
    for name, (_, shape) in entry["tensors"].items():
        layout = layouts[entry["cut"][name]] if name in entry["cut"] else WHOLE
        for _, offset, size in layout.part(index, shape):
            found[name] = (offset, size)
        if 0 in shape and index == 0:
            found[name] = ((0,) * len(shape), tuple(shape))
    return found


def _placed(value: Tensor, kind: str, home: Tensor | None) -> Tensor:
    if kind in _AS_REAL:
        value = torch.view_as_complex(value)
    return value if home is None else like_parts(value, home)


def _stored(kind: str) -> torch.dtype:
    return {"complex128": torch.float64, "complex32": torch.float16}.get(kind) or getattr(torch, kind)


def _fill(part: Part, size: Callable[[str], int | None], file: str, wishes: list[Any], found: dict[str, Tensor], into: Into | None) -> None:
    places = read_header(lambda start, end: bytes(part(file, start, end)), size(file) or 0)
    ranges: list[tuple[int, int, Any]] = []
    for wish in wishes:
        name, _, common, cell = wish
        place = places.get(name)
        stored = (*cell[1], 2) if found[name].dim() > len(cell[1]) else cell[1]
        if place is None or place.shape != tuple(stored) or place.dtype != found[name].dtype:
            held = "nothing" if place is None else f"{place.dtype} {list(place.shape)}"
            raise ValueError(f"{file} holds {held} of {name:.80}, but state.json says {found[name].dtype} {list(stored)}")
        ranges.append((*_rows(place, common, cell), wish))
    ranges = [each for each in ranges if into is None or not _straight(into, file, places[each[2][0]], found, *each)]
    for group in _neighbours(sorted(ranges, key=lambda each: each[0])):
        start = group[0][0]
        data = memoryview(part(file, start, group[-1][1]))
        data = memoryview(bytearray(data)) if data.readonly else data  # torch takes none that cannot be written
        for begin, end, (name, origin, common, cell) in group:
            _copy(data[begin - start : end - start], places[name], found[name], origin=origin, common=common, cell=cell)


def _straight(into: Into, file: str, place: Place, found: Mapping[str, Tensor], begin: int, end: int, wish: Any) -> bool:
    """Read rows straight to where they belong, if they lie there one behind the other; say whether that was done."""
    name, origin, common, cell = wish
    target = _target(found[name], origin, common)
    if not target.is_contiguous() or target.numel() * target.itemsize != end - begin or common[1][1:] != cell[1][1:]:
        return False
    into(file, begin, memoryview(target.reshape(-1).view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]  # an array is a buffer
    return True


def _target(whole: Tensor, origin: Sequence[int], common: Box) -> Tensor:
    for dim, (start, size) in enumerate(zip(*common, strict=True)):
        whole = whole.narrow(dim, start - origin[dim], size)
    return whole


def _rows(place: Place, common: Box, cell: Box) -> tuple[int, int]:
    """The bytes of the rows that are wanted."""
    if not place.shape:
        return place.start, place.end
    row = (place.end - place.start) // place.shape[0]
    first = common[0][0] - cell[0][0]
    return place.start + first * row, place.start + (first + common[1][0]) * row


def _neighbours(ranges: Iterable[tuple[int, int, Any]]) -> list[list[tuple[int, int, Any]]]:
    groups: list[list[tuple[int, int, Any]]] = []
    for each in ranges:
        last = groups[-1] if groups else None
        if last is not None and last[-1][1] == each[0] and each[1] - last[0][0] <= _PIECE:
            last.append(each)
        else:
            groups.append([each])
    return groups


def _copy(data: memoryview, place: Place, target: Tensor, origin: Sequence[int], common: Box, cell: Box) -> None:
    """Copy rows that were read to where they belong, without what stands beside them."""
    rows = (common[1][0], *place.shape[1:]) if place.shape else ()
    value = torch.frombuffer(data, dtype=place.dtype).reshape(rows)
    for dim in range(len(common[0])):
        start, size = common[0][dim], common[1][dim]
        if dim:
            value = value.narrow(dim, start - cell[0][dim], size)
        target = target.narrow(dim, start - origin[dim], size)
    target.copy_(value)
