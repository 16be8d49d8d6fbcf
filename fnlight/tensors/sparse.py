"""The entries of sparse gradients, for stages that work on numbers, wherever these are; no other tensors are sparse here."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fnlight.tensors._private_torch import stored_values


def entries(values: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor]]:
    """Gradients whose entries may be changed in place, and those entries.

    A sparse gradient may hold several entries for one place, which count as their sum; they are added up first.

    Args:
        values: Gradients; None where there is none.

    Returns:
        The gradients, sparse ones without repeated places; and of each that is there a dense tensor that shares its memory.

    Example:
        >>> twice = torch.sparse_coo_tensor([[1, 1]], torch.tensor([3.0, 4.0]), (3,), check_invariants=False)
        >>> values, held = entries([torch.ones(2), None, twice])
        >>> held[1].tolist(), values[2].to_dense().tolist()
        ([7.0], [0.0, 7.0, 0.0])
    """
    found = [v if v is None or v.layout == torch.strided else _once(v) for v in values]
    return found, [v if v.layout == torch.strided else _entries(v) for v in found if v is not None]


def sparse_names(names: Sequence[str], values: Sequence[Tensor | None]) -> list[str]:
    """The names of those whose gradients are sparse.

    Args:
        names: Of the parameters, in the order of the gradients.
        values: Gradients.

    Returns:
        Names.

    Example:
        >>> sparse_names(["a", "b"], [torch.ones(2), torch.ones(2).to_sparse()])
        ['b']
    """
    return [name for name, v in zip(names, values, strict=True) if v is not None and v.layout != torch.strided]


def _once(value: Tensor) -> Tensor:
    return value.coalesce() if value.layout == torch.sparse_coo else value


def _entries(value: Tensor) -> Tensor:
    return stored_values(value) if value.layout == torch.sparse_coo else value.values()
