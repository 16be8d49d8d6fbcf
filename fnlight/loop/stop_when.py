"""Stop rules, checked after every step."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from fnlight.errors import ConfigError
from fnlight.pipe import Combinator
from fnlight.state import TrainState
from fnlight.triggers import StopRule, reason_of


def stop_when(*rules: Callable[[TrainState], str | bool | None], name: str = "stop_when") -> Combinator:
    """Stop a run when a stop rule gives a reason; checked after every step, and before the first one.

    Args:
        *rules: Stop rules: functions of the state that return None or False to continue, and a reason or True to stop. The first reason is
            used; that of True is the name of the rule.
        name: Its name in a pipe; give one if `stop_when` occurs twice, as in addition to that of `fnlight.fit.compose`.

    Returns:
        A combinator from `Step` to `Step` that sets ``state.stopped``.

    Raises:
        ConfigError: If there is no rule, or one is not callable.

    Example:
        >>> from fnlight.triggers import max_steps
        >>> print(stop_when(max_steps(10)))
        stop_when(max_steps(10))
    """
    if not rules or not all(callable(rule) for rule in rules):
        raise ConfigError(f"stop_when needs stop rules such as max_epochs(10), but got {rules!r}")

    known = min([rule.until for rule in rules if isinstance(rule, StopRule) and rule.until is not None], default=None)
    named = [(rule.fn, rule.form.text) if isinstance(rule, StopRule) else (rule, None) for rule in rules]  # one call less at every step

    def asked(state: TrainState) -> TrainState:
        for rule, text in named:
            answer = rule(state)
            if answer is not None and (reason := reason_of(rule, answer, text)) is not None:
                return state if state.stopped is not None else attrs.evolve(state, stopped=reason)
        return state

    def start(state: TrainState) -> TrainState:
        run = state.store.run
        if known is not None:  # so that a step of several updates does not exceed it
            run.until = known if run.until is None else min(known, run.until)
        return asked(state)

    def wrap(step: Any) -> Any:
        def stopping(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
            state, metrics = step(state, batch)
            return asked(state), metrics

        return stopping

    requires = tuple(m for rule in rules if isinstance(rule, StopRule) for m in rule.monitors)
    label = ", ".join(getattr(rule, "__name__", repr(rule)) for rule in rules) + ("" if name == "stop_when" else f", name={name!r}")
    return Combinator("stop_when", wrap, "step", "step", args=label, key=name, phase="stop", start=start, requires=requires)
