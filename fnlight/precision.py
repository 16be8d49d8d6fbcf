"""What numbers a step computes in: combinators that run a loss in another precision."""

from typing import Any

import torch

from fnlight.errors import ConfigError
from fnlight.pipe import Combinator

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def autocast(dtype: torch.dtype = torch.bfloat16) -> Combinator:
    """Run a `LossFn` (or an `EvalFn`) in mixed precision; weights and gradients stay as they are.

    Args:
        dtype: What matrix products are computed in: ``torch.bfloat16``.

    Returns:
        A combinator from `LossFn` to `LossFn`.

    Raises:
        ConfigError: If the dtype is not supported.

    Example:
        >>> double = autocast(torch.bfloat16)(lambda model, batch: model(batch))
        >>> double(torch.nn.Linear(2, 1), torch.ones(1, 2)).dtype
        torch.bfloat16
    """
    if dtype == torch.float16:
        raise ConfigError("autocast(torch.float16) needs loss scaling, which fnlight does not have yet; use torch.bfloat16")
    if dtype not in _DTYPES:
        raise ConfigError(f"autocast takes torch.bfloat16, but got {dtype}")

    def wrap(loss_fn: Any) -> Any:
        def cast(model: Any, batch: Any) -> Any:
            first = next(model.parameters(), None)
            with torch.autocast("cpu" if first is None else first.device.type, dtype):
                return loss_fn(model, batch)

        return cast

    return Combinator("autocast", wrap, "loss", "loss", args=_DTYPES[dtype])
