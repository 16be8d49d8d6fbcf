"""Every private name of torch that fnlight uses, but for those of its compiler, which are in ``fnlight/compile/_private_torch.py``.

A private name may change with any release of torch, so all are in one file: it is the file to check when a release comes. Tests compare each
name with torch (tests/tensors/test_private_torch.py); torch 2.9.0 and 2.13.0 have all of them. Where torch has a public way to
the same values, that way is the body of the function below, and it is used if the private name is missing; it is slower.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from importlib import import_module
from itertools import repeat
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.utils.data import DataLoader

_Fn = TypeVar("_Fn", bound=Callable[..., Any])
_Number = float | Tensor


def _private(owner: Any, name: str) -> Callable[[_Fn], _Fn]:
    """Take a private function of torch instead of the public way that is written below, if torch has it: chosen once, at import."""
    return lambda public: getattr(owner, name, public)


# Operations on lists of tensors: one call for all of them


def _pairs(tensors: Sequence[Tensor], others: Any) -> Iterator[tuple[Tensor, Any]]:
    return zip(tensors, others if isinstance(others, list | tuple) else repeat(others), strict=False)


@_private(torch, "_foreach_add_")
def foreach_add_(tensors: Sequence[Tensor], others: Sequence[Tensor] | _Number, *, alpha: float = 1) -> None:
    """Add to each tensor, in place: a number, or the tensor at the same place of the other list, times `alpha`."""
    for tensor, other in _pairs(tensors, others):
        tensor.add_(other, alpha=alpha)


@_private(torch, "_foreach_mul_")
def foreach_mul_(tensors: Sequence[Tensor], factors: Sequence[Tensor] | _Number) -> None:
    """Multiply each tensor, in place."""
    for tensor, factor in _pairs(tensors, factors):
        tensor.mul_(factor)


@_private(torch, "_foreach_div_")
def foreach_div_(tensors: Sequence[Tensor], divisors: Sequence[Tensor] | _Number) -> None:
    """Divide each tensor, in place."""
    for tensor, divisor in _pairs(tensors, divisors):
        tensor.div_(divisor)


@_private(torch, "_foreach_clamp_min_")
def foreach_clamp_min_(tensors: Sequence[Tensor], least: float) -> None:
    """Replace smaller entries by `least`, in place."""
    for tensor in tensors:
        tensor.clamp_(min=least)


@_private(torch, "_foreach_clamp_max_")
def foreach_clamp_max_(tensors: Sequence[Tensor], most: float) -> None:
    """Replace larger entries by `most`, in place."""
    for tensor in tensors:
        tensor.clamp_(max=most)


@_private(torch, "_foreach_lerp_")
def foreach_lerp_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weights: Sequence[Tensor] | float) -> None:
    """Move each tensor a fraction of the way to another one, in place."""
    for (tensor, end), weight in _pairs(list(zip(tensors, ends, strict=True)), weights):  # pyright: ignore[reportArgumentType]
        tensor.lerp_(end, weight)


@_private(torch, "_foreach_copy_")
def foreach_copy_(tensors: Sequence[Tensor], sources: Sequence[Tensor], non_blocking: bool = False) -> None:
    """Copy values into each tensor."""
    for tensor, source in zip(tensors, sources, strict=True):
        tensor.copy_(source, non_blocking=non_blocking)


@_private(torch, "_foreach_norm")
def foreach_norm(tensors: Sequence[Tensor], ord: float = 2) -> Sequence[Tensor]:
    """The norm of each tensor, shape []; ``math.inf`` gives the largest absolute value."""
    return [torch.linalg.vector_norm(tensor, ord) for tensor in tensors]


# Loss scaling


@_private(torch, "_amp_foreach_non_finite_check_and_unscale_")
def unscale_(tensors: Sequence[Tensor], bad: Tensor, inverse: Tensor) -> None:
    """Multiply each tensor in place, and set `bad`, shape [1] or [], to 1 if an entry is NaN or infinite."""
    for tensor in tensors:
        bad.copy_(torch.maximum(bad, (~torch.isfinite(tensor)).any().to(bad.dtype)))
        tensor.mul_(inverse)


@_private(torch, "_amp_update_scale_")
def update_scale_(
    scale: Tensor, good: Tensor, bad: Tensor, scale_growth_factor: float, scale_backoff_factor: float, growth_interval: int
) -> None:
    """Lower a loss scale after a bad step, and raise it after so many good ones; `good` counts them."""
    count, grown = torch.where(bad > 0, 0, good + 1), scale * scale_growth_factor
    due = count == growth_interval
    scale.copy_(torch.where(bad > 0, scale * scale_backoff_factor, torch.where(due & torch.isfinite(grown), grown, scale)))
    good.copy_(torch.where(due, 0, count))


# Gradients, and what tensors know of themselves


@_private(getattr(torch, "_C", None), "_set_grad_enabled")
def set_grad_enabled(mode: bool) -> None:
    """Switch autograd on or off, as `torch.set_grad_enabled` does; that makes an object each time, which takes five times as long."""
    torch.set_grad_enabled(mode)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to in place; torch has no public way to ask."""
    return tensor._version


def gradient_hooks(tensor: Tensor) -> tuple[Collection[Any], Collection[Any]]:
    """The functions of ``register_hook`` and of ``register_post_accumulate_grad_hook``; torch has no public way to ask."""
    given: Any = tensor
    return (given._backward_hooks or {}).values(), (given._post_accumulate_grad_hooks or {}).values()


def stored_values(tensor: Tensor) -> Tensor:
    """The entries that a sparse tensor holds, of whatever order and number; the public ``coalesce().values()`` copies, so it cannot change them."""
    return tensor._values()


LOCAL = "_local_tensor"
"""The attribute of a ``DTensor`` that is the part of this process: `to_local` is public, but takes part in autograd, and gives no way to replace it."""


# Optimizers


def fused_kernel(name: str) -> Any:
    """The kernel of a fused optimizer, such as ``"adamw"``; None if torch has none: then ``optimizer.step()`` is called."""
    return getattr(torch, f"_fused_{name}_", None)


_OPTIMIZER = import_module("torch.optim.optimizer")
_GLOBAL_HOOKS = tuple(getattr(_OPTIMIZER, f"_global_optimizer_{when}_hooks", (None,)) for when in ("pre", "post"))


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether functions of the user are called around a step; True if torch does not say: then ``optimizer.step()`` is called."""
    given: Any = optimizer
    try:
        return bool(given._optimizer_step_pre_hooks or given._optimizer_step_post_hooks or _GLOBAL_HOOKS[0] or _GLOBAL_HOOKS[1])
    except AttributeError:
        return True


def is_profiling() -> bool:
    """Whether a profiler of torch records; torch has no public way to ask."""
    return profiler._is_profiler_enabled


def say_fused(optimizer: Optimizer, fused: bool) -> None:
    """Let an optimizer say that its kernels unscale gradients, as its constructor does for ``fused=True``; `GradScaler` asks."""
    given: Any = optimizer
    given._step_supports_amp_scaling = fused


def has_scheduler(optimizer: Optimizer) -> bool:
    """Whether a scheduler of torch was made for an optimizer: it replaces the step; torch has no public way to ask."""
    return getattr(optimizer.step, "_wrapped_by_lr_sched", False)


# Modules

_BATCH_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d,
)  # fmt: skip
_OTHER_NORMS = (
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LazyInstanceNorm1d, nn.LazyInstanceNorm2d, nn.LazyInstanceNorm3d,
)  # fmt: skip

BatchNorm: Any = getattr(nn.modules.batchnorm, "_BatchNorm", nn.BatchNorm1d)
"""The base of torch's BatchNorm classes, from which one for any number of dimensions can be derived."""

BATCH_NORMS: tuple[type[nn.Module], ...] = _BATCH_NORMS if BatchNorm is nn.BatchNorm1d else (BatchNorm,)
"""BatchNorm of any number of dimensions, for ``isinstance``; the base includes classes that other libraries derive from it."""

NORMS: tuple[type[nn.Module], ...] = tuple(
    [getattr(nn.modules.batchnorm, name) for name in ("_NormBase",) if name in vars(nn.modules.batchnorm)] or (*BATCH_NORMS, *_OTHER_NORMS)
)
"""Modules that may keep running statistics, for ``isinstance``."""


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """The table of a module's own parameters. Assigning to the module is public, but refuses tensors that only stand in for a parameter."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """The table of a module's own buffers. ``named_buffers`` is public, but leaves out those that are None, and is slower."""
    return module._buffers


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """What ``vars`` gives of a module without its tables of parameters, buffers and modules; torch has no public way to tell these apart."""
    return {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")}


def derived_buffers(module: nn.Module) -> Collection[str]:
    """The names of a module's own buffers that are not saved (``persistent=False``)."""
    found = getattr(module, "_non_persistent_buffers_set", None)
    return found if found is not None else {name for name, _ in module.named_buffers(recurse=False)} - module.state_dict().keys()


def replace_tensors(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter and buffer by what a function makes of it; ``module.to`` is the public way to do so for dtypes and devices."""
    module._apply(fn)


# Data, processes and devices


def has_own_iterator(loader: DataLoader[Any], also: tuple[str, ...] = ()) -> bool:
    """Whether the class of a loader makes its iterator in another way than torch's `DataLoader`, or than that of one of the modules `also`."""
    kind: Any = type(loader)
    makes = kind.__iter__, getattr(kind, "_get_iterator", None)
    return not all(fn is None or fn.__module__.startswith(("torch.utils.data.", *also)) for fn in makes)


def broadcast_each(tensors: Iterable[Tensor], group: Any) -> None:
    """Copy tensors from the first rank of a group to all others; in few messages, or else with one message for each."""
    together = getattr(distributed, "_broadcast_coalesced", None)
    if together is not None:
        together(group, list(tensors), 1 << 28, 0)
        return
    for tensor in tensors:
        distributed.broadcast(tensor, group=group, group_src=0)


def flattened_mesh(mesh: Any) -> Any:
    """A mesh of several dimensions as one of a single dimension; torch has no public way."""
    return mesh._flatten()


def remove_reducer_hooks(ddp: Any) -> None:
    """Let a `DistributedDataParallel` that is replaced no longer act on gradients; torch has no public way."""
    ddp.reducer._remove_autograd_hooks()


def fsdp_state(module: Any) -> Any:
    """What ``fully_shard`` keeps of a module; torch has no public way to copy a module without it."""
    return module._get_fsdp_state()


def strip_sharding(module: nn.Module, state: Any, all_hooks: bool) -> None:
    """Remove from a copied module what ``fully_shard`` has added, and with `all_hooks` what ``parallelize_module`` has; torch has no public way."""
    held = vars(module)
    for key in [key for key in held if key.startswith("__composable_api") or key in _OF_FSDP or (all_hooks and key == _OF_TENSOR_PARALLEL)]:
        del held[key]
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        for key, hook in list(held[kind].items()):
            of_torch = all_hooks and str(getattr(hook, "__module__", "")).startswith("torch.distributed.tensor")
            if getattr(hook, "__self__", None) is state or of_torch:
                del held[kind][key]
                held[f"{kind}_with_kwargs"].pop(key, None)


_OF_FSDP = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
_OF_TENSOR_PARALLEL = "_distribute_module_applied"


def register_device(name: str, module: Any) -> None:
    """Let ``torch.get_device_module`` know a device that another package brings, as the makers of devices do it; torch has no public way."""
    torch._register_device_module(name, module)
