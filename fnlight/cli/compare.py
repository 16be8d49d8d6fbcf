"""The differences between two mappings of tensors."""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

HEAD = ("tensor", "shape", "elements that differ", "largest difference", "relative")
"""The names of the columns of `Gap.cells`."""


@attrs.frozen
class Gap:
    """The difference between two tensors of the same name.

    Args:
        name: The name.
        shape: The shape, or what differs if they cannot be compared.
        count: Elements whose bits differ.
        total: Elements.
        absolute: The largest difference.
        relative: The largest difference in proportion to the larger of both elements.

    Example:
        >>> Gap("w", "[2]", 1, 2, 0.5, 0.25).cells()
        ['w', '[2]', '1 of 2', '0.5', '0.25']
    """

    name: str
    shape: str
    count: int = 0
    total: int = 0
    absolute: float = 0.0
    relative: float = 0.0

    def cells(self) -> list[str]:
        """Its row of a table."""
        if not self.count:
            return [self.name, self.shape, "", "", ""]
        return [self.name, self.shape, f"{self.count:,} of {self.total:,}", f"{self.absolute:.6g}", f"{self.relative:.3g}"]


def gaps(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[Gap]:
    """Compare tensors by name, bit by bit.

    Args:
        a: Names to tensors.
        b: Names to tensors.

    Returns:
        One for each name that differs or is on one side only.

    Example:
        >>> [gap.cells() for gap in gaps({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 2.0]), "b": torch.ones(1)})]
        [['w', '[2]', '1 of 2', '1', '0.5'], ['b', 'only in the second', '', '', '']]
    """
    only = {**{n: "only in the first" for n in a if n not in b}, **{n: "only in the second" for n in b if n not in a}}
    found = [gap for name in a if name in b and (gap := _gap(name, a[name], b[name])) is not None]
    return found + [Gap(name, where) for name, where in only.items()]


def _gap(name: str, a: Tensor, b: Tensor) -> Gap | None:
    if a.dtype != b.dtype or a.shape != b.shape:
        return Gap(name, f"{_say(a)} against {_say(b)}")
    bits = [t.detach().cpu().contiguous().reshape(-1) for t in (a, b)]
    unlike = (bits[0].view(torch.uint8) != bits[1].view(torch.uint8)).view(len(bits[0]), -1).any(1) if len(bits[0]) else torch.zeros(0)
    if not bool(unlike.any()):
        return None
    wide = torch.complex128 if a.is_complex() else torch.float64
    left, right = (t[unlike].to(wide) for t in bits)
    apart = (left - right).abs()
    relative = apart / torch.maximum(left.abs(), right.abs()).clamp(min=torch.finfo(torch.float64).tiny)
    return Gap(
        name=name,
        shape=str(list(a.shape)),
        count=int(unlike.sum()),
        total=a.numel(),
        absolute=float(apart.max()),
        relative=float(relative.max()),
    )


def _say(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
