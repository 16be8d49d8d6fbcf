"""The step of torch's fused optimizers, without the work that torch repeats in every step.

Before it computes, ``optimizer.step()`` collects the gradients and the state of all parameters and sorts them by device and type, which
takes longer than the update of a small model. Here that is done once and then only checked: the kernels are torch's own, they get the
tensors of ``optimizer.state``, and options are read from the groups in every step. If something does not fit, torch takes the step.

With it, a training step takes 0.85 of the time on an MLP 32-64-10, 0.88 with 100 small tensors, and 0.95 with 1.9 million parameters in 6
tensors (torch 2.13.0, CPU; ``python tests/benchmarks/kept.py fused``). Below a gain of 2 % this module is to be deleted.
"""

from collections.abc import Callable, Mapping
from operator import attrgetter, is_
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fnlight.tensors import foreach_add_, fused_kernel, is_sharded, local, local_parts, set_grad_enabled

_SPARSE = attrgetter("is_sparse")
_DENSE = {Tensor}
_NUMBERS = (float, int)
_Call = Callable[[], None]
_ADAM, _ADAMW, _ADAGRAD, _SGD = map(fused_kernel, ("adam", "adamw", "adagrad", "sgd"))


@attrs.frozen(eq=False, repr=False)
class Group:
    """A parameter group, and the memory of its parameters.

    Args:
        options: The group itself.
        given: Its list of parameters.
        params: What that list held.
        parts: What lies here of each.
        slots: The memory of each; empty where there is none yet.
        device: Where they are.
        one: What is added to step counts on the CPU.

    Example:
        >>> Group({}, [], (), (), (), torch.device("cpu"), torch.ones(())).params
        ()
    """

    options: Mapping[str, Any]
    given: list[Tensor]
    params: tuple[Tensor, ...]
    parts: tuple[Tensor, ...]
    slots: tuple[Mapping[str, Any], ...]
    device: torch.device
    one: Tensor

    @property
    def cut(self) -> bool:
        """Whether other processes hold parts of the parameters."""
        return self.parts[0] is not self.params[0]

    def count(self, steps: list[Tensor], found_inf: Tensor | None) -> None:
        """Add one to the step counts, or nothing where `found_inf` is 1: torch adds one and takes it back."""
        if found_inf is not None:
            foreach_add_(steps, 1 - found_inf, alpha=1.0)  # with alpha it stays on the device
        elif self.device.type == "cpu":
            foreach_add_(steps, self.one, alpha=1.0)
        else:
            foreach_add_(steps, 1)


@attrs.frozen(eq=False, repr=False)
class Bound:
    """An optimizer whose parameters and memory have been looked up; made by `bind`.

    Args:
        optimizer: The optimizer.
        kind: Its class.
        step: The function that its class has as ``step``.
        state: Its memory.
        trees: The memory of each parameter, in the order of `state`.
        groups: Its groups.
        kernel: Prepares the update of a group.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> bind(torch.optim.SGD([weight], lr=0.5, fused=True)).groups[0].params[0] is weight
        True
    """

    optimizer: Any
    kind: Any
    step: Any
    state: Any
    trees: list[Any]
    groups: tuple[Group, ...]
    kernel: Callable[..., _Call | None]

    def holds(self, optimizer: Any) -> bool:
        """Say whether all that was looked up is still so."""
        state, groups = optimizer.state, optimizer.param_groups
        if self.optimizer is not optimizer or self.state is not state:
            return False
        if type(optimizer) is not self.kind or self.kind.step is not self.step:
            return False
        if len(state) != len(self.trees) or len(groups) != len(self.groups) or not all(map(is_, state.values(), self.trees)):
            return False
        for group, options in zip(self.groups, groups, strict=True):
            if group.options is not options or options["params"] is not group.given or len(group.given) != len(group.params):
                return False
            if options["fused"] is not True or options["lr"].__class__ not in _NUMBERS or not all(map(is_, group.given, group.params)):
                return False
        return True

    def calls(self) -> list[_Call] | None:
        """What has to be called for a step, nothing of which has been done yet; None where torch has to do it."""
        optimizer, found = self.optimizer, list[_Call]()
        scale, broken = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if scale is not None:
            return None
        for group in self.groups:
            grads, params, slots = [p.grad for p in group.params], group.parts, group.slots
            if group.cut:
                grads, slots = local_parts(grads), [_local(tree) for tree in slots]
            if set(map(type, grads)) != _DENSE:
                held = [i for i, g in enumerate(grads) if g is not None]
                grads, params, slots = [grads[i] for i in held], [params[i] for i in held], [slots[i] for i in held]
                if not held:
                    continue
                if set(map(type, grads)) != _DENSE:
                    return None
            if any(map(_SPARSE, grads)):
                return None
            found_inf = None if broken is None else broken.to(group.device, non_blocking=True)
            try:
                call = self.kernel(group, params, grads, slots=slots, found_inf=found_inf)
            except KeyError:  # a parameter that gets its first gradient has no memory yet
                call = None
            if call is None:
                return None
            found.append(call)
        return found


def bind(optimizer: Optimizer) -> Bound | None:
    """Look up what a fused optimizer of torch works on.

    Args:
        optimizer: Any optimizer.

    Returns:
        Its parameters and memory; None where it is another optimizer, a class or a step of somebody's own, not fused, or its tensors are of
        several types or on several devices.

    Example:
        >>> bind(torch.optim.Adam([nn.Parameter(torch.ones(1))])) is None
        True
    """
    kernel, step = _KERNELS.get(type(optimizer)), type(optimizer).step
    if kernel is None or optimizer.defaults.get("differentiable") or not _is_torchs(step):
        return None
    groups = list[Group]()
    for options in optimizer.param_groups:
        params = options["params"]
        kinds = {(p.device, p.dtype) for p in params}
        plain = all((type(p) is nn.Parameter or is_sharded(p)) and p.is_floating_point() for p in params)
        if options.get("fused") is not True or options.get("differentiable") or len(kinds) != 1 or not plain:
            return None
        device = params[0].device
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return None
        slots = tuple([optimizer.state.get(p, {}) for p in params])
        groups.append(
            Group(
                options=options,
                given=params,
                params=tuple(params),
                parts=tuple(local_parts(params)),
                slots=slots,
                device=device,
                one=torch.ones((), device="cpu"),
            )
        )
    return Bound(
        optimizer=optimizer,
        kind=type(optimizer),
        step=step,
        state=optimizer.state,
        trees=list(optimizer.state.values()),
        groups=tuple(groups),
        kernel=kernel,
    )


def _local(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    return {slot: local(value) for slot, value in tree.items()}


def _is_torchs(step: Any) -> bool:
    """Say whether a step is torch's own, whatever is wrapped around it."""
    while step is not None:
        if not getattr(step, "__globals__", {}).get("__name__", "").startswith("torch.optim"):
            return False
        step = getattr(step, "__wrapped__", None)
    return True


def fused_step(optimizer: Any, memo: dict[str, Any]) -> bool:
    """Take the step of a fused optimizer of torch, where that can be done without ``optimizer.step()``: bitwise the same.

    Args:
        optimizer: Any ``torch.optim.Optimizer``; its parameters have their gradients.
        memo: Where what was looked up is kept from one step to the next.

    Returns:
        False, and nothing is done, where ``optimizer.step()`` has to be called.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> weight.grad = torch.ones(1)
        >>> fused_step(torch.optim.SGD([weight], lr=0.5, fused=True), {}), weight.tolist()
        (True, [0.5])
    """
    bound: Bound | None = memo.get("bound")
    if bound is None or not bound.holds(optimizer):
        bound = memo["bound"] = bind(optimizer)
        if bound is None or not bound.holds(optimizer):
            return False
    calls = bound.calls()
    if calls is None:
        return False
    before = torch.is_grad_enabled()
    set_grad_enabled(False)  # what torch.no_grad() does, at a fifth of the time
    try:
        for call in calls:
            call()
    finally:
        set_grad_enabled(before)
    return True


def _adam(group: Group, params: Any, grads: list[Any], slots: Any, found_inf: Tensor | None) -> _Call | None:
    options = group.options
    beta1, beta2 = options["betas"]
    if isinstance(beta1, Tensor) or isinstance(beta2, Tensor):
        return None
    steps, firsts, seconds = [s["step"] for s in slots], [s["exp_avg"] for s in slots], [s["exp_avg_sq"] for s in slots]
    largest = [s["max_exp_avg_sq"] for s in slots] if options["amsgrad"] else []
    kernel = _ADAMW if options["decoupled_weight_decay"] else _ADAM

    def call() -> None:
        group.count(steps, found_inf)
        kernel(
            params, grads, firsts, exp_avg_sqs=seconds, max_exp_avg_sqs=largest, state_steps=steps, lr=options["lr"], beta1=beta1, beta2=beta2, eps=options["eps"],
            weight_decay=options["weight_decay"], amsgrad=options["amsgrad"], maximize=options["maximize"], found_inf=found_inf,
        )  # fmt: skip

    return call


def _adagrad(group: Group, params: Any, grads: list[Any], slots: Any, found_inf: Tensor | None) -> _Call:
    options, steps, sums = group.options, [s["step"] for s in slots], [s["sum"] for s in slots]

    def call() -> None:
        group.count(steps, found_inf)
        _ADAGRAD(
            params, grads, sums, steps, lr=options["lr"], lr_decay=options["lr_decay"], weight_decay=options["weight_decay"],
            eps=options["eps"], maximize=options["maximize"], found_inf=found_inf,
        )  # fmt: skip

    return call


def _sgd(group: Group, params: Any, grads: list[Any], slots: Any, found_inf: Tensor | None) -> _Call | None:
    options = group.options
    buffers = [s["momentum_buffer"] for s in slots] if options["momentum"] else []
    if any(buffer is None for buffer in buffers):
        return None

    def call() -> None:
        _SGD(
            params, grads, buffers, weight_decay=options["weight_decay"], momentum=options["momentum"], lr=options["lr"],
            dampening=options["dampening"], nesterov=options["nesterov"], maximize=options["maximize"], is_first_step=False, found_inf=found_inf,
        )  # fmt: skip

    return call


_KERNELS: Mapping[type, Callable[..., _Call | None]] = {
    kind: kernel
    for kind, kernel, needs in [
        (torch.optim.Adam, _adam, (_ADAM, _ADAMW)),
        (torch.optim.AdamW, _adam, (_ADAM, _ADAMW)),
        (torch.optim.SGD, _sgd, (_SGD,)),
        (torch.optim.Adagrad, _adagrad, (_ADAGRAD,)),
    ]
    if None not in needs
}
"""What prepares the update of a group. If torch has no such kernel, its own step is called."""
