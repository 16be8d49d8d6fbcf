"""The loop: `run`, and the combinators that act once in a while.

A tick has one order, which `pipe` enforces: **update** (`apply`, `ema`), **schedule** (the learning rate of the next update follows
from completed work and history), **evaluate** (`evaluate_every`), **history** (`fnlight.watch.epoch_means`), **log** (`log_to`),
**save** (`checkpoint_every`), **stop** (`stop_when`). A checkpoint therefore holds the state with its evaluation, and knows what was logged.
After the last step of a run the same order is gone through once more with a tick whose ``end`` is True.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import attrs

from fnlight.combinator import Combinator
from fnlight.data import Item, Source, batches
from fnlight.errors import ConfigError, Interrupted, LoaderError, check_type
from fnlight.evaluate import evaluate_sources, sources_of, step_of
from fnlight.history import Record
from fnlight.metrics import MEDIA, Tally
from fnlight.metrics.ranks import read_all
from fnlight.pipe import Pipe, pipe
from fnlight.rng import isolated
from fnlight.rules import StopRule
from fnlight.signals import A_SIGNALS, Signals, worker_death
from fnlight.sinks.deliver import deliver, let_go
from fnlight.state import A_STATE, Store, TrainState
from fnlight.when import Tick, condition, epochs, steps

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
        >>> from fnlight.rules import max_steps
        >>> from fnlight.task import Task
        >>> from fnlight.update import apply, grad
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
    source = (
        Source(loader, limit=limit, shuffle=shuffle, device=state.device)
        if signals is not None and not isinstance(loader, Source)
        else loader
    )

    def items(state: TrainState) -> Iterator[Item]:
        found = batches(
            source, state, whole.group, limit=limit, shuffle=shuffle, device=state.device, clock=clock, times=state.store.times, beat=beat
        )
        if signals is None:
            return found
        # a loader that keeps its own place would not know it any more if it were left in the middle of a batch
        return signals.between(found) if source.keeps_position else signals.until(found)

    return _run(whole, state, items, signals, clock)


def _run(
    step: Pipe, state: TrainState, items: Callable[[TrainState], Iterator[Item]], signals: Signals | None, clock: Callable[[], float]
) -> Iterator[tuple[TrainState, Metrics]]:
    store, error = state.store, None
    store.times.begin(clock)
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
            worker_death(failure) or (store.place and store.place.everyone.lost(failure, f"behind step {state.progress.step}")) or failure
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
            store.times.end()
            _release(store, error)


def _release(store: Store, error: BaseException | None) -> None:
    """Close what a run holds open, the last first, whatever the others raise; gradients and the loader are let go."""
    held, store.resources, store.spent = store.resources, {}, None
    with ExitStack() as stack:
        if error is None or isinstance(error, GeneratorExit):
            stack.callback(store.settle)
        for resource in held.values():
            stack.callback(resource.close, error)


def _noticed(state: TrainState, signals: Signals) -> TrainState:
    if signals.received is None or state.stopped is not None:
        return state
    return attrs.evolve(state, stopped=signals.received)


def evaluate_every(
    loader: Any,
    every: Callable[[Tick], bool] = epochs(1),
    *,
    name: str = "val",
    eval_step: Callable[[Any, Any], Any] | None = None,
    weights: str | None = None,
    limit: int | float | None = None,
    signals: Signals | None = None,
) -> Combinator:
    """Evaluate when it is due, and add the metrics to the history as ``val/loss`` and so on.

    An evaluation that did not end, because of a signal or an error, leaves no record; a run that goes on begins with it.

    Args:
        loader: A loader, or a mapping of named loaders (then ``val/NAME/loss``).
        every: When it is due.
        name: What stands before the metrics' names; unique in a pipe.
        eval_step: ``(model, batch) -> metrics``; None takes the task's.
        weights: The memory whose averaged weights are evaluated, such as ``"ema"``; None takes the parameters.
        limit: Batches at most (int), or a fraction of them (float).
        signals: What listens; when a signal comes, the evaluation is put off.

    Returns:
        A combinator from `Step` to `Step`.

    Example:
        >>> print(evaluate_every([1], every=steps(100)))
        evaluate_every(val, every=steps(100))
    """
    _check(name, eval_step, weights, signals)
    due, key = condition(every, "evaluate_every(every=...)"), f"evaluate_every {name}"
    opened: dict[Any, Any] = {}  # kept from one evaluation to the next, with the workers that persist

    def sources(state: TrainState) -> Any:
        if state.device not in opened:
            opened[state.device] = sources_of(loader, state.device, limit, state.store.place)
        return opened[state.device]

    def evaluated_now(state: TrainState) -> TrainState:
        fn = step_of(state, "eval_step", eval_step)
        tree = state.store.memory[key]
        tree["owed"] = True
        try:
            with state.store.times.taken("evaluate"):
                found = evaluate_sources(state, sources(state), fn, weights, signals)
        except Interrupted:
            return state
        except LoaderError as error:
            error.add_note(f"in the evaluation {name!r}, behind step {state.progress.step}")
            raise
        tree["owed"] = False
        media = {f"{name}/{k}": v for k, v in found.items() if isinstance(v, MEDIA)}
        if media:
            state.store.media = {**(state.store.media or {}), **media}
        return state.recorded({f"{name}/{k}": v for k, v in found.items() if not isinstance(v, MEDIA)})

    def wrap(step: Any) -> Any:
        def evaluated(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            before = state.progress
            state, metrics = step(state, batch)
            return (evaluated_now(state) if due(Tick(before, state.progress)) else state), metrics

        return evaluated

    def start(state: TrainState) -> TrainState:
        step_of(state, "eval_step", eval_step)
        sources(state)
        if not state.store.memory[key]["owed"]:
            return state
        after = evaluated_now(state)
        if after.history is not state.history:
            state.store.media = {**_news(after, state.history), **(state.store.media or {})}
        return after

    def finish(before: TrainState, state: TrainState) -> TrainState:
        at = state.progress
        if signals is not None and signals.received is not None and state.stopped == signals.received:
            return state  # the training is not at its end
        here = state.history and state.history[-1].step == at.step and any(k.startswith(f"{name}/") for k in state.history[-1].metrics)
        return evaluated_now(state) if not here and due(Tick(at, at, end=True)) else state

    label = f"{name}, every={every}" + (f", weights={weights!r}" if weights else "")
    return Combinator(
        "evaluate_every", wrap, "step", "step", args=label, key=key, init=lambda store: {"owed": False}, phase="evaluate",
        start=start, finish=finish, yields=(f"{name}/",),
    )  # fmt: skip


def _check(name: Any, eval_step: Any, weights: Any, signals: Any) -> None:
    check_type("evaluate_every(name=...)", name, str, "what stands before the metrics' names")
    check_type("evaluate_every(eval_step=...)", eval_step, Callable | None, "a function of model and batch, or None for the task's")
    check_type("evaluate_every(weights=...)", weights, str | None, 'the name of averaged weights, such as "ema", or None')
    check_type("evaluate_every(signals=...)", signals, Signals | None, A_SIGNALS)


def log_to(*sinks: Any, every: Callable[[Tick], bool] = steps(50), name: str = "log", times: bool = False) -> Combinator:
    """Send records to sinks: training metrics when they are due, as exact means since the last time, and every evaluation at once.

    Training metrics are called ``train/loss`` and so on, with ``lr`` beside them (``lr/NAME`` where there are several groups); means over an
    epoch ``train_epoch/loss``. A sink that fails is warned of once, with a `FaultWarning`, and training goes on;
    ``state.memory["failed_sinks"]`` says what it missed.

    Args:
        *sinks: Any functions of a `Record`.
        every: When the training metrics are due.
        name: Where the window lies in the memory; unique in a pipe.
        times: True adds what the time since the last record went to: ``samples/s``, and the shares ``time/step``, ``time/data`` and so on.

    Returns:
        A combinator from `Step` to `Step`.

    Raises:
        ConfigError: If there is no sink, or one is not callable.

    Example:
        >>> print(log_to(print, every=steps(50)))
        log_to(print, every=steps(50))
    """
    if not sinks:
        raise ConfigError('log_to needs a sink, such as fl.JSONL("log.jsonl")')
    for sink in sinks:
        if not callable(sink):
            raise ConfigError(f"a sink must be a function of a record, but got {type(sink).__name__}: {sink!r:.60}")

    is_due, told = condition(every, "log_to(every=...)"), set[str]()

    def send(state: TrainState, metrics: dict[str, Any]) -> None:
        if state.store.place is None or state.store.place.writes:
            deliver(sinks, Record(state.progress.step, state.progress.epoch, metrics), state.store.memory, told)

    def logged_now(state: TrainState, due: bool, old: tuple[Record, ...]) -> None:
        with state.store.times.taken("log"):
            metrics = _news(state, old)
            if due:
                tally, place = state.store.memory[name], state.store.place
                read = tally.read() if place is None else read_all(tally, place.world.gather)
                metrics |= {f"train/{k}": v for k, v in read.items()} | state.store.reported()
                metrics |= state.store.times.window(name, state.progress.samples) if times else {}
                tally.clear()
            if metrics:
                send(state, metrics)

    def wrap(step: Any) -> Any:
        def logged(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            before, old = state.progress, state.history
            state, metrics = step(state, batch)
            if state.store.back == state.version:  # what the step gave counts nowhere, and the history of then is no news
                return state, metrics
            state.store.memory[name].add(state.progress.step, metrics)
            due = is_due(Tick(before, state.progress))
            if due or state.history is not old or state.store.media:
                logged_now(state, due, old)
            return state, metrics

        return logged

    def start(state: TrainState) -> TrainState:
        told.clear()
        state.store.times.mark(name, state.progress.samples)
        if state.store.media:  # of an evaluation that was made up for
            send(state, dict(state.store.media))
        return state

    def finish(before: TrainState, state: TrainState) -> TrainState:
        if state.store.back == state.version:
            return state
        due = not state.store.memory[name].is_empty()
        if due or state.history is not before.history:
            logged_now(state, due, before.history)
        return state

    label = ", ".join(getattr(s, "__name__", repr(s)) for s in sinks)
    return Combinator(
        "log_to", wrap, "step", "step", args=f"{label}, every={every}{', times=True' if times else ''}", key=name, init=lambda store: Tally(),
        phase="log", start=start, finish=finish, close=lambda: let_go(sinks),
    )  # fmt: skip


def _news(state: TrainState, old: tuple[Record, ...]) -> dict[str, Any]:
    """What this tick added to the history, and the media of its evaluation."""
    if state.history is old:
        return dict(state.store.media or {})
    known = old[-1].metrics if old and old[-1].step == state.history[-1].step else {}
    new = {k: v for k, v in state.history[-1].metrics.items() if k not in known}
    return {(f"train_epoch/{k[6:]}" if k.startswith("train/") else k): v for k, v in new.items()} | (state.store.media or {})


def stop_when(*rules: Callable[[TrainState], str | None]) -> Combinator:
    """Stop a run when a rule gives a reason; asked after every step, and before the first one.

    Args:
        *rules: Stop rules; the first reason counts.

    Returns:
        A combinator from `Step` to `Step` that sets ``state.stopped``.

    Raises:
        ConfigError: If there is no rule, or one is not callable.

    Example:
        >>> from fnlight.rules import max_steps
        >>> print(stop_when(max_steps(10)))
        stop_when(max_steps(10))
    """
    if not rules or not all(callable(rule) for rule in rules):
        raise ConfigError(f"stop_when needs stop rules such as max_epochs(10), but got {rules!r}")

    known = min([rule.until for rule in rules if isinstance(rule, StopRule) and rule.until is not None], default=None)
    bare = [rule.fn if isinstance(rule, StopRule) else rule for rule in rules]  # one call less at every step

    def asked(state: TrainState) -> TrainState:
        for rule in bare:
            reason = rule(state)
            if reason is not None:
                return attrs.evolve(state, stopped=reason)
        return state

    def start(state: TrainState) -> TrainState:
        state.store.until = known  # a step of several updates takes no more than these
        return asked(state)

    def wrap(step: Any) -> Any:
        def stopping(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            state, metrics = step(state, batch)
            return asked(state), metrics

        return stopping

    monitors = tuple(m for rule in rules if isinstance(rule, StopRule) for m in rule.monitors)
    label = ", ".join(getattr(rule, "__name__", repr(rule)) for rule in rules)
    return Combinator("stop_when", wrap, "step", "step", args=label, phase="stop", start=start, monitors=monitors)
