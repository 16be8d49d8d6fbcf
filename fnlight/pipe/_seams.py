"""What may follow what in a pipe: kinds of function, names, the order of a tick, and what combinators say of their company.

It is apart from `pipe` because checking looks at all combinators and wraps none: `pipe` wraps what was found to fit.
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
    "kernel": "an update by hand, (store, batches, key) -> metrics",
    "loss": "a LossFn, (model, batch) -> loss",
    "grad_sum": "a GradFn of one batch, whose gradients are sums",
    "grad": "a GradFn of a group, whose gradients are true means",
    "step": "a Step, (state, batch) -> (state, metrics)",
}


def check_combinators(given: Sequence[Any]) -> None:
    """Refuse what is no combinator."""
    for c in given:
        if not isinstance(c, Combinator):
            raise SeamError(_no_combinator(c))


def _no_combinator(given: Any) -> str:
    if callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        return f"pipe joins combinators, but got the function {name}; call it first, as in {name}(...), or wrap it in fl.Combinator(name, wrap, takes, gives)"
    return f"pipe joins combinators, but got {type(given).__name__}: {given!r:.80}"


def check_seams(base: str, kind: Kind, earlier: Sequence[Combinator], combinators: Sequence[Combinator]) -> None:
    """Refuse combinators that share a name, are out of the order of a tick, or do not take what the one before gives.

    Args:
        base: What the innermost function is called.
        kind: The kind of function that they wrap.
        earlier: The combinators that it is wrapped in already.
        combinators: Those that are added, innermost first.
    """
    every = (*earlier, *combinators)
    _check_names(every)
    _check_order(every)
    for i, c in enumerate(combinators, len(earlier)):
        if c.takes != kind and not needs_mean(c, kind):
            raise SeamError(_says_seam(c, kind, every[:i], base))
        kind = c.gives


def needs_mean(c: Combinator, kind: Kind) -> bool:
    """Whether gradients that are sums must become means in front of a combinator."""
    return c.takes == "grad" and kind == "grad_sum"


def _check_names(combinators: Sequence[Combinator]) -> None:
    seen: dict[str, Combinator] = {}
    for c in combinators:
        if c.key in seen:
            raise SeamError(
                f"two combinators of one name, {seen[c.key]} and {c}: leave one out, or, where both are meant, give one its own name= ({c.key!r} is taken)"
            )
        seen[c.key] = c


def _check_order(combinators: Sequence[Combinator]) -> None:
    phased = [c for c in combinators if c.phase is not None]
    for before, after in pairwise(phased):
        if TICK.index(before.phase or "") > TICK.index(after.phase or ""):
            raise SeamError(
                f"{after} ({after.phase}) stands behind {before} ({before.phase}), but a tick has one order: {', '.join(TICK)}; "
                f"move {after} in front of {before}"
            )


def check_company(combinators: tuple[Combinator, ...]) -> None:
    """Ask every combinator of a finished step what it has against the others."""
    for c in combinators:
        wrong = None if c.validate is None else c.validate(combinators)
        if wrong is not None:
            raise SeamError(wrong)


def check_phase(name: str, kind: Kind, combinators: Sequence[Combinator], joint: Combinator) -> None:
    """Refuse a phase that gives no gradients, or has combinators that act on the whole state.

    Args:
        name: What the phase is called.
        kind: The kind of function that it is.
        combinators: What it is wrapped in.
        joint: The combinator that joins the phases.
    """
    if kind not in ("grad_sum", "grad"):
        given = _SAYS[kind if combinators else "loss"]
        raise SeamError(f"{joint} takes {_SAYS['grad']}, but the phase {name!r} gives {given}; put grad() in front of {joint}")
    for c in combinators:
        if c.requires or c.provides:
            raise SeamError(f"{c} acts on the whole state, so it cannot stand within the phase {name!r}; put it behind {joint}")


def end_of_phases(given: Mapping[str, Any], combinators: Sequence[Combinator]) -> int:
    """Where the combinator stands that makes one step of several phases."""
    end = next((i for i, c in enumerate(combinators) if c.gives == "step"), None)
    if end is None:
        raise SeamError(
            f"the phases {', '.join(given)} become one step by apply(), but there is none; put it behind the combinators that they share"
        )
    return end


def check_monitors(state: TrainState, combinators: Sequence[Combinator]) -> None:
    """Refuse a metric that something waits for and nothing gives."""
    provided = [prefix for c in combinators for prefix in c.provides]
    wanted = {name: str(c) for c in combinators for name in c.requires}
    wanted |= {optim.monitor: f"the schedule {optim.schedule}" for optim in state.store.optims.values() if optim.monitor is not None}
    for name, who in wanted.items():
        if not name.startswith(tuple(provided)) and not any(name in record.metrics for record in state.history):
            raise MonitorError(
                f"{who} monitors {name!r}, but nothing in this pipe yields it, so it could never fire; there are "
                f"{[prefix + '...' for prefix in provided] or 'no evaluations at all'}: add evaluate_every(loader) for 'val/...', epoch_means() for 'train/...'"
            )


def _says_seam(c: Combinator, kind: Kind, earlier: Sequence[Combinator], base: str) -> str:
    whom = f"behind {earlier[-1] if earlier else base}"
    if ORDER.index(c.takes) < ORDER.index(kind):
        where = {
            "kernel": "directly behind a function (store, batches, key) -> metrics",
            "loss": f"in front of {next(e for e in earlier if e.gives != 'loss')}" if c.gives != "loss" else "in front of grad()",
            "grad_sum": "directly behind grad()",
            "grad": "between grad() and apply()",
            "step": "behind apply()",
        }[c.takes]
        what = f"move {c} {where}"
    else:
        last = "apply()" if kind != "loss" else "grad() and apply()"
        need = {"kernel": "", "loss": "", "grad_sum": "grad()", "grad": "grad()", "step": last}[c.takes]
        what = f"put {need} in front of {c}"
    return f"{c} takes {_SAYS[c.takes]}, but {whom} it is given {_SAYS[kind]}; {what}" + (f" ({c.why})" if c.why else "")
