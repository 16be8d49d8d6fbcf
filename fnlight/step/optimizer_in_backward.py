"""The optimizer in the backward pass: each parameter is updated as soon as its gradient is computed, and the gradient is then freed."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from fnlight.errors import ConfigError, OptimizerError, StepError
from fnlight.gradients import weight_of
from fnlight.metrics import Mean
from fnlight.optim import by_itself, take_step, take_step_on_host
from fnlight.pipe import Around, Combinator
from fnlight.protocols import GradFn
from fnlight.state import Store, TrainState
from fnlight.step.update import Update
from fnlight.tensors import fold_in, foreach_div_, foreach_mul_

_WHY = "each parameter is updated as soon as its gradient is computed, so no combinator can use all gradients, or several batches"


def apply_in_backward() -> Combinator:
    """Turn the gradients of a batch into a `Step`, in the place of `apply`: update each parameter during the backward pass and free its gradient.

    The results are bit-identical to those of `apply`. Only a few gradients are in memory at a time, instead of all of them. It does not work
    with combinators that need all gradients before the first update: clipping by the total norm, accumulation, loss scaling, skipped steps.

    Returns:
        A combinator from `GradFn` (of one batch) to `Step`; put it directly after `grad`, `weighted` or `carry`.

    Raises:
        SeamError: By `pipe`, if a combinator before it needs all gradients.
        ConfigError: If the task has several optimizers.
        OptimizerError: In a run, if the optimizer has state that parameters share, or evaluates the loss several times.

    Example:
        >>> from fnlight.pipe.pipe import pipe
        >>> from fnlight.gradients import grad
        >>> print(pipe(lambda model, batch: model(batch).sum(), grad(), apply_in_backward()))
        <lambda> > grad > apply_in_backward

    References:
        Lv et al., "Full parameter fine-tuning for large language models with limited resources" (2023).
    """

    def wrap(grad_fn: GradFn) -> Any:
        if isinstance(grad_fn, Mapping):
            raise ConfigError(f"apply_in_backward steps one optimizer, but the phases {', '.join(grad_fn)} have one each; use apply()")
        return Update(partial(_released, grad_fn))

    def start(state: TrainState) -> TrainState:
        _check(state.store)
        return state

    return Combinator("apply_in_backward", wrap, "grad_sum", "step", phase="update", start=start, why=_WHY)


def _check(store: Store) -> None:
    optim = store.optim
    if store.phases:
        raise ConfigError(f"apply_in_backward steps one optimizer, but this task has one for {', '.join(store.phases)}; use apply()")
    if optim.optimizer is None and store.params:
        raise OptimizerError("apply_in_backward needs an optimizer, but the task has no configure_optimizers; give fl.Task one")
    if optim.optimizer is not None and not by_itself(optim):
        raise OptimizerError(
            f"{type(optim.optimizer).__name__} cannot update one parameter at a time: only the classes of torch.optim except LBFGS are known to "
            "support it; use apply(), or another optimizer"
        )
    if store.place is not None:
        raise ConfigError(
            "apply_in_backward updates parameters before gradients are averaged over the processes, so it works in one process only; use apply()"
        )


def _released(grad_fn: GradFn, store: Store, batches: Any, key: int) -> Mapping[str, Any]:
    if len(batches) > 1:
        raise StepError(f"apply_in_backward takes one batch per step, but got {len(batches)}; {_WHY}; use accumulate() and apply()")
    _check(store)
    optimizer, weight = store.optim.optimizer, list[Any]()
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else {}
    hooks = [p.register_post_accumulate_grad_hook(partial(_update, store, groups.get(id(p)), weight)) for p in store.params]
    try:
        found = grad_fn(store, Around(batches[0], lambda loss_fn: _weighing(loss_fn, weight)), fold_in(key, 0))
    finally:
        for hook in hooks:
            hook.remove()
    return found.metrics


def _weighing(loss_fn: Any, weight: list[Any]) -> Any:
    """The loss function, which also records the weight that its gradients must be divided by."""

    def weighing(model: Any, batch: Any) -> Any:
        out = loss_fn(model, batch)
        loss = out[0] if out.__class__ is tuple and out else out
        if loss.__class__ is Mean:
            weight.append(weight_of(loss))
        return out

    return weighing


def _update(store: Store, group: dict[str, Any] | None, weight: list[Any], p: Tensor) -> None:
    """Let the optimizer see a single parameter, in a group of the same options."""
    found, optimizer = p.grad, store.optim.optimizer
    p.grad = None
    if group is None or found is None:
        return
    if weight:
        held = weight[0]
        if isinstance(held, Tensor):
            foreach_mul_([found], 1.0 / held.to(found.device))
        else:
            foreach_div_([found], held)
    groups = optimizer.param_groups
    p.grad, optimizer.param_groups = found, [{**group, "params": [p]}]
    try:
        if store.optim.offload:
            take_step_on_host(optimizer)
        else:
            take_step(optimizer)
    finally:
        p.grad, optimizer.param_groups = None, groups
