"""The files of a checkpoint as its manifest lists them: which they are, how large, what is in each, and how tensors are cut.

It is no part of `head`, which checks the other sections and asks this one which tensors there are.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from fnlight.checkpoint.digest import KINDS
from fnlight.checkpoint.header import CODES, MAX_HEADER
from fnlight.checkpoint.layout import Layout, read_layouts

MODEL, OPTIMIZER, MEMORY = FILES = ("model.safetensors", "optimizer.safetensors", "memory.safetensors")

KINDS_OF_NUMBERS = {str(dtype).removeprefix("torch."): dtype for dtype in (*CODES, torch.complex128, torch.complex32)}
"""The dtypes that a manifest may list, by name."""

_DIGEST = re.compile("|".join(f"{kind}:[0-9a-f]{{{digits}}}" for kind, digits in KINDS.items()))
_MOST = 1 << 62  # bytes or elements that torch can count
_FREE_PAIRS = 1 << 18  # pairs of a part and a tensor that are looked at whatever the size of the parts
_BYTES_A_PAIR = 16  # an honest part lists each of its tensors in some sixty bytes


@attrs.frozen
class Listed:
    """What a manifest says of a tensor.

    Args:
        dtype: Its dtype.
        shape: Its shape.

    Example:
        >>> Listed(torch.float32, (2, 3)).nbytes
        24
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def check_files(files: Any, layouts: Any) -> dict[str, dict[str, Listed]]:
    """Check two sections of a manifest: only the files that the format defines are ever opened, and none is larger than what is in it.

    Args:
        files: The section ``files``.
        layouts: The section ``layouts``.

    Returns:
        By file, names to what is listed of each tensor.

    Raises:
        ValueError: If they are none; the field is named.

    Example:
        >>> entry = {"size": 84, "digest": "sha256:" + "0" * 64, "tensors": {"x": ["float32", [1]]}}
        >>> check_files({"model.safetensors": entry}, [])["model.safetensors"]["x"].shape
        (1,)
    """
    if not isinstance(files, dict):
        raise ValueError(f"files must list the files, but is {files!r:.80}")  # noqa: TRY004  # a file is no argument
    if MODEL not in files:
        raise ValueError(f"files does not list {MODEL}")
    counts = {len(entry["parts"]) for entry in files.values() if isinstance(entry, dict) and isinstance(entry.get("parts"), list)}
    found = read_layouts(layouts, max(counts, default=0))
    return {name: _check_file(name, entry, found) for name, entry in files.items()}


def _check_file(name: str, entry: Any, layouts: Sequence[Layout]) -> dict[str, Listed]:
    if name not in FILES:
        raise ValueError(f"files lists {name!r:.80}, which is none of the files of a checkpoint, {list(FILES)}")
    if not isinstance(entry, dict) or not isinstance(entry.get("tensors"), dict):
        raise ValueError(f"files.{name} must list its tensors, but is {entry!r:.80}")  # noqa: TRY004  # as above
    parts = list(_parts(name, entry))
    for size, digest in parts:
        if type(size) is not int or not 0 <= size < _MOST:
            raise ValueError(f"files.{name}: the size is {size!r:.80}")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ValueError(f"files.{name}: the digest is {digest!r:.80}")
    tensors = {key: _listed(f"files.{name}.tensors.{key:.80}", value) for key, value in entry["tensors"].items()}
    inside, outside = sum(tensor.nbytes for tensor in tensors.values()), sum(size for size, _ in parts)
    if not inside <= outside <= inside + len(parts) * (MAX_HEADER + 8):
        raise ValueError(f"files.{name} is said to have {outside} bytes, of which its tensors take {inside}")
    if "parts" in entry:
        _check_cuts(name, entry, tensors, layouts)
    return tensors


def _parts(name: str, entry: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Sizes and digests: of the file, or of the parts that it is cut into."""
    if "parts" not in entry:
        yield entry.get("size"), entry.get("digest")
        return
    if "size" in entry or not isinstance(entry["parts"], list) or not entry["parts"]:
        raise ValueError(f"files.{name}.parts must be a list of sizes and digests, but is {entry['parts']!r:.80}")
    for part in entry["parts"]:
        if not isinstance(part, list) or len(part) != 2:
            raise ValueError(f"files.{name}.parts must be a list of sizes and digests, but holds {part!r:.80}")
        yield part[0], part[1]


def _listed(field: str, value: Any) -> Listed:
    dtype, shape = value if isinstance(value, list) and len(value) == 2 else (None, None)
    kind = KINDS_OF_NUMBERS.get(dtype) if isinstance(dtype, str) else None
    if kind is None or not isinstance(shape, list) or len(shape) > 64 or not all(type(n) is int and 0 <= n < _MOST for n in shape):
        raise ValueError(f"{field} must be a dtype and a shape, but is {value!r:.80}")
    if math.prod(n for n in shape if n) * kind.itemsize >= _MOST:
        raise ValueError(f"{field} has the shape {shape!r:.80}")
    return Listed(kind, tuple(shape))


def _check_cuts(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Listed], layouts: Sequence[Layout]) -> None:
    """Refuse cuts by a layout that there is not, or along what a tensor does not have; and more of them than the parts could hold."""
    cut, parts = entry.get("cut"), entry["parts"]
    if not isinstance(cut, dict):
        raise ValueError(f"files.{name}.cut must say which tensors are cut, but is {cut!r:.80}")  # noqa: TRY004  # as above
    if len(parts) * len(tensors) > _FREE_PAIRS + sum(size for size, _ in parts) // _BYTES_A_PAIR:
        raise ValueError(f"files.{name} lists {len(tensors)} tensors in {len(parts)} parts, whose sizes are too small for that")
    for key, number in cut.items():
        shape = tensors[key].shape if key in tensors else None
        known = type(number) is int and 0 <= number < len(layouts)
        if shape is None or not known or any(dim >= len(shape) for dim, _ in layouts[number].cuts):
            raise ValueError(f"files.{name}.cut lists {key:.80} of shape {shape!r:.80} as cut by {number!r:.80}")
        if any(file >= len(parts) for file in layouts[number].files):
            raise ValueError(f"files.{name}.cut lists {key:.80} as cut by layout {number}, which has more than {len(parts)} files")
