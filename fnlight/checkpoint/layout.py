"""How a tensor is split into files: a rule of a few numbers, for any number of ranks, gives the offset of every part."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from fnlight.tensors import Box, box_of, cuts

Cell = tuple[int, tuple[int, ...], tuple[int, ...]]
"""The number of a file, the offset of a part in the whole, and its shape."""

_CUTS = 16  # dimensions of a mesh
_MOST = 1 << 31  # parts, and dimensions


@attrs.frozen
class Layout:
    """The parts of a tensor, and which file holds each.

    Args:
        cuts: Pairs of dimension and number of parts, one cut after the other, each as ``torch.chunk`` makes it.
        files: The file of each part, from 0 on; the last cut runs fastest.

    Example:
        >>> list(Layout(((0, 2),), (0, 1)).cells((3, 2)))
        [(0, (0, 0), (2, 2)), (1, (2, 0), (1, 2))]
    """

    cuts: tuple[tuple[int, int], ...] = ()
    files: tuple[int, ...] = (0,)
    _held: dict[int, list[int]] = attrs.field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        held: dict[int, list[int]] = {}
        for number, file in enumerate(self.files):
            held.setdefault(file, []).append(number)
        object.__setattr__(self, "_held", held)

    def cells(self, shape: Sequence[int], within: Box | None = None) -> Iterator[Cell]:
        """The parts of a tensor of this shape that are not empty; those that a box may have something in common with."""
        numbers = range(len(self.files))
        if within is not None and len(self.cuts) == 1 and 0 not in shape:
            dim, parts = self.cuts[0]
            rows = -(-shape[dim] // parts)
            start, count = within[0][dim], within[1][dim]
            numbers = range(start // rows, min(parts, -(-(start + count) // rows)))
        return self._boxes(numbers, shape)

    def part(self, file: int, shape: Sequence[int]) -> Iterator[Cell]:
        """Those that a file holds."""
        return self._boxes(self._held.get(file, ()), shape)

    def _boxes(self, numbers: Iterable[int], shape: Sequence[int]) -> Iterator[Cell]:
        for number in numbers:
            steps, rest = list[tuple[int, int, int]](), number
            for dim, parts in reversed(self.cuts):
                steps.append((dim, parts, rest % parts))
                rest //= parts
            offset, size = box_of(shape, reversed(steps))
            if 0 not in size:
                yield self.files[number], offset, size

    def data(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return {"cuts": [list(cut) for cut in self.cuts], "files": list(self.files)}


WHOLE = Layout()
"""A tensor that is not split: it is in the first file."""


def layout_of(tensor: Any) -> Layout:
    """How a tensor lies on several processes, with ranks in the place of files: of those that hold a part, the first.

    Args:
        tensor: A ``DTensor``.

    Returns:
        Its layout.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> mesh = SimpleNamespace(mesh=torch.arange(4).reshape(2, 2), ndim=2, size=lambda dim: 2)
        >>> layout_of(SimpleNamespace(device_mesh=mesh, placements=[None, SimpleNamespace(dim=0)])).files
        (0, 1)
    """
    mesh, order = tensor.device_mesh, cuts(tensor.placements)
    first = [i for i, _ in order]
    ranks = mesh.mesh.permute(*first, *(i for i in range(mesh.ndim) if i not in first)).reshape(math.prod(map(mesh.size, first)), -1)
    return Layout(tuple((dim, mesh.size(i)) for i, dim in order), tuple(ranks.amin(1).tolist()))


def read_layouts(found: Any, count: int) -> list[Layout]:
    """Layouts from a manifest that may be damaged.

    Args:
        found: What stands there.
        count: How many files there are.

    Returns:
        The layouts.

    Raises:
        ValueError: If they are none.

    Example:
        >>> read_layouts([{"cuts": [[0, 2]], "files": [0, 1]}], 2)
        [Layout(cuts=((0, 2),), files=(0, 1))]
    """
    if not isinstance(found, list):
        raise ValueError(f"layouts must be a list, but is {found!r:.80}")  # noqa: TRY004  # a file is no argument
    layouts: list[Layout] = []
    for each in found:
        if not _is_layout(each, count):
            raise ValueError(f"layouts holds {each!r:.80}, in a checkpoint of {count} parts")
        layouts.append(Layout(tuple((dim, parts) for dim, parts in each["cuts"]), tuple(each["files"])))
    return layouts


def _is_layout(each: Any, count: int) -> bool:
    """Say whether a value is a layout: few cuts, and for each part a file of its own."""
    cuts, files = (each.get("cuts"), each.get("files")) if isinstance(each, dict) else (None, None)
    if not isinstance(cuts, list) or not isinstance(files, list) or len(cuts) > _CUTS:
        return False
    if not all(isinstance(cut, list) and len(cut) == 2 for cut in cuts):
        return False
    known = all(type(n) is int and 0 <= n < _MOST for cut in cuts for n in cut) and all(type(n) is int and 0 <= n < count for n in files)
    return known and math.prod(parts for _, parts in cuts) == len(files) == len(set(files)) > 0


def part_name(file: str, index: int, count: int) -> str:
    """The name of one of the files that a file is cut into, as others number them too.

    Args:
        file: Such as ``model.safetensors``.
        index: From 0 on.
        count: How many there are.

    Returns:
        The name.

    Example:
        >>> part_name("model.safetensors", 0, 4)
        'model-00001-of-00004.safetensors'
    """
    stem, _, end = file.rpartition(".")
    return f"{stem}-{index + 1:05d}-of-{count:05d}.{end}"


def physical(files: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The files that lie there, by name: those of the manifest, each cut one as its parts.

    Args:
        files: The section of the manifest.

    Returns:
        Names to sizes and digests.

    Example:
        >>> list(physical({"model.safetensors": {"parts": [[8, "a"], [8, "b"]]}, "memory.safetensors": {"size": 8, "digest": "c"}}))
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors', 'memory.safetensors']
    """
    found: dict[str, dict[str, Any]] = {}
    for name, entry in files.items():
        parts = entry.get("parts")
        if parts is None:
            found[name] = entry
        else:
            found |= {part_name(name, i, len(parts)): {"size": size, "digest": digest} for i, (size, digest) in enumerate(parts)}
    return found


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes have in common.

    Args:
        a: An offset and a shape.
        b: Likewise.

    Returns:
        Offset and shape; None where they have nothing.

    Example:
        >>> overlap(((0,), (4,)), ((3,), (4,)))
        ((3,), (1,))
    """
    starts = tuple(map(max, a[0], b[0]))
    sizes = tuple(min(o + n, p + m) - s for o, n, p, m, s in zip(a[0], a[1], b[0], b[1], starts, strict=True))
    return None if any(n <= 0 for n in sizes) else (starts, sizes)
