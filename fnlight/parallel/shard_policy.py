"""How a model is sharded: which modules are gathered on their own, in which precision, and which layers are split by tensor parallel."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from fnlight.errors import ConfigError, ParallelError, described
from fnlight.parallel.mesh import TENSOR

Policy = Callable[[str, nn.Module], bool] | tuple[type[nn.Module], ...] | None
"""Which modules gather their parameters on their own."""


def dtype_of(given: Any) -> torch.dtype | None:
    """Return the dtype that a name of a mixed precision means.

    Args:
        given: ``"bf16"``, ``"fp16"``, one of these dtypes, a ``MixedPrecisionPolicy`` of torch, or None.

    Returns:
        The dtype; None if nothing or a ``MixedPrecisionPolicy`` was given.

    Raises:
        ConfigError: If it is something else.

    Example:
        >>> dtype_of("bf16")
        torch.bfloat16
    """
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, torch.bfloat16: torch.bfloat16, torch.float16: torch.float16}
    if given is None or type(given).__name__ == "MixedPrecisionPolicy":
        return None
    if not isinstance(given, str | torch.dtype) or given not in names:
        raise ConfigError(f"fsdp(mixed_precision=...) must be 'bf16', 'fp16' or a MixedPrecisionPolicy of torch, but got {given!r}")
    return names[given]


def precision_policy(given: Any) -> Any:
    """Return torch's policy for a mixed precision: parameters in its dtype, gradients summed in fp32.

    Args:
        given: As for `dtype_of`.

    Returns:
        A ``MixedPrecisionPolicy``.

    Example:
        >>> precision_policy("bf16").reduce_dtype
        torch.float32
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    dtype = dtype_of(given)
    if dtype is not None:
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy() if given is None else given


def offload_policy(given: Any) -> Any:
    """Return torch's policy for shards that are kept on the CPU.

    Args:
        given: True, False, or a policy of torch.

    Returns:
        An ``OffloadPolicy``.

    Example:
        >>> type(offload_policy(False)).__name__
        'OffloadPolicy'
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    if given is True:
        return CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())
    return OffloadPolicy() if given is False else given


def check_offload(given: Any) -> None:
    """Raise if `offload` is neither a bool nor an ``OffloadPolicy``.

    Args:
        given: True, False, or a policy of torch.

    Raises:
        ConfigError: If it is something else.

    Example:
        >>> check_offload(True)
    """
    if not isinstance(given, bool) and not type(given).__name__.endswith("OffloadPolicy"):
        raise ConfigError(f"fsdp(offload=...) must be True, False, or an OffloadPolicy of torch, but got {described(given)}")


def chosen(module: nn.Module, policy: Policy) -> list[nn.Module]:
    """Return the inner modules that are gathered on their own, innermost first.

    Args:
        module: The model.
        policy: Classes; a function of name and module; or None for the blocks in each ``nn.ModuleList``.

    Returns:
        The modules that have parameters; never the model itself.

    Example:
        >>> chosen(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), (nn.Linear, nn.ReLU))
        [Linear(in_features=1, out_features=1, bias=True)]
    """
    if policy is None:
        blocks = {id(block) for inner in module.modules() if isinstance(inner, nn.ModuleList) for block in inner}
        found = [inner for inner in module.modules() if id(inner) in blocks]
    elif isinstance(policy, tuple):
        found = [inner for inner in module.modules() if isinstance(inner, policy)]
    else:
        found = [inner for name, inner in module.named_modules() if policy(name, inner)]
    return [inner for inner in reversed(found) if inner is not module and next(inner.parameters(), None) is not None]


def cut_layers(module: nn.Module, mesh: Any, plan: Mapping[str, Any]) -> None:
    """Split layers for tensor parallel, according to the user's plan.

    Args:
        module: The model, which is changed in place.
        mesh: Its mesh, which has the dimension ``tensor``.
        plan: Names of modules, in which ``*`` matches any part, to styles of torch.

    Raises:
        ParallelError: If the mesh has no such dimension, or the model no such modules.

    Example:
        >>> from types import SimpleNamespace
        >>> cut_layers(nn.Linear(1, 1), SimpleNamespace(mesh_dim_names=("tensor",)), {"up": None})
        Traceback (most recent call last):
        fnlight.errors.ParallelError: tensor_parallel= names ['up'], but the model has no such modules; it has []
    """
    from torch.distributed.tensor.parallel import parallelize_module

    if TENSOR not in (mesh.mesh_dim_names or ()):
        raise ParallelError(
            f"tensor_parallel= needs a mesh with a dimension called {TENSOR!r}, but this mesh has {mesh.mesh_dim_names}; "
            f"give fsdp({{'data': 2, {TENSOR!r}: 2}}, tensor_parallel=...)"
        )
    names = [name.split(".") for name, _ in module.named_modules()]
    unknown = [
        path for path in plan if not any(len(n) == len(path.split(".")) and all(map(fnmatchcase, n, path.split("."))) for n in names)
    ]
    if unknown:
        raise ParallelError(
            f"tensor_parallel= names {unknown[:5]}, but the model has no such modules; it has {['.'.join(n) for n in names[1:9]]}"
        )
    parallelize_module(module, mesh[TENSOR], dict(plan))
