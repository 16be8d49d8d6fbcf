"""Updates that are left out: an optimizer that steps only where the device says so, and metrics of a step that do not count."""

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fnlight.optim.kernels import take_step
from fnlight.tensors import NORMS, leaves


def step_where(optimizer: Any, finite: Tensor | bool, memo: dict[str, Any] | None = None, *, blind: bool = False) -> None:
    """Let an optimizer step if `finite` is True, and else leave parameters and memory as they are.

    A fused optimizer of torch decides on the device, in its kernel, as it does for ``torch.amp.GradScaler``; so does no other, and
    SGD with momentum starts wrongly there if its first step is left out: for these the host waits for the answer.

    Args:
        optimizer: Any ``torch.optim.Optimizer``; its parameters have their gradients.
        finite: A bool tensor, shape [], or a bool.
        memo: Passed on to `fnlight.optim.take_step`.
        blind: True never asks the host, as in a graph: an optimizer that cannot decide in its kernel steps, and its step is taken back.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> weight.grad = torch.ones(1)
        >>> step_where(torch.optim.SGD([weight], lr=0.5, fused=True), torch.tensor(False)); weight.tolist()
        [1.0]
    """
    if blind and not (masks(optimizer) and all(group.get("fused") for group in optimizer.param_groups)):
        _step_and_take_back(optimizer, torch.as_tensor(finite))
        return
    if not masks(optimizer):
        if finite:
            take_step(optimizer, memo)
        return
    held = vars(optimizer)
    held["grad_scale"], held["found_inf"] = None, torch.as_tensor(finite).logical_not().float()
    try:
        take_step(optimizer, memo)
    finally:
        del held["grad_scale"], held["found_inf"]


@torch.no_grad()
def _step_and_take_back(optimizer: Any, finite: Tensor) -> None:
    """A step whose results are put aside, on the device, where they do not count."""

    def held() -> dict[str, Tensor]:
        params = {f"{i}/{j}": p for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"])}
        slots = {f"{i}/{path}": t for i, slots in enumerate(optimizer.state.values()) for path, t in leaves(slots, "slot")}
        return params | {path: t for path, t in slots.items() if isinstance(t, Tensor)}

    before = {path: t.clone() for path, t in held().items()}
    take_step(optimizer)
    for path, now in held().items():
        now.copy_(torch.where(finite, now, before[path]))


def masks(optimizer: Any) -> bool:
    """Say whether an optimizer can leave out a step without the host knowing.

    Args:
        optimizer: Any ``torch.optim.Optimizer``.

    Returns:
        True for the fused forms of torch's Adam, AdamW, Adagrad, and SGD without momentum.

    Example:
        >>> masks(torch.optim.Adam([torch.zeros(1)])), masks(torch.optim.Adam([torch.zeros(1)], fused=True))
        (False, True)
    """
    known = isinstance(optimizer, torch.optim.Adam | torch.optim.Adagrad) or type(optimizer) is torch.optim.SGD
    return known and all(group.get("fused") and not group.get("momentum") for group in optimizer.param_groups)


@attrs.frozen(eq=False, repr=False)
class Buffers:
    """Buffers as they stood before a step that may be left out; made by `buffers_before`.

    Args:
        module: Whose buffers they are.
        held: Names to the buffer and a copy of it.

    Example:
        >>> buffers_before(nn.BatchNorm1d(1), ["running_mean"]).changing()
        ['running_mean']
    """

    module: nn.Module
    held: Mapping[str, tuple[Tensor, Tensor]]

    def changing(self) -> list[str]:
        """The names of those that were written to since, and of those that norms write to in train mode."""
        norms = {
            f"{name}.{leaf}".removeprefix(".")
            for name, m in self.module.named_modules()
            if isinstance(m, NORMS)
            for leaf, _ in m.named_buffers(recurse=False, remove_duplicate=False)
        }
        return [name for name, (buffer, copy) in self.held.items() if name in norms or not torch.equal(buffer, copy)]

    def put_back(self, finite: Tensor | bool = False) -> None:
        """Write the copies back, unless `finite`: a bool tensor, shape [], or a bool."""
        for buffer, copy in self.held.values():
            if finite is not True:
                buffer.copy_(torch.where(finite, buffer, copy) if isinstance(finite, Tensor) else copy)


def buffers_before(module: nn.Module, names: Iterable[str] | None) -> Buffers:
    """Copy the buffers that a forward pass may change.

    Args:
        module: The module.
        names: Those that change, as `Buffers.changing` found them; None copies them all.

    Returns:
        The copies, with where they belong.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> before = buffers_before(norm, None)
        >>> _ = norm(torch.ones(2, 1))
        >>> before.changing(), before.put_back(), norm.running_mean.tolist()
        (['running_mean', 'running_var', 'num_batches_tracked'], None, [0.0])
    """
    found = dict(module.named_buffers()) if names is None else {name: module.get_buffer(name) for name in names}
    return Buffers(module, {name: (buffer, buffer.clone()) for name, buffer in found.items()})
