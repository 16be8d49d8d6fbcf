"""Devices: which device is chosen, how a module is moved to it, and what a lazy device, such as XLA, needs in addition.

A lazy device records operations and runs them when it is told that a step is complete. Its module (``torch.get_device_module``) has
functions that torch's own devices do not have; fnlight calls them if they exist: ``end_step()`` after every step and every
batch of an evaluation, and ``spread(tensor)`` for each tensor of a batch that has been moved to the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fnlight.errors import ConfigError
from fnlight.tensors._private_torch import parameters_of

_PLAIN = ("cpu", "meta")  # torch has no module for these


def default_device() -> torch.device:
    """Return the accelerator of this machine, or the CPU if it has none.

    Returns:
        A device without an index.

    Example:
        >>> default_device().type in ("cpu", "cuda", "mps", "xpu") or "one of another maker"
        True
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu" if accelerator is None else accelerator.type)


def check_context(what: str, device: torch.device, trains: bool = True) -> None:
    """Refuse a call within a context of torch's that would change what it computes, unseen.

    Args:
        what: The call.
        device: Where it computes.
        trains: Whether it needs gradients, and tensors that can have some.

    Raises:
        ConfigError: If it is called within ``inference_mode``, ``no_grad`` or ``autocast``.

    Example:
        >>> with torch.no_grad():
        ...     check_context("fit(...)", torch.device("cpu"))
        Traceback (most recent call last):
        fnlight.errors.ConfigError: fit(...) trains, but is called within torch.no_grad(), where nothing has a gradient; call it outside
    """
    if trains and torch.is_inference_mode_enabled():
        raise ConfigError(f"{what} is called within torch.inference_mode(), whose tensors can never be trained; call it outside")
    if trains and not torch.is_grad_enabled():
        raise ConfigError(f"{what} trains, but is called within torch.no_grad(), where nothing has a gradient; call it outside")
    if any(map(torch.is_autocast_enabled, {"cpu", device.type} - {"meta"})):
        raise ConfigError(
            f"{what} is called within torch.autocast(), which would change its numbers unseen; call it outside, and give the precision to "
            "fl.FitConfig(precision=...), or wrap the function: fl.autocast(torch.bfloat16)(eval_step)"
        )


def home_of(device: torch.device | str | None) -> torch.device | None:
    """Where the tensors of a new state will be, which must be able to have gradients.

    Args:
        device: A device that this machine has, or None for where they are.

    Returns:
        The device.

    Raises:
        ConfigError: If there is no such device, or the state is made within ``inference_mode``.

    Example:
        >>> home_of("cpu"), home_of(None)
        (device(type='cpu'), None)
    """
    if torch.is_inference_mode_enabled():
        raise ConfigError("a state is made within torch.inference_mode(), whose tensors can never be trained; make or load it outside")
    return None if device is None else existing(device)


def module_of(device: torch.device) -> Any:
    """Return torch's module for a device type, such as ``torch.cuda``.

    Args:
        device: Any device.

    Returns:
        The module; None for the CPU and for ``meta``, which have none.

    Raises:
        ConfigError: If no such module is registered with torch.

    Example:
        >>> module_of(torch.device("cpu")) is None
        True
    """
    if device.type in _PLAIN:
        return None
    try:
        return torch.get_device_module(device)
    except RuntimeError as error:
        hint = "; create the state with fl.TrainState.create(task, place=fl.parallel.xla())" if device.type == "xla" else ""
        raise ConfigError(f"torch has no module for the device {str(device)!r}, so its random numbers cannot be seeded{hint}") from error


def is_lazy(device: torch.device) -> bool:
    """Say whether a device records operations and runs them when a step is complete.

    Args:
        device: Any device.

    Returns:
        Whether it does.

    Example:
        >>> is_lazy(torch.device("cpu"))
        False
    """
    return getattr(module_of(device), "end_step", None) is not None


def end_step_on(device: torch.device) -> Callable[[], None]:
    """Return the function that is called after every step.

    Args:
        device: Any device.

    Returns:
        A function; it does nothing on a device that runs operations when they are called.

    Example:
        >>> end_step_on(torch.device("cpu"))()
    """
    return getattr(module_of(device), "end_step", _do_nothing)


def _do_nothing() -> None:
    pass


def spread_on(device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Return the function that shards a tensor of a batch over the devices that an SPMD device represents.

    Args:
        device: Any device.

    Returns:
        A function; None for a device that is only one.

    Example:
        >>> spread_on(torch.device("cpu")) is None
        True
    """
    return getattr(module_of(device), "spread", None)


def existing(device: torch.device | str) -> torch.device:
    """Return the device of a name, after a check that this machine has it.

    Args:
        device: Such as ``"cuda:1"``.

    Returns:
        The device.

    Raises:
        ConfigError: If there is none.

    Example:
        >>> existing("cpu")
        device(type='cpu')
    """
    try:
        found = torch.device(device)
        if found.type != "cpu":
            torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        says = str(error).splitlines()[0].split(". ")[0]
        raise ConfigError(f"there is no device {device!r} here: {says}; give {str(default_device())!r}, or leave it out") from error
    return found


def move(module: nn.Module, device: torch.device) -> dict[int, Any]:
    """Move a module in place; tied parameters stay tied, also on a device that creates new parameters, as XLA does.

    Args:
        module: Changed in place.
        device: Where to.

    Returns:
        By the ``id`` of each parameter that was replaced, the new one; empty on most devices.

    Example:
        >>> move(nn.Linear(1, 1), torch.device("cpu"))
        {}
    """
    before = [(m, key, p) for m in module.modules() for key, p in parameters_of(m).items() if p is not None]
    module.to(device)
    new: dict[int, Any] = {}
    for m, key, p in before:
        table = parameters_of(m)
        if table[key] is not p:
            table[key] = new.setdefault(id(p), table[key])
    return new


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor over the devices of a lazy device in the same way as another tensor of its shape.

    Args:
        value: Any tensor; one on the host is moved to the device.
        like: The other tensor.

    Returns:
        The sharded tensor; `value` itself if the device of `like` is only one.

    Example:
        >>> value = torch.ones(2)
        >>> spread_like(value, torch.zeros(2)) is value
        True
    """
    if spread_on(like.device) is None:
        return value
    return like.detach().to(value.dtype, copy=True).copy_(value.cpu())  # from the device it would bring its own way along
