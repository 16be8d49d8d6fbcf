"""Records for sinks: training metrics on a trigger, and every evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from fnlight.errors import ConfigError
from fnlight.metrics import MEDIA, Tally, read_all
from fnlight.pipe import Combinator
from fnlight.runtime import exit_code
from fnlight.sinks import close_sinks, deliver
from fnlight.state import Record, TrainState
from fnlight.triggers import Tick, condition, steps


def log_to(*sinks: Any, every: Callable[[Tick], bool] = steps(50), name: str = "log", wall_time: bool = False) -> Combinator:
    """Send records to sinks: training metrics on a trigger, as exact means since the last record, and every evaluation at once.

    After a signal, the run that resumes sends what was not sent. Training metrics are called ``train/loss`` and so on, with ``lr`` beside
    them (``lr/NAME`` where there are several groups); means over an epoch ``train_epoch/loss``. A sink that fails is warned of once, with a
    `FaultWarning`, and training continues; ``state.memory["failed_sinks"]`` says what it missed.

    Args:
        *sinks: Functions of a `Record`.
        every: When training metrics are sent.
        name: The key of the pending metrics in ``state.memory``; unique in a pipe.
        wall_time: True adds where the time since the last record was spent: ``samples/s``, and the shares ``time/step``, ``time/data`` and so on.

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

    is_due, key = condition(every, "log_to(every=...)"), f"log_to {name}"

    def send(state: TrainState, metrics: dict[str, Any]) -> None:
        if state.store.place is None or state.store.place.writes:
            resources = state.store.run.resources
            told = resources.get(key) or resources.setdefault(key, _Told())
            deliver(sinks, Record(state.progress.step, state.progress.epoch, metrics), state.store.memory, told.sinks)

    def logged_now(state: TrainState, due: bool, metrics: dict[str, Any]) -> None:
        with state.store.wall_time.taken("log"):
            if due:
                tally, place = state.store.memory[name], state.store.place
                read = tally.read() if place is None else read_all(tally, place.world.gather)
                metrics |= {f"train/{k}": v for k, v in read.items()} | state.store.reported()
                metrics |= state.store.wall_time.window(name, state.progress.samples) if wall_time else {}
                tally.clear()
            if metrics:
                send(state, metrics)

    def wrap(step: Any) -> Any:
        def logged(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
            before, old = state.progress, state.history
            state, metrics = step(state, batch)
            if (
                state.store.step.back == state.version
            ):  # after a rollback, this step does not count, and the older history is not sent again
                return state, metrics
            state.store.memory[name].add(state.progress.step, metrics)
            due = is_due(Tick(before, state.progress))
            if due or state.history is not old or state.store.step.media:
                found, put_off = news(state, old), _evaluations(state, owed=True)
                if put_off:
                    put_off[0][f"line {name}"] = [state.progress.step, due, {k: v for k, v in found.items() if not isinstance(v, MEDIA)}]
                else:
                    logged_now(state, due, found)
            return state, metrics

        return logged

    def start(state: TrainState) -> TrainState:
        state.store.run.resources[key] = _Told()
        state.store.wall_time.mark(name, state.progress.samples)
        if not _evaluations(state, owed=True):  # else the line waits further
            due, found = _taken(state, f"line {name}")
            logged_now(state, due, {**(state.store.step.media or {}), **found})
        return state

    def finish(before: TrainState, state: TrainState) -> TrainState:
        if state.store.step.back == state.version or exit_code(state.stopped or ""):
            return state  # after a signal the training is not at its end: the run that resumes sends what is here
        due = not state.store.memory[name].is_empty()
        if due or state.history is not before.history:
            logged_now(state, due, news(state, before.history))
        return state

    label = ", ".join(getattr(s, "__name__", repr(s)) for s in sinks)
    return Combinator(
        "log_to", wrap, "step", "step", args=f"{label}, every={every}{', wall_time=True' if wall_time else ''}", key=name, init=lambda store: Tally(),
        phase="log", start=start, finish=finish, close=lambda: close_sinks(sinks),
    )  # fmt: skip


@attrs.frozen(eq=False, repr=False)
class _Told:
    """The sinks that a run has already warned of."""

    sinks: set[str] = attrs.field(factory=set)

    def close(self, error: BaseException | None) -> None:
        """Nothing to close."""


def _evaluations(state: TrainState, owed: bool = False) -> list[dict[str, Any]]:
    """What evaluations remember: whether they are owed, and the lines of logs that wait for them; of all, or of those that are owed."""
    return [tree for key, tree in state.store.memory.items() if key.startswith("evaluate_every ") and (tree["owed"] or not owed)]


def _taken(state: TrainState, key: str) -> tuple[bool, dict[str, Any]]:
    """The line that waited under this key, taken out: whether training metrics were due, and the rest of it."""
    found = [tree.pop(key) for tree in _evaluations(state) if key in tree]
    return next(((due, rest) for step, due, rest in found if step == state.progress.step), (False, {}))


def news(state: Any, old: tuple[Record, ...]) -> dict[str, Any]:
    """The metrics that a tick added to the history, and the media of its evaluation.

    Args:
        state: The state after the tick.
        old: The history before it.

    Returns:
        Names to values, as sinks get them: means over an epoch are called ``train_epoch/...``.

    Example:
        >>> from types import SimpleNamespace
        >>> state = SimpleNamespace(history=(Record(4, 1, {"train/loss": 0.5}),), store=SimpleNamespace(step=SimpleNamespace(media=None)))
        >>> news(state, ())
        {'train_epoch/loss': 0.5}
    """
    if state.history is old:
        return dict(state.store.step.media or {})
    known = old[-1].metrics if old and old[-1].step == state.history[-1].step else {}
    new = {k: v for k, v in state.history[-1].metrics.items() if k not in known}
    return {(f"train_epoch/{k[6:]}" if k.startswith("train/") else k): v for k, v in new.items()} | (state.store.step.media or {})
