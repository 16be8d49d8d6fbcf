"""Precision of a step: combinators that run a loss in another dtype."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fnlight.errors import ConfigError, StepError, check_type
from fnlight.pipe import Combinator
from fnlight.state import A_STATE, Store, TrainState
from fnlight.tensors import DTYPES, convert, map_nodes

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_TRUE = {dtype: name for name, dtype in DTYPES.items()}


def autocast(dtype: torch.dtype = torch.bfloat16) -> Combinator:
    """Run a `LossFn` (or an `EvalFn`) in mixed precision; weights and gradients keep their dtype.

    Each weight is cast once per forward pass (the autocast cache is on).

    Args:
        dtype: The dtype of matrix products: ``torch.bfloat16``, or ``torch.float16``, which needs `fnlight.precision.loss_scale`.

    Returns:
        A combinator from `LossFn` to `LossFn`.

    Raises:
        ConfigError: If the dtype is not supported.
        SeamError: From `pipe`, if a step computes in fp16 without a loss scale.

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

    return Combinator(
        "autocast", wrap, "loss", "loss", args=_DTYPES[dtype], facts={"dtype": dtype}, validate=_scaled if dtype == torch.float16 else None
    )  # fmt: skip


def _scaled(combinators: tuple[Combinator, ...]) -> str | None:
    if any(c.name == "loss_scale" for c in combinators):
        return None
    return (
        "autocast(fp16) needs a loss scale, because gradients below 6e-8 become 0 in fp16; put loss_scale() after grad() "
        "(and after accumulate), or use autocast(torch.bfloat16)"
    )


def cast(dtype: torch.dtype) -> Combinator:
    """Train in one dtype: weights, buffers, optimizer state, and the floating-point tensors of batches and of the step itself.

    The weights of a state are cast before its first step, and keep the dtype when the state is saved and loaded. There is no loss scale,
    so small gradients become 0 in fp16. An `EvalFn` can be wrapped, too: ``cast(torch.bfloat16)(eval_step)``.

    Args:
        dtype: ``torch.bfloat16``, ``torch.float16``, ``torch.float64`` or ``torch.float32``.

    Returns:
        A combinator from `LossFn` to `LossFn`.

    Raises:
        ConfigError: If the dtype is not one of these.
        SeamError: From `pipe`, if there is also an `autocast`.

    Example:
        >>> print(cast(torch.bfloat16))
        cast(bf16)
    """
    if dtype not in _TRUE:
        raise ConfigError(f"cast takes {', '.join(map(str, _TRUE))}, but got {dtype}")

    def wrap(loss_fn: Any) -> Any:
        def casting(model: Any, batch: Any) -> Any:
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)  # tensors that the function creates, such as noise, get the same dtype
            try:
                return loss_fn(model, _cast_batch(batch, dtype))
            finally:
                torch.set_default_dtype(before)

        return casting

    def init(store: Store) -> dict[str, Any]:
        convert(store.module, [optim.optimizer for optim in store.optims.values()], dtype)
        return {"dtype": _TRUE[dtype]}

    def start(state: TrainState) -> TrainState:
        for tree in casts(state.store.memory):
            if tree["dtype"] != _TRUE[dtype]:
                convert(state.store.module, [optim.optimizer for optim in state.store.optims.values()], dtype)
                tree["dtype"] = _TRUE[dtype]
        return state

    return Combinator("cast", wrap, "loss", "loss", args=_TRUE[dtype], init=init, start=start, validate=_alone)


def _cast_batch(batch: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors of a batch in another dtype, those of a packed sequence and of objects with ``apply`` (a TensorDict, a graph) too."""

    def to(node: Any) -> Any:
        if isinstance(node, Tensor):
            return node.to(dtype) if node.is_floating_point() else node
        if isinstance(node, PackedSequence):
            return node.to(dtype) if node.data.is_floating_point() else node
        apply = None if isinstance(node, nn.Module) else getattr(type(node), "apply", None)
        if callable(apply):
            return apply(copy.copy(node), to)
        held = [name for name, value in getattr(node, "__dict__", {}).items() if isinstance(value, Tensor) and value.is_floating_point()]
        if held and not (dataclasses.is_dataclass(node) or attrs.has(type(node))):
            raise StepError(
                f"a batch holds a {type(node).__name__} whose tensors ({', '.join(held[:3])}) cannot be cast to {_TRUE[dtype]}; give it a method apply(fn) "
                "that returns a copy with fn(tensor) for each tensor, or make it a dataclass"
            )
        return NotImplemented

    return map_nodes(to, batch)


def _alone(combinators: tuple[Combinator, ...]) -> str | None:
    both = next((c for c in combinators if c.name == "autocast"), None)
    if both is None:
        return None
    return f"{both} keeps weights in fp32 and cast converts them, so they cannot be combined; leave one of them out"


def casts(memory: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of `cast` in a memory: one, or one for each phase of a task with several optimizers.

    Args:
        memory: ``state.memory``.

    Returns:
        Dicts whose ``dtype`` is a name in `fnlight.tensors.DTYPES`; an empty list if the state was never cast.

    Example:
        >>> casts({"cast": {"dtype": "bf16"}})
        [{'dtype': 'bf16'}]
    """
    return [tree["cast"] for tree in (memory, *memory.get("phases", {}).values()) if "cast" in tree]


def to_dtype(state: TrainState, dtype: torch.dtype) -> TrainState:
    """A copy of a state with weights, buffers and optimizer state in another floating-point dtype.

    Args:
        state: The state; it is not changed.
        dtype: A dtype such as ``torch.float32``, to continue a bf16 run in fp32.

    Returns:
        The copy.

    Example:
        >>> from fnlight.state import Task
        >>> state = TrainState.create(Task(torch.nn.Linear(2, 1), lambda model, batch: model(batch).sum()))
        >>> to_dtype(state, torch.float64).params["bias"].dtype
        torch.float64
    """
    check_type("to_dtype(state, ...)", state, TrainState, A_STATE)
    check_type("to_dtype(state, dtype)", dtype, torch.dtype, "a dtype such as torch.bfloat16")
    found = state.copy()
    convert(found.store.module, [optim.optimizer for optim in found.store.optims.values()], dtype)
    for tree in (found.store.memory, *found.store.memory.get("phases", {}).values()):
        tree.pop("cast", None)
    return found
