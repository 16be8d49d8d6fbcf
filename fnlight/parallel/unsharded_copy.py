"""A copy of a module that torch has sharded. Torch cannot copy such a module, so what ``fully_shard`` has added is left out of the copy."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fnlight.state import copied
from fnlight.tensors import fsdp_state, strip_sharding


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
        memo[id(fsdp_state(inner))] = gone
    for p in module.parameters():
        memo[id(p)] = make(p)
    for inner, kind in cut:
        inner.__class__ = kind.__bases__[1]  # a class of its own refuses to be copied
    try:
        twin = copied(module, memo)
    finally:
        for inner, kind in cut:
            inner.__class__ = kind
    for inner in twin.modules():
        strip_sharding(inner, gone, all_hooks)
    for name in methods:
        vars(twin).pop(name, None)
    return twin
