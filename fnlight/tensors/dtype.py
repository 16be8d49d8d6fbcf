"""What kind of number a model and its optimizers hold, and how that is changed in place."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fnlight.tensors._private_torch import buffers_of, replace_tensors
from fnlight.tensors.shards import is_sharded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
"""What a state may be cast to, by the name that its memory keeps under ``cast``."""


def convert(module: nn.Module, optimizers: Iterable[Any], dtype: torch.dtype) -> None:
    """Cast the floating-point parameters, buffers and optimizer memory, in place; counts of steps stay exact.

    Args:
        module: What is cast; its parameters stay the objects that they are, so that optimizers keep holding them.
        optimizers: Those of the module; None among them is passed over.
        dtype: A floating-point dtype.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> convert(module, [], torch.bfloat16)
        >>> module.weight.dtype
        torch.bfloat16
    """
    for inner in module.modules():
        table = buffers_of(inner)
        for name, buffer in table.items():
            if buffer is not None and buffer.is_floating_point():
                table[name] = buffer.to(dtype)
    if any(map(is_sharded, module.parameters())):
        # torch keeps the addresses of parts, and looks them up again
        replace_tensors(module, lambda t: t.to(dtype) if t.is_floating_point() else t)
    for parameter in module.parameters():
        if parameter.is_floating_point() and not is_sharded(parameter):
            parameter.data = parameter.data.to(dtype)
    for owner, slots in (pair for optimizer in optimizers if optimizer is not None for pair in optimizer.state.items()):
        for slot, value in slots.items() if isinstance(owner, Tensor) else ():
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
                slots[slot] = value.to(dtype)
