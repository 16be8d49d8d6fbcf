"""A task: a model with the pure functions that train it, evaluate it and predict with it."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fnlight.tensors import buffers_of, gradient_hooks, parameters_of


@attrs.frozen(eq=False)
class Task:
    """A model with the pure functions that train it, evaluate it and predict with it; never saved.

    Args:
        model: The module; it is copied, never changed.
        train_step: ``(model, batch) -> loss`` or ``(loss, metrics)``; see `fnlight.protocols.LossFn`. For several optimizers,
            a mapping of names to such functions or to `Phase`s. Or a whole `Step` that is a pipe, such as one that `manual` gives.
        eval_step: ``(model, batch) -> metrics``; needed for `evaluate` only.
        predict_step: ``(model, batch) -> output``; needed for `predict` only.
        configure_optimizers: ``(model) -> optimizer`` or `Optim`, or a mapping of the names in `train_step` to them; needed unless
            nothing is trainable.

    Raises:
        TypeError: If the model is not an ``nn.Module``, or a function is not callable.

    Example:
        >>> import torch
        >>> task = Task(nn.Linear(2, 1), lambda model, batch: model(batch).sum(),
        ...             configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        >>> task.train_step(task.model, torch.ones(1, 2)).shape
        torch.Size([])
    """

    model: nn.Module
    train_step: Any
    eval_step: Callable[[Any, Any], Any] | None = None
    predict_step: Callable[[Any, Any], Any] | None = None
    configure_optimizers: Callable[[Any], Any] | None = None

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"Task(model=...) must be an nn.Module, but got {type(self.model).__name__}; pass an instance of a module")
        for name in ("train_step", "eval_step", "predict_step", "configure_optimizers"):
            given = getattr(self, name)
            if given is None and name != "train_step":
                continue
            if name == "train_step" and isinstance(given, Mapping):
                _check_phases(given)
            elif not callable(given):
                raise TypeError(f"Task({name}=...) must be a function, but got {type(given).__name__}")


def _check_phases(given: Mapping[Any, Any]) -> None:
    if not given:
        raise TypeError("Task(train_step={}) has no phases; give a function, or a dict of names to functions")
    for name, fn in given.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise TypeError(f"Task(train_step=...) must name its phases with strings without a slash, but got the name {name!r}")
        if not callable(fn):
            raise TypeError(f"Task(train_step={{{name!r}: ...}}) must be a function or a Phase, but got {type(fn).__name__}")


def hooked(model: nn.Module) -> list[str]:
    """The names of the parameters that have hooks on their gradients.

    Args:
        model: Any module.

    Returns:
        Qualified names.

    Example:
        >>> hooked(nn.Linear(1, 1))
        []
    """
    return [name for name, p in model.named_parameters() if any(gradient_hooks(p))]


def empty(model: nn.Module) -> None:
    """Replace the tensors of a module, which now belong to a state, by uninitialised ones.

    Args:
        model: Any module; changed in place.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> empty(model); model.weight
        <UninitializedParameter>
    """
    lazy: Any = UninitializedParameter  # its stub lacks the arguments
    for module in model.modules():
        params, buffers = parameters_of(module), buffers_of(module)
        for name, p in params.items():
            params[name] = None if p is None else lazy(requires_grad=p.requires_grad)
        for name, b in buffers.items():
            buffers[name] = None if b is None else UninitializedBuffer()
