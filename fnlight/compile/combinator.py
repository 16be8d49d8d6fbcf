"""`compile`: a step whose whole kernel, from the forward pass to the averaged weights, is one graph."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import attrs

from fnlight.compile._private_torch import compiled_call, set_compiled_call
from fnlight.compile.graph import LEVELS, Graph, check_device
from fnlight.data import Item, num_samples
from fnlight.errors import ConfigError, SeamError, check_type
from fnlight.metrics import join_all
from fnlight.optim import set_lr
from fnlight.pipe import Combinator
from fnlight.state import Progress, Store, TrainState, step_key
from fnlight.step import ByHand, MultiOptimizerStep, Update
from fnlight.triggers import steps

Level = Literal["trace", "step", "graph", "model"]


def compile(level: Level = "step", *, unroll: int = 1, cache_dir: str | None = None) -> Combinator:
    """Make one graph of the whole update: forward, backward, what is done to gradients, the optimizer, averaged weights.

    - ``"trace"``: the operations in a row, without the Python between them: bitwise the eager step, and on small models twice as fast.
    - ``"step"``: that graph compiled by torch's compiler.
    - ``"graph"``: the operations captured as a CUDA graph, launched as a whole; on a CUDA device only.
    - ``"model"``: only the model's forward pass, with its backward pass, by ``torch.compile``; it stands in front of `grad`.

    Each shape of batch has a graph of its own. What cannot be traced goes on at the next level below, with one `CompileWarning` that says why.

    Args:
        level: How much is compiled.
        unroll: Updates in one call, whose metrics are merged (`Cat` keeps the value of each). A state stands behind all of them. At the end of
            an epoch fewer are made.
        cache_dir: Where compiled code is kept for other processes; None leaves it where torch has it.

    Returns:
        A combinator; it stands directly behind `apply` or `manual`, and what adds to its kernel, such as `ema`.

    Raises:
        ConfigError: If a level is unknown, or `unroll` does not fit.

    Example:
        >>> print(compile("step", unroll=4))
        compile('step', unroll=4)

    References:
        Ansel et al., "PyTorch 2: faster machine learning through dynamic Python bytecode transformation and graph compilation" (2024).
    """
    if level not in (*LEVELS, "model"):
        raise ConfigError(f"compile takes one of the levels 'trace', 'step', 'graph' and 'model', but got {level!r}")
    if not isinstance(unroll, int) or isinstance(unroll, bool) or unroll < 1 or (unroll > 1 and level == "model"):
        raise ConfigError(f"compile(unroll=...) must be a number of updates >= 1, and 1 at level 'model', but got {unroll!r}")
    check_type("compile(cache_dir=...)", cache_dir, str | PathLike | None, "a directory, or None for torch's own")
    label = repr(level) + (f", unroll={unroll}" if unroll > 1 else "")
    if level == "model":
        return Combinator("compile", _CompiledModel, "loss", "loss", args=label)

    def wrap(step: Any) -> Any:
        if isinstance(step, Update) and unroll > 1:
            return Unrolled(Graph(step.kernel, level, cache_dir), unroll)
        if isinstance(step, MultiOptimizerStep) and unroll == 1:
            return attrs.evolve(step, kernels={name: Graph(kernel, level, cache_dir) for name, kernel in step.kernels.items()})
        if isinstance(step, Update | ByHand) and unroll == 1:
            return attrs.evolve(step, kernel=Graph(step.kernel, level, cache_dir))
        if isinstance(step, MultiOptimizerStep | ByHand):
            raise ConfigError(f"compile(unroll={unroll}) takes several updates of one optimizer in a call; leave unroll out here")
        raise SeamError(
            f"compile({label}) makes one graph of an update, so it must stand directly behind apply(), manual() and ema(), but something else "
            "stands between, which it should be moved in front of"
        )

    def start(state: TrainState) -> TrainState:
        check_device(level, state.store)
        return state

    def validate(combinators: tuple[Combinator, ...]) -> str | None:
        at = next(i for i, c in enumerate(combinators) if c.name == "compile")
        late = [c for c in combinators[at:] if c.name == "ema" and c.facts.get("every") == steps(1)]
        return f"{late[0]} stands behind compile({label}) and would average once a call; move it in front" if late and unroll > 1 else None

    return Combinator("compile", wrap, "step", "step", args=label, phase="update", repeats=unroll, start=start, validate=validate)


@attrs.define(eq=False, repr=False)
class _CompiledModel:
    """A `LossFn` whose model is called through its compiled form.

    The form of the last model is kept, together with that model in one assignment: it is made from the model alone, so two states that take turns
    get their own, and pay for making it again.
    """

    loss_fn: Any
    last: tuple[Any, Any] = attrs.field(default=(None, None), init=False)

    def __call__(self, model: Any, batch: Any) -> Any:
        known, call = self.last
        if known is not model:
            call = compiled_call(model)
            self.last = (model, call)
        set_compiled_call(model, call)
        try:
            return self.loss_fn(model, batch)
        finally:
            set_compiled_call(model, None)


@attrs.frozen(eq=False, repr=False)
class Unrolled:
    """A `Step` of several updates, which one graph takes in one call.

    Args:
        graph: The kernel.
        times: Updates in one call.

    Example:
        >>> Unrolled(Graph(lambda store, batches, key: {}, "trace"), 4).times
        4
    """

    graph: Graph
    times: int

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
        """Take the updates of one item; the input state is donated."""
        item = Item.of(batch, state=state)
        size = max(1, (item.batches_per_step or len(item.batches)) // self.times)
        store = state.donated()
        if store.run.until is not None and (left := (store.run.until - state.progress.step) * size) > 0:
            item = _shortened(item, left)
        updates = [item.batches[i : i + size] for i in range(0, len(item.batches), size)]
        found = self._at_once(state, store, updates) if len(updates) == self.times else None
        done, skipped = len(updates), 0
        if found is None:
            found, done, skipped = self._one_by_one(state, store, updates)
        store.step.skipped = False  # both numbers are counted already
        return state.advanced(item, made=done, skipped=skipped), found

    def _at_once(self, state: TrainState, store: Store, updates: list[Any]) -> Mapping[str, Any] | None:
        ahead = _Ahead(state.progress, len(updates))
        rates = [_rates(state, store, at) for at in ahead] if store.optim.scheduled else [_rates(state, store, ahead.at)] * len(ahead)
        return self.graph.take(store, updates, _Keys(state.seed, ahead), rates=rates, ahead=ahead)

    def _one_by_one(self, state: TrainState, store: Store, updates: list[Any]) -> tuple[Mapping[str, Any], int, int]:
        """What is left at the end of an epoch, and what has no graph; some of it may be skipped."""
        found, done, skipped = list[Mapping[str, Any]](), 0, 0
        for batches in updates:
            at = _ahead(state.progress, done, skipped)
            _rates(state, store, at)
            store.step.begin(at)
            try:
                found.append(self.graph(store, batches, step_key(state.seed, at)))
            finally:
                store.clear_gradients()
            done, skipped = done + (not store.step.skipped), skipped + store.step.skipped
        return join_all(found, [sum(map(num_samples, batches)) for batches in updates]), done, skipped


def _shortened(item: Item, most: int) -> Item:
    """An item of so many batches at most; the others are not taken."""
    batches = item.batches[:most]
    if len(batches) == len(item.batches):
        return item
    at, samples = item.batch - len(item.batches) + most, sum(map(num_samples, batches))
    return attrs.evolve(item, batches=batches, batch=at, last=False, samples=samples, position=None)


def _ahead(at: Progress, steps: int, skipped: int) -> Progress:
    return Progress(
        step=at.step + steps,
        epoch=at.epoch,
        batch=at.batch,
        samples=at.samples,
        seconds=at.seconds,
        epoch_samples=at.epoch_samples,
        skipped=at.skipped + skipped,
        updates=at.updates,
    )


@attrs.frozen(eq=False, repr=False)
class _Ahead(Sequence[Progress]):
    """The progress before each update, made when it is asked for: without schedules and stages nobody does."""

    at: Progress
    updates: int

    def __len__(self) -> int:
        return self.updates

    def __getitem__(self, update: Any) -> Any:
        return _ahead(self.at, range(self.updates)[update], 0)


@attrs.frozen(eq=False, repr=False)
class _Keys(Sequence[int]):
    """The key of each update, computed when it is asked for: a graph that draws nothing needs none, and a compiled one the first."""

    seed: int
    ahead: Sequence[Progress]

    def __len__(self) -> int:
        return len(self.ahead)

    def __getitem__(self, update: Any) -> Any:
        return step_key(self.seed, self.ahead[update])


def _rates(state: TrainState, store: Store, at: Progress) -> list[Any]:
    """The learning rate of each group at some progress."""
    optim = store.optim
    if optim.scheduled:
        set_lr(optim, at, state.history)
    return [group.get("lr") for group in optim.optimizer.param_groups] if optim.optimizer is not None else []
