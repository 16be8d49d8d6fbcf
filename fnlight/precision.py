"""What numbers a step computes in: combinators that run a loss in another precision."""

from typing import Any

import torch

from fnlight.errors import ConfigError
from fnlight.pipe import Combinator

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def autocast(dtype: torch.dtype = torch.bfloat16) -> Combinator:
    """Run a `LossFn` (or an `EvalFn`) in mixed precision; weights and gradients stay as they are.

    Weights are cast once a pass (the autocast cache is on), and afresh in the next one.

    Args:
        dtype: What matrix products are computed in: ``torch.bfloat16``, or ``torch.float16``, which trains with `fnlight.scale.loss_scale`.

    Returns:
        A combinator from `LossFn` to `LossFn`.

    Raises:
        ConfigError: If the dtype is not supported.
        SeamError: By `pipe`, if a step computes in fp16 without a loss scale.

    Example:
        >>> double = autocast(torch.bfloat16)(lambda model, batch: model(batch))
        >>> double(torch.nn.Linear(2, 1), torch.ones(1, 2)).dtype
        torch.bfloat16
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"autocast takes torch.bfloat16 or torch.float16, but got {dtype}")

    def wrap(loss_fn: Any) -> Any:
        def cast(model: Any, batch: Any) -> Any:
            first = next(model.parameters(), None)
            with torch.autocast("cpu" if first is None else first.device.type, dtype):
                return loss_fn(model, batch)

        return cast

    return Combinator("autocast", wrap, "loss", "loss", args=_DTYPES[dtype], fits=_scaled if dtype == torch.float16 else None)


def _scaled(combinators: tuple[Combinator, ...]) -> str | None:
    if any(c.name == "loss_scale" for c in combinators):
        return None
    return (
        "autocast(fp16) trains only with a loss scale, for gradients below 6e-8 vanish in fp16; put loss_scale() behind grad() "
        "(and behind accumulate), or use autocast(torch.bfloat16)"
    )
