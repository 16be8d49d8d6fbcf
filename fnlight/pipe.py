"""Combinators and the pipe that joins them: a step is built by wrapping a function into a function into a function.

The kinds of function, from the user's to the loop's: ``loss`` (`LossFn`), ``sum`` (a `GradFn` of one batch whose gradients are sums),
``grad`` (a `GradFn` of a group of batches whose gradients are true means) and ``step`` (`Step`).
"""

import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import attrs
import torch
from torch import Tensor

from fnlight.errors import MemoryWarning, MonitorError, SeamError
from fnlight.metrics import Mean
from fnlight.protocols import Gradients
from fnlight.rng import fold_in
from fnlight.state import Store, TrainState
from fnlight.tree import leaves

Kind = Literal["loss", "sum", "grad", "step"]

TICK = ("update", "schedule", "evaluate", "history", "log", "save", "stop")
"""The one order of a tick; combinators that act in a phase must stand in it."""

_SAYS = {
    "loss": "a LossFn, (model, batch) -> loss",
    "sum": "a GradFn of one batch, whose gradients are sums",
    "grad": "a GradFn of a group, whose gradients are true means",
    "step": "a Step, (state, batch) -> (state, metrics)",
}


@attrs.frozen(eq=False)
class Combinator:
    """A function that wraps one function into another of the same or the next kind, and says so.

    Args:
        name: What it is called, for ``print(step)`` and for errors.
        wrap: Maps the inner function to the outer one.
        takes: The kind of function it wraps: ``"loss"``, ``"sum"``, ``"grad"`` or ``"step"``.
        gives: The kind of function that results.
        args: Its arguments, as ``print(step)`` shows them.
        key: What it is called in the state's memory, unique in a pipe; the name if left out.
        init: Maps a `Store` to the tree that this combinator owns there as ``store.memory[key]``; None if it remembers nothing.
        phase: The phase of `TICK` it acts in; None if it may stand anywhere.
        group: Batches that one step consumes: a number, or a mapping of epochs to numbers; None leaves it to others.
        start: Maps the state before the first step of a run to a state.
        finish: Maps the state after the last step of a run, and the state as its neighbours have finished it, to a state.
        close: Called when a run ends, however it ends.
        monitors: Names in the history that it needs.
        yields: Prefixes of the names that it adds to the history.
        fits: Maps all combinators of a finished step to what is wrong with its company, or None.

    Example:
        >>> double = Combinator("double", lambda loss_fn: lambda model, batch: 2 * loss_fn(model, batch), "loss", "loss")
        >>> double(lambda model, batch: batch)(None, 3)
        6
    """

    name: str
    wrap: Callable[[Any], Any]
    takes: Kind
    gives: Kind
    args: str = attrs.field(default="", kw_only=True)
    key: str = attrs.field(default=attrs.Factory(lambda self: self.name, takes_self=True), kw_only=True)
    init: Callable[[Store], Any] | None = attrs.field(default=None, kw_only=True)
    phase: str | None = attrs.field(default=None, kw_only=True)
    group: int | Mapping[int, int] | None = attrs.field(default=None, kw_only=True)
    start: Callable[[TrainState], TrainState] | None = attrs.field(default=None, kw_only=True)
    finish: Callable[[TrainState, TrainState], TrainState] | None = attrs.field(default=None, kw_only=True)
    close: Callable[[], None] | None = attrs.field(default=None, kw_only=True)
    monitors: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    yields: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    fits: Callable[[tuple["Combinator", ...]], str | None] | None = attrs.field(default=None, kw_only=True)

    def __call__(self, fn: Any) -> Any:
        """Wrap one function, outside of any pipe."""
        return self.wrap(fn)

    def __str__(self) -> str:
        return f"{self.name}({self.args})" if self.args else self.name


@attrs.frozen(eq=False, repr=False)
class Pipe:
    """A function with the combinators that wrap it; made by `pipe`.

    Args:
        fn: The wrapped function.
        base: What the pipe shows as its innermost function.
        combinators: In reading order, innermost first.
        kind: The kind of function that the pipe is.
        group: Batches that one step consumes: a number, or a mapping of first epochs to numbers.

    Example:
        >>> half = Combinator("half", lambda loss_fn: lambda model, batch: loss_fn(model, batch) / 2, "loss", "loss")
        >>> print(pipe(lambda model, batch: batch, half))
        <lambda> > half
    """

    fn: Callable[..., Any]
    base: str
    combinators: tuple[Combinator, ...]
    kind: Kind
    group: int | Mapping[int, int] = 1

    def __call__(self, state: Any, batch: Any, *more: Any) -> Any:
        """Call the wrapped function; a `Step` first makes sure that its combinators have their memory in the store."""
        if self.kind == "step" and state.store.owner is not self:
            self.adopt(state)
        return self.fn(state, batch, *more)

    def __str__(self) -> str:
        return " > ".join([self.base, *map(str, self.combinators)])

    __repr__ = __str__

    def adopt(self, state: TrainState) -> None:
        """Give every combinator that remembers something its tree in the store; say what was added or is left over."""
        store = state.live
        owners = {c.key: c for c in self.combinators if c.init is not None}
        left = [key for key in store.memory if key not in owners and key != "loader" and _notable(store.memory[key])]
        if left:
            warnings.warn(
                f"the state at step {state.progress.step} holds memory of {left}, which no combinator of this pipe owns; it is kept as it is. "
                f"Pipe: {self}",
                MemoryWarning,
                stacklevel=3,
            )
        for key, combinator in owners.items():
            if key in store.memory or combinator.init is None:
                continue
            tree = combinator.init(store)
            if state.progress.step and _notable(tree):
                warnings.warn(
                    f"{combinator} starts its memory at step {state.progress.step}: the state holds none for {key!r}",
                    MemoryWarning,
                    stacklevel=3,
                )
            store.memory[key] = tree
        store.owner = self

    def start(self, state: TrainState) -> TrainState:
        """Prepare a run: memory first, then what each combinator does before the first step, in reading order."""
        self._check_monitors(state)
        self.adopt(state)
        state.store.media = None  # what an earlier run showed
        for combinator in self.combinators:
            if combinator.start is not None:
                state = combinator.start(state)
        return state

    def finish(self, state: TrainState) -> TrainState:
        """End a run: what each combinator does after the last step, in reading order."""
        before = state
        for combinator in self.combinators:
            if combinator.finish is not None:
                state = combinator.finish(before, state)
        return state

    def _check_monitors(self, state: TrainState) -> None:
        yields = [prefix for c in self.combinators for prefix in c.yields]
        wanted = {name: str(c) for c in self.combinators for name in c.monitors}
        if state.store.optim.monitor is not None:
            wanted[state.store.optim.monitor] = f"the schedule {state.store.optim.schedule}"
        for name, who in wanted.items():
            if not name.startswith(tuple(yields)) and not any(name in record.metrics for record in state.history):
                raise MonitorError(
                    f"{who} monitors {name!r}, but nothing in this pipe yields it, so it could never fire; there are "
                    f"{[prefix + '...' for prefix in yields] or 'no evaluations at all'}: add evaluate_every(loader) for 'val/...', epoch_means() for 'train/...'"
                )

    def close(self) -> None:
        """Release what combinators hold open, however the run ended."""
        for combinator in self.combinators:
            if combinator.close is not None:
                combinator.close()


def _notable(tree: Any) -> bool:
    """Say whether losing a tree would change the training: one with tensors would, windows of metrics and lists of files would not."""
    return any(isinstance(leaf, Tensor) for _, leaf in leaves(tree))


def pipe(fn: Any, *combinators: Combinator) -> Pipe:
    """Join a function and combinators: ``pipe(x, f, g)`` is ``g(f(x))``; every seam is checked.

    Args:
        fn: What the first combinator takes: a ``train_step``, or a user's own `Step`, or another pipe.
        *combinators: Innermost first, in the order in which a reader thinks of them.

    Returns:
        A `Pipe`, callable as the function that the last combinator gives; ``print`` shows it in reading order.

    Raises:
        SeamError: If neighbours do not fit, two combinators share a name or contradict each other, or the phases of a tick are out of order.

    Example:
        >>> twice = Combinator("twice", lambda loss_fn: lambda model, batch: 2 * loss_fn(model, batch), "loss", "loss")
        >>> print(pipe(lambda model, batch: batch.sum(), twice))
        <lambda> > twice
    """
    if not callable(fn):
        raise SeamError(f"pipe(fn, ...) starts from a function such as task.train_step, but got {type(fn).__name__}: {fn!r:.80}")
    for c in combinators:
        if not isinstance(c, Combinator):
            raise SeamError(_no_combinator(c))
    inner = fn if isinstance(fn, Pipe) else None
    every = (*(inner.combinators if inner else ()), *combinators)
    _check_names(every)
    _check_phases(every)
    kind: Kind = inner.kind if inner else (combinators[0].takes if combinators else "step")
    wrapped: Any = inner.fn if inner else fn
    for i, c in enumerate(combinators):
        if c.takes == "grad" and kind == "sum":
            wrapped, kind = mean_of_group(wrapped), "grad"
        if c.takes != kind:
            raise SeamError(_seam(c, kind, combinators[i - 1] if i else None, fn))
        wrapped, kind = c.wrap(wrapped), c.gives
    if kind == "step":
        _check_company(every)
    groups = [c.group for c in every if c.group is not None]
    return Pipe(wrapped, inner.base if inner else getattr(fn, "__name__", type(fn).__name__), every, kind, groups[-1] if groups else 1)


def _no_combinator(given: Any) -> str:
    if callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        return f"pipe joins combinators, but got the function {name}; call it first, as in {name}(...), or wrap it in fl.Combinator(name, wrap, takes, gives)"
    return f"pipe joins combinators, but got {type(given).__name__}: {given!r:.80}"


def _check_names(combinators: tuple[Combinator, ...]) -> None:
    seen: dict[str, Combinator] = {}
    for c in combinators:
        if c.key in seen:
            raise SeamError(
                f"two combinators of one name, {seen[c.key]} and {c}: leave one out, or, where both are meant, give one its own name= ({c.key!r} is taken)"
            )
        seen[c.key] = c


def _check_phases(combinators: tuple[Combinator, ...]) -> None:
    phased = [c for c in combinators if c.phase is not None]
    for before, after in pairwise(phased):
        if TICK.index(before.phase or "") > TICK.index(after.phase or ""):
            raise SeamError(
                f"{after} ({after.phase}) stands behind {before} ({before.phase}), but a tick has one order: {', '.join(TICK)}; "
                f"move {after} in front of {before}"
            )


def _check_company(combinators: tuple[Combinator, ...]) -> None:
    for c in combinators:
        wrong = None if c.fits is None else c.fits(combinators)
        if wrong is not None:
            raise SeamError(wrong)


def _seam(c: Combinator, kind: Kind, before: Combinator | None, fn: Any) -> str:
    whom = f"behind {before}" if before else f"behind {getattr(fn, '__name__', type(fn).__name__)}"
    order: tuple[Kind, ...] = ("loss", "sum", "grad", "step")
    if order.index(c.takes) < order.index(kind):
        where = {
            "loss": "in front of grad()",
            "sum": "directly behind grad()",
            "grad": "between grad() and apply()",
            "step": "behind apply()",
        }[c.takes]
        what = f"move {c} {where}"
    else:
        need = {"loss": "", "sum": "grad()", "grad": "grad()", "step": "apply()" if kind != "loss" else "grad() and apply()"}[c.takes]
        what = f"put {need} in front of {c}"
    return f"{c} takes {_SAYS[c.takes]}, but {whom} it is given {_SAYS[kind]}; {what}"


def mean_of_group(grad_fn: Any) -> Any:
    """Turn a `GradFn` of one batch into one of a group: gradients are summed, then divided by the summed weight.

    Args:
        grad_fn: Gives the gradients of a batch's sum, with its weight.

    Returns:
        A `GradFn` that takes a tuple of batches and gives true gradients.

    Example:
        >>> def grad_fn(store, batch, key):
        ...     return Gradients([torch.tensor(batch)], torch.tensor(batch), 1.0, {})
        >>> mean_of_group(grad_fn)(None, (2.0, 4.0), 0).values
        [tensor(3.)]
    """

    def grouped(store: Any, batches: Any, key: int) -> Gradients:
        found = grad_fn(store, batches[0], fold_in(key, 0))
        for i in range(1, len(batches)):
            found = _add(found, grad_fn(store, batches[i], fold_in(key, i)))
        return found if found.weight.__class__ is float and found.weight == 1.0 else _divide(found)

    return grouped


class Part(NamedTuple):
    """A part of a batch, which a `GradFn` may be given in the place of a batch.

    Args:
        batch: Some of the samples of a batch.
        share: Which fraction of its samples they are, in 0..1; the parts of one batch come to 1.

    Example:
        >>> loss_fn, batch = Part(torch.tensor([1.0, 3.0]), 0.5).taken(lambda model, batch: batch.mean())
        >>> loss_fn(None, batch)
        Mean(total=tensor(1.), weight=0.5)
    """

    batch: Any
    share: float

    def taken(self, loss_fn: Any) -> tuple[Any, Any]:
        """The loss function of this part, and the batch to call it with: what counts with weight 1 counts with its share."""

        def shared(model: Any, batch: Any) -> Any:
            out = loss_fn(model, batch)
            if out.__class__ is tuple and len(out) == 2 and isinstance(out[1], Mapping):
                return _shared(out[0], self.share), {name: _shared(value, self.share) for name, value in out[1].items()}
            return _shared(out, self.share)

        return shared, self.batch


def _shared(value: Any, share: float) -> Any:
    number = not value.dim() if isinstance(value, Tensor) else isinstance(value, int | float)
    return Mean(value * share, share) if number else value


def _add(a: Gradients, b: Gradients) -> Gradients:
    values = list(a.values)
    left, right = list[Tensor](), list[Tensor]()
    for i, (x, y) in enumerate(zip(a.values, b.values, strict=True)):
        if x is None:
            values[i] = y
        elif y is not None and y is not x:  # where both are one tensor, backward() has added in place
            left.append(x)
            right.append(y)
    if left:
        torch._foreach_add_(left, right)
    metrics = {name: _join(value, b.metrics[name]) for name, value in a.metrics.items() if name in b.metrics}
    finite = a.finite if b.finite is None else b.finite if a.finite is None else a.finite & b.finite
    return Gradients(values, a.loss + b.loss, a.weight + b.weight, metrics, finite)


def _join(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor | int | float):
        return Mean(a, 1).merge(b if isinstance(b, Mean) else Mean(b, 1))
    if isinstance(a, Mean) and not isinstance(b, Mean):
        return a.merge(Mean(b, 1))
    merge = getattr(a, "merge", None)
    return b if merge is None else merge(b)


def _divide(found: Gradients) -> Gradients:
    held = [v for v in found.values if v is not None]
    weight = found.weight
    if isinstance(weight, Tensor):
        torch._foreach_mul_(held, 1.0 / weight.to(held[0].device)) if held else None
    elif held:
        torch._foreach_div_(held, weight)
    return found
