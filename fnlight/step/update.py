"""The step: combinators that turn a loss into gradients, gradients into an update, and an update into a step.

Innermost first: `grad` (loss to gradients), `accumulate` (gradients), `apply` (gradients to a step). Precision is in
`fnlight.precision.precision`, clipping in `fnlight.gradients.clip`, averaged weights in `fnlight.step.averages`. `update` is the pure standard step.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from fnlight.data import Item
from fnlight.errors import NonFiniteError, OptimizerError, StepError, check_type
from fnlight.gradients import grad
from fnlight.optim import set_lr, step_where, take_step, take_step_on_host
from fnlight.pipe import Combinator, Pipe, Turn, batches_at, loss_of_all, pipe
from fnlight.protocols import GradFn, Gradients
from fnlight.state import A_STATE, Progress, Store, TrainState, step_key
from fnlight.tensors import fold_in, isolated
from fnlight.triggers import Tick


def apply() -> Combinator:
    """Turn a `GradFn` into a `Step`: set the learning rate, compute the gradients, run the optimizer, and count the step.

    The input state is donated. If the step fails half-way, its tensors cannot be read either.
    If a pipe starts from several phases, they run in order: each phase whose trigger fires computes gradients of the parameters of its own
    optimizer only, and sees the updates of the phases before it. The metrics of the phase ``gen`` are called ``gen/loss`` and so on.

    Returns:
        A combinator from `GradFn` to `Step`.

    Example:
        >>> print(pipe(lambda model, batch: model(batch).sum(), grad(), apply()))
        <lambda> > grad > apply
    """

    def wrap(grad_fn: Any) -> Any:
        if isinstance(grad_fn, Mapping):
            return MultiOptimizerStep(grad_fn, {name: partial(_optimize, turn.grad_fn) for name, turn in grad_fn.items()})
        return Update(partial(_optimize, grad_fn))

    return Combinator("apply", wrap, "grad", "step", phase="update")


@attrs.frozen(eq=False, repr=False)
class Update:
    """A `Step` in two parts: a kernel, which changes tensors of the store and nothing else, and the counting around it.

    Combinators such as `ema` only extend the kernel, so that the whole kernel can be traced into one graph.

    Args:
        kernel: Maps ``(store, batches, key)`` to metrics.
        reads: Names of the trees in ``store.memory`` that the kernel uses.

    Example:
        >>> step = apply()(grad()(lambda model, batch: model(batch).sum()))
        >>> step.then(lambda store: None, "mine").reads
        ('mine',)
    """

    kernel: Callable[[Store, Any, int], Mapping[str, Any]]
    reads: tuple[str, ...] = ()

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
        """Take one step; the input state is donated."""
        store, progress = state.store, state.progress
        if store.version != state.version:
            store = state.live  # raises
        item = batch if batch.__class__ is Item else Item.of(batch, state=state)
        if store.optim.scheduled:
            set_lr(store.optim, progress, state.history)
        state.donated()
        try:
            metrics = self.kernel(store, item.batches, step_key(state.seed, progress))
        except NonFiniteError as error:
            error.add_note(f"at step {progress.step + 1}, in epoch {item.epoch}, up to its batch {item.batch}")
            raise
        finally:
            store.clear_gradients()
        return state.advanced(item), metrics

    def then(self, fn: Callable[[Store], None], *reads: str) -> "Update":
        """An update whose kernel also calls a function of the store, which may change tensors only.

        Args:
            fn: Called after the optimizer's step, unless the step was skipped.
            *reads: Names of the trees in ``store.memory`` that it uses.

        Returns:
            Another update.
        """
        kernel = self.kernel

        def followed(store: Store, batches: Any, key: int) -> Mapping[str, Any]:
            metrics = kernel(store, batches, key)
            if not store.step.skipped:
                fn(store)
            return metrics

        return Update(followed, (*self.reads, *reads))


@attrs.frozen(eq=False, repr=False)
class MultiOptimizerStep:
    """A `Step` of several optimizers, one after the other.

    Args:
        turns: The phases by name.
        kernels: The kernel of each phase: maps ``(store, batches, key)``, with the store of the phase, to metrics.

    Example:
        >>> list(apply()({"gen": Turn(lambda store, batches, key: None)}).kernels)
        ['gen']
    """

    turns: Mapping[str, Turn]
    kernels: Mapping[str, Callable[[Store, Any, int], Mapping[str, Any]]]

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
        """Take one step with every phase whose trigger fires; the input state is donated."""
        item, before = Item.of(batch, state=state), state.progress
        key, store = state.key, state.donated()
        updates, metrics, made = dict(before.updates), dict[str, Any](), list[bool]()
        tick = Tick(before, before.after(item, 1, 0, updates))
        for i, (name, turn) in enumerate(self.turns.items()):
            if turn.every is None or turn.every(tick):
                batches = item.batches if turn.batches_per_step is None else item.batches[: batches_at(turn.batches_per_step, item.epoch)]
                at = attrs.evolve(before, step=updates[name])
                found = _turn(store, name, self.kernels[name], batches=batches, key=fold_in(key, i), at=at, history=state.history)
                metrics |= {f"{name}/{k}": v for k, v in found.items()}
                made += [not store.phases[name].step.skipped]
                updates[name] += made[-1]
        store.step.skipped = bool(made) and not any(made)
        return state.advanced(item, updates), metrics


def _turn(store: Store, name: str, kernel: Any, batches: Any, key: int, at: Progress, history: Any) -> Mapping[str, Any]:
    with store.training(name) as phase:
        phase.step.begin(at)
        if phase.optim.scheduled:
            set_lr(phase.optim, at, history)
        try:
            return kernel(phase, batches, key)
        except StepError as error:
            raise StepError(f"in the phase {name!r}: {error}") from error


def _optimize(grad_fn: GradFn, store: Store, batches: Any, key: int) -> Mapping[str, Any]:
    optimizer = store.optim.optimizer
    if store.optim.closure:
        return _optimize_closure(store, grad_fn, batches, key)
    found = grad_fn(store, batches, key)
    if optimizer is not None:
        _put(store, found)
        _take(store, optimizer, found.finite)
    elif store.params:
        raise OptimizerError(
            f"this task has an optimizer for each of the phases {', '.join(store.phases)}, so its step starts from a mapping of them to functions, "
            "as in fl.pipe(task.train_step, fl.grad(), fl.apply())"
            if store.phases
            else "this task cannot train: its parameters require gradients, but it has no configure_optimizers; give fl.Task one"
        )
    return found.metrics


def _take(store: Store, optimizer: Any, finite: Tensor | bool | None) -> None:
    """Run the optimizer, unless gradients are not finite."""
    if finite is False:
        store.step.skipped = True
    elif store.optim.offload:
        if finite is None or finite:
            take_step_on_host(optimizer)
    elif finite is None:
        take_step(optimizer, store.optim.bound)
    else:
        step_where(optimizer, finite, store.optim.bound, blind=store.host.traced)


def _put(store: Store, found: Gradients) -> None:
    for p, value in zip(store.params, found.values, strict=True):
        if p.grad is not value:
            p.grad = value


def _optimize_closure(store: Store, grad_fn: GradFn, batches: Any, key: int) -> Mapping[str, Any]:
    """One step of an optimizer that evaluates the loss several times; its metrics are those of the first evaluation."""
    evaluations: list[dict[str, Any]] = []

    @torch.enable_grad()
    def closure() -> Tensor:
        for p in store.params:
            p.grad = None
        found = grad_fn(store, batches, key)
        if found.finite is not None:
            raise OptimizerError(
                f"{type(store.optim.optimizer).__name__} evaluates the loss several times per step, so its steps cannot be skipped; "
                "leave out the combinators that skip steps (loss_scale, skip_nonfinite, skip_spikes), or use another optimizer"
            )
        evaluations.append(dict(found.metrics))
        _put(store, found)
        return loss_of_all(store, found)

    store.optim.optimizer.step(closure)
    return evaluations[0]


def pure(step: Any) -> Any:
    """Make a step pure: it works on a copy, so its input can still be read, and restores the global generators.

    Args:
        step: Any `Step`.

    Returns:
        A `Step` that does not donate.

    Example:
        >>> step = pure(pipe(lambda model, batch: model(batch).sum(), grad(), apply()))
        >>> step.__name__
        'pure_step'
    """
    check_type("pure(step)", step, Callable, "a step: a function of state and batch")

    def pure_step(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
        with isolated(state.device):
            after, metrics = step(state.copy(), batch)
        after.store.free_gradients()
        return after, metrics

    return pure_step


def update(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
    """The pure standard step: the task's `train_step`, its gradients, its optimizer.

    Args:
        state: The state to start from; it can still be read afterwards.
        batch: One batch, or an `Item` of several.

    Returns:
        ``(state, metrics)``.

    Example:
        >>> from fnlight.state import Task
        >>> task = Task(torch.nn.Linear(2, 1), lambda model, batch: model(batch).sum(),
        ...             configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        >>> before = TrainState.create(task)
        >>> after, metrics = update(before, torch.ones(1, 2))
        >>> before.progress.step, after.progress.step, list(metrics)
        (0, 1, ['loss'])
    """
    check_type("update(state, ...)", state, TrainState, A_STATE)
    train_step = state.task.train_step
    whole = isinstance(train_step, Pipe) and train_step.kind == "step"
    step: Pipe = train_step if whole else pipe(train_step, grad(), apply())
    return pure(step)(state, batch)
