"""A copy of a module that torch has cut: torch itself copies none, so what it has added is left out, and may be added again."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fnlight.tensors import fsdp_state, strip_sharding


class _Gone:
    """Stands in a copy for what torch keeps of a module that is cut."""


def stripped_copy(
    module: nn.Module,
    memo: dict[int, Any],
    make: Callable[[nn.Parameter], nn.Parameter],
    methods: Iterable[str] = (),
    all_hooks: bool = False,
) -> nn.Module:
    """A copy of a module as it was before ``fully_shard``, with other parameters.

    Args:
        module: The module, with its parts at rest; it stays as it is.
        memo: What ``copy.deepcopy`` has copied already, by identity; it is added to.
        make: Gives the parameter that stands in the copy for one of the module.
        methods: Methods that were made to bring parameters together.
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
        twin = copy.deepcopy(module, memo)
    finally:
        for inner, kind in cut:
            inner.__class__ = kind
    for inner in twin.modules():
        strip_sharding(inner, gone, all_hooks)
    for name in methods:
        vars(twin).pop(name, None)
    return twin
