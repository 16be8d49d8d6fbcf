"""The loop: `run`, and the combinators that act once in a while.

A tick has one order, which `pipe` enforces: **update** (`apply`, `ema`), **schedule** (the learning rate of the next update follows
from completed work and history), **evaluate** (`evaluate_every`), **history** (`fnlight.loop.epoch_means`), **log** (`log_to`),
**save** (`checkpoint_every`), **stop** (`stop_when`). A checkpoint therefore holds the state with its evaluation, and knows what was logged.
After the last step of a run the same order is gone through once more with a tick whose ``end`` is True.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import attrs

from fnlight.data import Item, Source, batches
from fnlight.errors import check_type, in_step
from fnlight.pipe import Pipe, pipe
from fnlight.runtime import A_SIGNALS, Signals, worker_death
from fnlight.state import A_STATE, Store, TrainState
from fnlight.tensors import isolated

Metrics = Mapping[str, Any]


def run(
    step: Any,
    state: TrainState,
    loader: Any,
    *,
    donate: bool = False,
    limit: int | float | None = None,
    shuffle: bool = True,
    signals: Signals | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[tuple[TrainState, Metrics]]:
    """Train step by step: a generator, so the loop is yours.

    Args:
        step: A pipe, or any `Step`.
        state: Where training stands; it is copied, unless `donate` is True.
        loader: A loader, an iterable of batches, or a `Source`.
        donate: True trains on the very tensors of `state`.
        limit: Batches an epoch at most (int), or a fraction of them (float).
        shuffle: False takes the data in its own order.
        signals: What listens; when a signal comes, the run ends after the step that is under way.
        clock: Gives seconds; for ``progress.seconds``.

    Yields:
        ``(state, metrics)`` after every step. The last state has `stopped`; without a stop rule there is no last one. When a signal
        comes between two steps, the state of the last step comes once more, with `stopped`.

    Returns:
        The last state, as the value of the generator.

    Example:
        >>> from fnlight.triggers import max_steps
        >>> from fnlight.state import Task
        >>> from fnlight.loop.stop_when import stop_when
        >>> from fnlight.step import apply
        >>> from fnlight.gradients import grad
        >>> import torch
        >>> task = Task(torch.nn.Linear(1, 1), lambda model, batch: model(batch).sum(),
        ...             configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        >>> step = pipe(task.train_step, grad(), apply(), stop_when(max_steps(3)))
        >>> [state.progress.step for state, metrics in run(step, TrainState.create(task), [torch.ones(2, 1)])]
        [1, 2, 3]
    """
    check_type("run(step, state, ...)", state, TrainState, A_STATE)
    check_type("run(clock=...)", clock, Callable, "a function that gives seconds")
    check_type("run(signals=...)", signals, Signals | None, A_SIGNALS)
    whole = step if isinstance(step, Pipe) else pipe(step)
    state = state if donate else state.copy()
    beat = None if state.store.place is None else state.store.place.everyone.pulse(clock, signals)
    if signals is not None and not isinstance(loader, Source):
        loader = Source(loader, limit=limit, shuffle=shuffle, device=state.device)

    def items(state: TrainState) -> Iterator[Item]:
        found = batches(
            loader, state, whole.batches_per_step, limit=limit, shuffle=shuffle, device=state.device, clock=clock, beat=beat,
            wall_time=state.store.wall_time,
        )  # fmt: skip
        if signals is None:
            return found
        # a loader that keeps its own place would not know it any more if it were left in the middle of a batch
        return signals.between(found) if loader.keeps_position else signals.until(found)

    return _run(whole, state, items, signals=signals, clock=clock)


def _run(
    step: Pipe, state: TrainState, items: Callable[[TrainState], Iterator[Item]], signals: Signals | None, clock: Callable[[], float]
) -> Iterator[tuple[TrainState, Metrics]]:
    store, error = state.store, None
    store.wall_time.begin(clock)
    try:
        with isolated(state.device):
            known = state.history
            state, metrics = step.start(attrs.evolve(state, stopped=None)), None
            if state.stopped is not None:
                return state if state.history is known else step.finish(state)
            advance = step.fn  # the store is prepared: one call less at every step
            for item in items(state):
                state, metrics = advance(state, item)
                if signals is not None:
                    state = _noticed(state, signals)
                if state.stopped is not None:
                    break
                yield state, metrics
            state = step.finish(state if signals is None else _noticed(state, signals))  # only a signal ends the items
            if metrics is not None:
                yield state, metrics
            return state
    except BaseException as failure:
        error = (
            worker_death(failure)
            or (store.place and store.place.everyone.lost(failure, f"behind step {state.progress.step}"))
            or in_step(failure, state.progress.step)
        )
        if error is failure:
            raise
        raise error from failure
    finally:
        try:
            step.close()
        finally:
            if signals is not None:
                signals.alone()
            store.wall_time.end()
            _release(store, error)


def _release(store: Store, error: BaseException | None) -> None:
    """Close what a run holds open, the last first, whatever the others raise; gradients and the loader are let go."""
    with ExitStack() as stack:
        if error is None or isinstance(error, GeneratorExit):
            stack.callback(store.settle)
        for resource in store.end_run().values():
            stack.callback(resource.close, error)


def _noticed(state: TrainState, signals: Signals) -> TrainState:
    if signals.received is None or state.stopped is not None:
        return state
    return attrs.evolve(state, stopped=signals.received)
