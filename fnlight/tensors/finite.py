"""Which tensors hold NaN or infinity, with one wait for the device; not in `tree`, which never looks at values."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fnlight.tensors._private_torch import foreach_norm, stored_values
from fnlight.tensors.shards import local


def not_finite(named: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity; of a tensor that lies on several ranks, this rank's part is looked at.

    Args:
        named: Names to tensors of any shapes, dtypes and devices; integers are always finite.

    Returns:
        The names; here the host waits for the device, once for each device.

    Example:
        >>> not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])})
        ['b']
    """
    held = {name: found for name, t in named.items() if (found := _numbers(local(t.detach()))) is not None}
    if not held:
        return []
    home = next(iter(held.values())).device
    largest = foreach_norm(list(held.values()), math.inf)  # of a norm of squares the sum may be infinite where no entry is
    fine = torch.isfinite(torch.stack([each.to(home, torch.float64 if each.dtype == torch.float64 else torch.float32) for each in largest]))
    return [] if bool(fine.all()) else [name for name, good in zip(held, fine.tolist(), strict=True) if not good]


def listed(names: list[str], most: int = 8) -> str:
    """Names for a message, the first ones of many.

    Args:
        names: The names.
        most: How many are listed.

    Returns:
        Text.

    Example:
        >>> listed(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _numbers(tensor: Tensor) -> Tensor | None:
    """The real numbers of a tensor; None where nothing in it can be NaN."""
    if tensor.layout != torch.strided:
        tensor = stored_values(tensor) if tensor.layout == torch.sparse_coo else tensor.values()
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.float() if tensor.itemsize == 1 else tensor
