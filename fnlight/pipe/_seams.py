"""The checks of a pipe: kinds of function, unique names, the order of a tick, and the conditions of each combinator.

It is a module of its own because checking wraps nothing: `pipe` wraps the combinators once they are checked.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from fnlight.errors import MonitorError, SeamError
from fnlight.pipe.combinator import TICK, Combinator, Kind
from fnlight.state import TrainState

ORDER: tuple[Kind, ...] = ("kernel", "loss", "grad_sum", "grad", "step")
"""The kinds of function, innermost first."""

_SAYS = {
    "kernel": "a manual update, (store, batches, key) -> metrics",
    "loss": "a LossFn, (model, batch) -> loss",
    "grad_sum": "a GradFn of one batch, whose gradients are sums",
    "grad": "a GradFn of a group, whose gradients are true means",
    "step": "a Step, (state, batch) -> (state, metrics)",
}


def check_combinators(given: Sequence[Any]) -> None:
    """Raise an error for anything that is not a combinator."""
    for c in given:
        if not isinstance(c, Combinator):
            raise SeamError(_no_combinator(c))


def _no_combinator(given: Any) -> str:
    if callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        return f"pipe joins combinators, but got the function {name}; call it first, as in {name}(...), or wrap it in fl.Combinator(name, wrap, takes, gives)"
    return f"pipe joins combinators, but got {type(given).__name__}: {given!r:.80}"


def check_seams(base: str, kind: Kind, earlier: Sequence[Combinator], combinators: Sequence[Combinator]) -> None:
    """Refuse combinators that share a name, break the order of a tick, or do not take what the previous one gives.

    Args:
        base: The name of the innermost function.
        kind: The kind of function that they wrap.
        earlier: The combinators that already wrap it.
        combinators: The combinators to add, innermost first.
    """
    every = (*earlier, *combinators)
    _check_names(every)
    _check_order(every)
    for i, c in enumerate(combinators, len(earlier)):
        if c.takes != kind and not needs_mean(c, kind):
            raise SeamError(_says_seam(c, kind, every[:i], base))
        kind = c.gives


def needs_mean(c: Combinator, kind: Kind) -> bool:
    """Whether summed gradients must be divided by their weight before a combinator gets them."""
    return c.takes == "grad" and kind == "grad_sum"


def _check_names(combinators: Sequence[Combinator]) -> None:
    seen: dict[str, Combinator] = {}
    for c in combinators:
        if c.key in seen:
            raise SeamError(
                f"two combinators have the same name {c.key!r}, {seen[c.key]} and {c}: leave one out, or give one of them another name="
            )
        seen[c.key] = c


def _check_order(combinators: Sequence[Combinator]) -> None:
    phased = [c for c in combinators if c.phase is not None]
    for before, after in pairwise(phased):
        if TICK.index(before.phase or "") > TICK.index(after.phase or ""):
            raise SeamError(
                f"{after} ({after.phase}) comes after {before} ({before.phase}), but the order of a tick is: {', '.join(TICK)}; "
                f"move {after} before {before}"
            )


def check_company(combinators: tuple[Combinator, ...]) -> None:
    """Let every combinator of a finished step check the others."""
    for c in combinators:
        wrong = None if c.validate is None else c.validate(combinators)
        if wrong is not None:
            raise SeamError(wrong)


def check_phase(name: str, kind: Kind, combinators: Sequence[Combinator], joint: Combinator) -> None:
    """Refuse a phase that gives no gradients, or has combinators that act on the whole state.

    Args:
        name: The name of the phase.
        kind: The kind of function that it is.
        combinators: The combinators that wrap it.
        joint: The combinator that joins the phases.
    """
    if kind not in ("grad_sum", "grad"):
        given = _SAYS[kind if combinators else "loss"]
        raise SeamError(f"{joint} takes {_SAYS['grad']}, but the phase {name!r} gives {given}; put grad() before {joint}")
    for c in combinators:
        if c.requires or c.provides:
            raise SeamError(f"{c} acts on the whole state, so it cannot be part of the phase {name!r}; put it after {joint}")


def end_of_phases(given: Mapping[str, Any], combinators: Sequence[Combinator]) -> int:
    """The index of the combinator that joins several phases into one step."""
    end = next((i for i, c in enumerate(combinators) if c.gives == "step"), None)
    if end is None:
        raise SeamError(
            f"apply() joins the phases {', '.join(given)} into one step, but there is none; put apply() after the combinators that they share"
        )
    return end


_PIPE = "add evaluate_every(loader) for 'val/...', epoch_means() for 'train/...'"


def check_monitors(state: TrainState, combinators: Sequence[Combinator], advice: str = _PIPE) -> None:
    """Refuse to monitor a metric that is not recorded.

    Args:
        state: Its history and its schedules are looked at.
        combinators: Those of the whole step.
        advice: How the caller can record a metric.
    """
    provided = [prefix for c in combinators for prefix in c.provides]
    wanted = {name: str(c) for c in combinators for name in c.requires}
    wanted |= {optim.monitor: f"the schedule {optim.schedule}" for optim in state.store.optims.values() if optim.monitor is not None}
    for name, who in wanted.items():
        if not name.startswith(tuple(provided)) and not any(name in record.metrics for record in state.history):
            raise MonitorError(
                f"{who} monitors {name!r}, but this run does not record it, so it would have no effect; recorded are "
                f"{[prefix + '...' for prefix in provided] or 'no metrics'}: {advice}"
            )


def _says_seam(c: Combinator, kind: Kind, earlier: Sequence[Combinator], base: str) -> str:
    whom = f"after {earlier[-1] if earlier else base}"
    if ORDER.index(c.takes) < ORDER.index(kind):
        where = {
            "kernel": "directly after a function (store, batches, key) -> metrics",
            "loss": f"before {next(e for e in earlier if e.gives != 'loss')}" if c.gives != "loss" else "before grad()",
            "grad_sum": "directly after grad()",
            "grad": "between grad() and apply()",
            "step": "after apply()",
        }[c.takes]
        what = f"move {c} {where}"
    else:
        last = "apply()" if kind != "loss" else "grad() and apply()"
        need = {"kernel": "", "loss": "", "grad_sum": "grad()", "grad": "grad()", "step": last}[c.takes]
        what = f"put {need} before {c}"
    return f"{c} takes {_SAYS[c.takes]}, but {whom} it gets {_SAYS[kind]}; {what}" + (f" ({c.why})" if c.why else "")
