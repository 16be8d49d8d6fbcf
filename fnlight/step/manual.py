"""Manual steps: `manual` turns a function that changes the store itself into a `Step`."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from fnlight.data import Item, Part
from fnlight.errors import StepError
from fnlight.gradients import begin, taken
from fnlight.metrics import own_metric
from fnlight.optim import set_lr
from fnlight.pipe import Combinator, batches_at
from fnlight.state import Store, TrainState


def manual(
    init: Callable[[Store], Any] | None = None, *, name: str = "manual", batches_per_step: int | Mapping[int, int] | None = None
) -> Combinator:
    """Turn a function ``(store, batches, key) -> metrics`` into a `Step`, for training without gradients, or with a custom update.

    The function may write everything in the store: parameters and buffers of ``store.module``, in place and under ``torch.no_grad``, its own
    memory in ``store.memory[name]``, and the optimizers in ``store.optims``, by ``backward()`` and ``step()``. `manual` does the rest: the
    input is donated, the generators are seeded from the key of the step, schedules set the learning rates by completed steps, gradients are
    cleared, and the progress is updated. So it is saved, resumed, evaluated, logged and stopped like any other step.

    Args:
        init: Maps the store to the initial memory of the function; None if it needs none.
        name: The key of its memory in ``store.memory``.
        batches_per_step: Batches that one step consumes: a number, or a mapping of epochs to numbers; None is 1.

    Returns:
        A combinator from such a function to `Step`.

    Example:
        >>> import torch
        >>> from fnlight.pipe.pipe import pipe
        >>> from fnlight.state import Task
        >>> @torch.no_grad()
        ... def halve(store, batches, key):
        ...     store.module.weight.mul_(0.5)
        ...     return {"weight": store.module.weight.abs().max()}
        >>> step = pipe(halve, manual())
        >>> state, metrics = step(TrainState.create(Task(torch.nn.Linear(1, 1, bias=False).requires_grad_(False), step)), torch.ones(2))
        >>> print(step), state.progress.step, list(metrics)
        halve > manual
        (None, 1, ['weight'])
    """
    if batches_per_step is not None:
        batches_at(batches_per_step, 0)

    def wrap(fn: Any) -> Any:
        def kernel(store: Store, batches: Any, key: int) -> Mapping[str, Any]:
            store.seed(key)
            look = taken(store)
            metrics = fn(store, tuple([batch.batch if batch.__class__ is Part else batch for batch in batches]), key)
            if look is not None:
                look.check_task(fn)
            if not isinstance(metrics, Mapping):
                who = getattr(fn, "__name__", type(fn).__name__)
                raise StepError(
                    f"{who} must return a dict of metrics, which may be empty, but returned {type(metrics).__name__}: {metrics!r:.60}"
                )
            return {name: own_metric(name, value) for name, value in metrics.items()}

        return ByHand(kernel)

    label = "" if name == "manual" else f"name={name!r}"
    return Combinator(
        "manual", wrap, "kernel", "step", args=label, key=name, init=init, phase="update", batches_per_step=batches_per_step, start=begin
    )


@attrs.frozen(eq=False, repr=False)
class ByHand:
    """A `Step` of a function that changes the store, with the counting around it.

    Args:
        kernel: Maps ``(store, batches, key)`` to metrics.

    Example:
        >>> ByHand(lambda store, batches, key: {}).kernel(None, (), 0)
        {}
    """

    kernel: Callable[[Store, Any, int], Mapping[str, Any]]

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
        """Take one step; the input state is donated."""
        item = Item.of(batch, state=state)
        for optim in state.live.optims.values():
            if optim.scheduled:
                set_lr(optim, state.progress, state.history)
        store = state.donated()
        try:
            metrics = self.kernel(store, item.batches, state.key)
        finally:
            store.clear_gradients()
        return state.advanced(item), metrics
