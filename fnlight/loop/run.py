"""The loop: `run`.

A tick is one optimizer step plus the evaluation, logging, saving and stopping that follow it. Its order is fixed, and `pipe` enforces it:
**update** (`apply`, `ema`), **schedule** (the learning rate of the next update is computed from completed work and history), **evaluate**
(`evaluate_every`), **history** (`fnlight.loop.epoch_means`), **log** (`log_to`), **save** (`checkpoint_every`), **stop** (`stop_when`).
A checkpoint therefore holds the state with its evaluation, and knows what was logged. After the last step of a run, the same order is
repeated once with a tick whose ``end`` is True.
"""

import sys
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
        state: The state to start from; it is copied, unless `donate` is True.
        loader: A loader, an iterable of batches, or a `Source`.
        donate: True trains in the tensors of `state`, without a copy; `state` cannot be read afterwards.
        limit: The largest number of batches per epoch (int), or a fraction of them (float).
        shuffle: False keeps the order of the data.
        signals: The signal handlers, or None; a signal ends the run after the current step.
        clock: Returns seconds; for ``progress.seconds``.

    Yields:
        ``(state, metrics)`` after every step. The last state has `stopped`; without a stop rule the run does not end. If a signal
        comes between two steps, the state of the last step is yielded again, with `stopped`.

    Returns:
        The last state, as the return value of the generator.

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
        # a loader that keeps its own position must not be interrupted in the middle of a batch: it would lose its position
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
            or (store.place and store.place.everyone.lost(failure, f"after step {state.progress.step}"))
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
        if (
            error is None or isinstance(error, GeneratorExit)
        ) and not sys.is_finalizing():  # as Python ends, nothing reads the state any more
            stack.callback(store.settle)
        for resource in store.end_run().values():
            stack.callback(resource.close, error)


def _noticed(state: TrainState, signals: Signals) -> TrainState:
    if signals.received is None or state.stopped is not None:
        return state
    return attrs.evolve(state, stopped=signals.received)
