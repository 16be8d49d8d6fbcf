"""A copy of a module that torch has sharded. Torch cannot copy such a module, so what ``fully_shard`` has added is left out of the copy."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

_KEYS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params", "_distribute_module_applied")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class _Gone:
    """Replaces, in a copy, the state that torch keeps of a sharded module."""


def stripped_copy(
    module: nn.Module,
    memo: dict[int, Any],
    make: Callable[[nn.Parameter], nn.Parameter],
    methods: Iterable[str] = (),
    all_hooks: bool = False,
) -> nn.Module:
    """Copy a module as it was before ``fully_shard``, with other parameters.

    Args:
        module: The module, with no gathered parameters; it is not changed.
        memo: The memo of ``copy.deepcopy``; the copies are added to it.
        make: Makes the parameter of the copy from that of the module.
        methods: Methods that were registered to gather parameters.
        all_hooks: Whether hooks of tensor parallel are left out as well.

    Returns:
        The copy.

    Example:
        >>> stripped_copy(nn.Linear(1, 1), {}, lambda p: p)
        Linear(in_features=1, out_features=1, bias=True)
    """
    from torch.distributed.fsdp import FSDPModule

    gone, cut = _Gone(), [(inner, type(inner)) for inner in module.modules() if isinstance(inner, FSDPModule)]
    for inner, _ in cut:
        memo[id(inner._get_fsdp_state())] = gone
    for p in module.parameters():
        memo[id(p)] = make(p)
    for inner, kind in cut:
        inner.__class__ = kind.__bases__[1]  # a class of its own refuses to be copied
    try:
        twin = copy.deepcopy(module, memo)
    finally:
        for inner, kind in cut:
            inner.__class__ = kind
    for inner in twin.modules():
        _strip(inner, gone, all_hooks)
    for name in methods:
        vars(twin).pop(name, None)
    return twin


def _strip(module: nn.Module, gone: _Gone, all_hooks: bool) -> None:
    held = vars(module)
    for key in [key for key in held if key.startswith("__composable_api") or (key in _KEYS and (all_hooks or "fsdp" in key))]:
        del held[key]
    for hooks in _HOOKS:
        for key, hook in list(held[hooks].items()):
            of_torch = all_hooks and str(getattr(hook, "__module__", "")).startswith("torch.distributed.tensor")
            if getattr(hook, "__self__", None) is gone or of_torch:
                del held[hooks][key]
                held[f"{hooks}_with_kwargs"].pop(key, None)
