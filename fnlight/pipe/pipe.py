"""The pipe that joins combinators: each one wraps the function that the previous one gave."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import Tensor

from fnlight.errors import ConfigError, MemoryWarning, SeamError, warn
from fnlight.pipe._seams import (
    ORDER,
    check_combinators,
    check_company,
    check_monitors,
    check_phase,
    check_seams,
    end_of_phases,
    needs_mean,
)
from fnlight.pipe.combinator import Combinator, Kind
from fnlight.pipe.mean import mean_of_group
from fnlight.state import Store, TrainState
from fnlight.tensors import leaves


@attrs.frozen(eq=False, init=False, repr=False)
class Phase:
    """One of several losses that take turns, each with its own optimizer; a value in the mapping that is a task's ``train_step``.

    Args:
        train_step: ``(model, batch) -> loss`` or ``(loss, metrics)``.
        *combinators: Combinators for this phase only, such as ``clip_norm(0.1)``. One with the name of a shared combinator replaces it.
            Others are added: those that wrap the loss before the shared ones, those that change gradients after them.
        every: When the phase takes part: a trigger, such as ``steps(5)``; None is every step.

    Example:
        >>> phase = Phase(lambda model, batch: batch)
        >>> phase(None, 3)
        3
    """

    train_step: Callable[[Any, Any], Any]
    combinators: tuple[Combinator, ...]
    every: Callable[[Any], bool] | None

    def __init__(self, train_step: Any, *combinators: Combinator, every: Callable[[Any], bool] | None = None) -> None:
        if every is not None and not callable(every):
            raise ConfigError(f"Phase(every=...) must be a trigger such as steps(5), but got {every!r}")
        check_combinators(combinators)
        for c in combinators:
            if c.gives == "step":
                raise SeamError(
                    f"{c} gives a whole step, so it cannot be part of one Phase; pass it to pipe(...) after the mapping of phases"
                )
        self.__attrs_init__(train_step, combinators, every)  # pyright: ignore[reportAttributeAccessIssue]  # made by attrs

    def __call__(self, model: Any, batch: Any) -> Any:
        """Call the train_step."""
        return self.train_step(model, batch)


@attrs.frozen(eq=False, repr=False)
class Turn:
    """A phase as `apply` gets it.

    Args:
        grad_fn: Gives the mean gradients of a group of batches.
        every: When it takes part; None is every step.
        batches_per_step: How many batches of a step it uses, the first ones: a number, or a mapping of epochs to numbers; None uses all.

    Example:
        >>> Turn(lambda store, batches, key: None).every is None
        True
    """

    grad_fn: Callable[..., Any]
    every: Callable[[Any], bool] | None = None
    batches_per_step: int | Mapping[int, int] | None = None


@attrs.frozen(eq=False, repr=False)
class Pipe:
    """A function with the combinators that wrap it; made by `pipe`.

    Args:
        fn: The wrapped function.
        base: The name of the innermost function, for ``print``.
        combinators: In reading order, innermost first.
        kind: The kind of function that the pipe is.
        batches_per_step: Batches that one step consumes: a number, or a mapping of first epochs to numbers.
        phases: The pipes of the phases that it joins, by name.

    Example:
        >>> half = Combinator("half", lambda loss_fn: lambda model, batch: loss_fn(model, batch) / 2, "loss", "loss")
        >>> print(pipe(lambda model, batch: batch, half))
        <lambda> > half
    """

    fn: Callable[..., Any]
    base: str
    combinators: tuple[Combinator, ...]
    kind: Kind
    batches_per_step: int | Mapping[int, int] = 1
    phases: Mapping[str, "Pipe"] = attrs.field(factory=dict)

    def __call__(self, state: Any, batch: Any, *more: Any) -> Any:
        """Call the wrapped function; a `Step` first creates the missing memory of its combinators in the store."""
        if self.kind == "step" and state.store.owner is not self:
            self.adopt(state)
        return self.fn(state, batch, *more)

    def __str__(self) -> str:
        return " > ".join([self.base, *map(str, self.combinators)])

    __repr__ = __str__

    def adopt(self, state: TrainState) -> None:
        """Create the memory of every combinator that has none in the store yet; warn of what was added or is unused."""
        store, at = state.live, state.progress.step
        if not self.phases.keys() <= store.phases.keys():
            raise SeamError(
                f"this step has the phases {', '.join(self.phases)}, but the task has optimizers for {', '.join(store.phases) or 'none of them'}; "
                "configure_optimizers must return a dict with an optimizer for each phase"
            )
        trees = store.memory.get("phases", {})
        for name, phase in self.phases.items():
            own = store.phases[name]
            own.memory = trees.get(name, {})
            phase._own(own, at, f"phases/{name}/")
            if own.memory:
                trees[name] = own.memory
        if trees:
            store.memory["phases"] = trees
        self._own(store, at, "")
        store.owner = self

    def _own(self, store: Store, at: int, prefix: str) -> None:
        owners = {c.key: c for c in self.combinators if c.init is not None}
        known = owners.keys() | {"loader"} | ({"phases"} if self.phases else set())
        left = [prefix + key for key in store.memory if key not in known and _notable(store.memory[key])]
        if left:
            warn(
                f"the state at step {at} holds the memory of {left}, which no combinator of this pipe uses; it is kept unchanged. Pipe: {self}",
                MemoryWarning,
            )
        for key, combinator in owners.items():
            if key in store.memory and combinator.init is not None:
                store.complete(key, combinator.init)
            if key in store.memory or combinator.init is None:
                continue
            tree = combinator.init(store)
            if at and _notable(tree):
                warn(f"{combinator} starts with new memory at step {at}: the state has none for {prefix + key!r}", MemoryWarning)
            store.memory[key] = tree

    def start(self, state: TrainState) -> TrainState:
        """Prepare a run: create missing memory, then call the `start` of each combinator, in reading order."""
        check_monitors(state, self.combinators)
        self.adopt(state)
        state.store.step.media = state.store.run.until = None  # left over from an earlier run
        for name, phase in self.phases.items():
            phase._begin(_within(state, name))
        return self._begin(state)

    def _begin(self, state: TrainState) -> TrainState:
        for combinator in self.combinators:
            if combinator.start is not None:
                state = combinator.start(state)
        return state

    def finish(self, state: TrainState) -> TrainState:
        """End a run: call the `finish` of each combinator, in reading order."""
        before = state
        for name, phase in self.phases.items():
            phase.finish(_within(state, name))
        for combinator in self.combinators:
            if combinator.finish is not None:
                state = combinator.finish(before, state)
        return state

    def close(self) -> None:
        """Call the `close` of each combinator, also after an error."""
        for combinator in (*(c for phase in self.phases.values() for c in phase.combinators), *self.combinators):
            if combinator.close is not None:
                combinator.close()


def _within(state: TrainState, name: str) -> TrainState:
    """The state with the store of a phase, for the phase's own combinators."""
    store = state.store.phases[name]
    return attrs.evolve(state, store=store, version=store.version)


def _notable(tree: Any) -> bool:
    """Whether losing this memory would change the training: tensors would; windows of metrics and lists of files would not."""
    return any(isinstance(leaf, Tensor) for _, leaf in leaves(tree))


def pipe(fn: Any, *combinators: Combinator) -> Pipe:
    """Join a function and combinators: ``pipe(x, f, g)`` is ``g(f(x))``; their order is checked.

    Args:
        fn: What the first combinator takes: a ``train_step``, a user's own `Step`, or another pipe. Or a mapping of names to
            ``train_step``s or `Phase`s: the combinators before `apply` wrap each of them, and `apply` joins them into one step.
        *combinators: The combinators, innermost first.

    Returns:
        A `Pipe`, callable like the function that the last combinator gives; ``print`` shows it in reading order.

    Raises:
        SeamError: If a combinator does not take what the previous one gives, two share a name or contradict each other, or the order of a
            tick is wrong.

    Example:
        >>> twice = Combinator("twice", lambda loss_fn: lambda model, batch: 2 * loss_fn(model, batch), "loss", "loss")
        >>> print(pipe(lambda model, batch: batch.sum(), twice))
        <lambda> > twice
    """
    check_combinators(combinators)
    if isinstance(fn, Mapping):
        return _joined(fn, combinators)
    if not callable(fn):
        raise SeamError(f"pipe(fn, ...) starts from a function such as task.train_step, but got {type(fn).__name__}: {fn!r:.80}")
    inner = fn if isinstance(fn, Pipe) else _bare(fn, combinators)
    check_seams(inner.base, inner.kind, inner.combinators, combinators)
    wrapped, kind = inner.fn, inner.kind
    for c in combinators:
        if needs_mean(c, kind):
            wrapped = mean_of_group(wrapped)
        wrapped, kind = c.wrap(wrapped), c.gives
    found = attrs.evolve(inner, fn=wrapped, combinators=(*inner.combinators, *combinators), kind=kind)
    if kind == "step":
        for company in [(*phase.combinators, *found.combinators) for phase in inner.phases.values()] or [found.combinators]:
            check_company(company)
    return attrs.evolve(found, batches_per_step=_batches_per_step(found, combinators))


def _bare(fn: Any, combinators: tuple[Combinator, ...]) -> Pipe:
    """A pipe without combinators; its kind is what the first combinator takes."""
    return Pipe(fn, getattr(fn, "__name__", type(fn).__name__), (), kind=combinators[0].takes if combinators else "step")


def _batches_per_step(whole: Pipe, added: tuple[Combinator, ...]) -> int | Mapping[int, int]:
    """The value of the last combinator that has one, times the updates of one call; without any, that of the inner pipe."""
    said = [c.batches_per_step for c in whole.combinators if c.batches_per_step is not None]
    group = said[-1] if said else whole.batches_per_step
    times = max([1, *(c.repeats for c in (whole.combinators if said else added))])
    return {epoch: n * times for epoch, n in group.items()} if isinstance(group, Mapping) else group * times


def _joined(given: Mapping[str, Any], combinators: tuple[Combinator, ...]) -> Pipe:
    """A step of several phases: each has its own pipe, up to the combinator that gives a step."""
    end = end_of_phases(given, combinators)
    joint, phases, turns, said = combinators[end], dict[str, Pipe](), dict[str, Turn](), list[Any]()
    for name, fn in given.items():
        phase = fn if isinstance(fn, Phase) else Phase(fn)
        own = {c.key for c in phase.combinators}
        early = [c for c in phase.combinators if c.takes == "loss"]
        late = [c for c in phase.combinators if c.takes != "loss"]
        shared = [c for c in combinators[:end] if c.key not in own]
        order = sorted((*early, *shared, *late), key=lambda c: ORDER.index(c.takes))
        whole = pipe(phase.train_step, *order)
        check_phase(name, whole.kind, whole.combinators, joint)
        groups = [c.batches_per_step for c in whole.combinators if c.batches_per_step is not None]
        turns[name] = Turn(mean_of_group(whole.fn) if whole.kind == "grad_sum" else whole.fn, phase.every, groups[-1] if groups else None)
        phases[name] = whole
        said += [f"{name}({whole}{'' if phase.every is None else f', every={phase.every}'})"]
    group = _largest([turn.batches_per_step for turn in turns.values() if turn.batches_per_step is not None])
    joined = Pipe(joint.wrap(turns), " + ".join(said), (joint,), kind="step", batches_per_step=group, phases=phases)
    return pipe(joined, *combinators[end + 1 :])


def _largest(groups: list[int | Mapping[int, int]]) -> int | Mapping[int, int]:
    """The batches per step: the largest number that any phase needs, by epoch."""
    by_epoch = [group if isinstance(group, Mapping) else {0: group} for group in groups]
    starts = sorted({start for group in by_epoch for start in group})
    found = {start: max(group[max(s for s in group if s <= start)] for group in by_epoch) for start in starts}
    return found if len(found) > 1 else found.get(0, 1)
