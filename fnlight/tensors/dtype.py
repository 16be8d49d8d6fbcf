"""Cast a model and its optimizer state to another dtype, in place."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fnlight.tensors._private_torch import buffers_of, replace_tensors
from fnlight.tensors.shards import is_sharded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
"""The dtypes to which a state may be cast, by the name that ``state.memory["cast"]`` holds."""


def convert(module: nn.Module, optimizers: Iterable[Any], dtype: torch.dtype) -> None:
    """Cast the floating-point parameters, buffers and optimizer state, in place; step counts stay exact.

    Args:
        module: The module to cast; its parameters remain the same objects, so that optimizers keep them.
        optimizers: The optimizers of the module; None among them is ignored.
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
