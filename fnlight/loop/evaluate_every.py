"""Evaluation during training, on a trigger; its metrics go to the history."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch

from fnlight.data import Source
from fnlight.errors import Interrupted, LoaderError, check_type
from fnlight.loop.evaluate import evaluate_sources, sources_of, step_of
from fnlight.loop.log_to import news
from fnlight.metrics import MEDIA
from fnlight.pipe import Combinator
from fnlight.runtime import A_SIGNALS, Signals
from fnlight.state import TrainState
from fnlight.triggers import Tick, condition, epochs


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
    """Evaluate when a trigger fires, and add the metrics to the history as ``val/loss`` and so on.

    An evaluation that was interrupted by a signal or an error leaves no record; a resumed run starts with it.

    Args:
        loader: A loader, or a mapping of named loaders (then ``val/NAME/loss``).
        every: When to evaluate.
        name: The prefix of the metrics' names; unique in a pipe.
        eval_step: ``(model, batch) -> metrics``; None uses the task's.
        weights: The name of the averaged weights to evaluate, such as ``"ema"``; None uses the parameters.
        limit: The largest number of batches (int), or a fraction of them (float).
        signals: The signal handlers, or None; a signal defers the evaluation to the resumed run.

    Returns:
        A combinator from `Step` to `Step`.

    Example:
        >>> from fnlight.triggers import steps
        >>> print(evaluate_every([1], every=steps(100)))
        evaluate_every(val, every=steps(100))
    """
    _check(name, eval_step, weights, signals)
    due, key = condition(every, "evaluate_every(every=...)"), f"evaluate_every {name}"

    def evaluated_now(state: TrainState) -> TrainState:
        fn = step_of(state, "eval_step", eval_step)
        tree = state.store.memory[key]
        tree["owed"] = True
        try:
            with state.store.wall_time.taken("evaluate"):
                found = evaluate_sources(state, _opened(state, key, loader, limit), fn, weights=weights, signals=signals)
        except Interrupted:
            return state
        except LoaderError as error:
            error.add_note(f"in the evaluation {name!r}, after step {state.progress.step}")
            raise
        tree["owed"] = False
        media = {f"{name}/{k}": v for k, v in found.items() if isinstance(v, MEDIA)}
        if media:
            state.store.step.media = {**(state.store.step.media or {}), **media}
        return state.recorded({f"{name}/{k}": v for k, v in found.items() if not isinstance(v, MEDIA)})

    def wrap(step: Any) -> Any:
        def evaluated(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
            before = state.progress
            state, metrics = step(state, batch)
            return (evaluated_now(state) if due(Tick(before, state.progress)) else state), metrics

        return evaluated

    def start(state: TrainState) -> TrainState:
        step_of(state, "eval_step", eval_step)
        _opened(state, key, loader, limit)
        if not state.store.memory[key]["owed"]:
            return state
        after = evaluated_now(state)
        if after.history is not state.history:
            state.store.step.media = {**news(after, state.history), **(state.store.step.media or {})}
        return after

    def finish(before: TrainState, state: TrainState) -> TrainState:
        at = state.progress
        if signals is not None and signals.received is not None and state.stopped == signals.received:
            return state  # the training continues in a resumed run
        here = state.history and state.history[-1].step == at.step and any(k.startswith(f"{name}/") for k in state.history[-1].metrics)
        return evaluated_now(state) if not here and due(Tick(at, at, end=True)) else state

    label = f"{name}, every={every}" + (f", weights={weights!r}" if weights else "")
    return Combinator(
        "evaluate_every", wrap, "step", "step", args=label, key=key, init=lambda store: {"owed": False}, phase="evaluate",
        start=start, finish=finish, provides=(f"{name}/",),
    )  # fmt: skip


@attrs.frozen(eq=False, repr=False)
class _Opened:
    """The loaders of an evaluation in one run, kept between evaluations together with their persistent workers."""

    device: torch.device
    place: Any
    sources: Mapping[str, Source]

    def close(self, error: BaseException | None) -> None:
        """Nothing to do: workers end with their loaders."""


def _opened(state: TrainState, key: str, loader: Any, limit: int | float | None) -> Mapping[str, Source]:
    """The sources of the current run; created if there are none, or if the state has moved to another device."""
    store = state.store
    found = store.run.resources.get(key)
    if found is None or found.device != store.device or found.place is not store.place:
        sources = sources_of(loader, store.device, limit, store.place)
        found = store.run.resources[key] = _Opened(store.device, store.place, sources)
    return found.sources


def _check(name: Any, eval_step: Any, weights: Any, signals: Any) -> None:
    check_type("evaluate_every(name=...)", name, str, "the prefix of the metrics' names")
    check_type("evaluate_every(eval_step=...)", eval_step, Callable | None, "a function of model and batch, or None for the task's")
    check_type("evaluate_every(weights=...)", weights, str | None, 'the name of averaged weights, such as "ema", or None')
    check_type("evaluate_every(signals=...)", signals, Signals | None, A_SIGNALS)
