"""`compile`: the whole update, from the forward pass to averaged weights, as one graph."""

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
    """Make one graph of the whole update: forward, backward, gradient transforms, the optimizer, averaged weights.

    - ``"trace"``: the traced operations without the Python between them: bit-identical to the eager step; twice as fast on small models.
    - ``"step"``: that graph compiled by torch's compiler.
    - ``"graph"``: the operations captured as a CUDA graph, launched as a whole; on a CUDA device only.
    - ``"model"``: only the forward and backward pass of the model, by ``torch.compile``; it comes before `grad`.

    Each batch shape has its own graph. A step that cannot be traced runs at the next lower level, with one `CompileWarning` that says why.

    Args:
        level: How much is compiled.
        unroll: Updates in one call, whose metrics are merged (`Cat` keeps the value of each). A call returns the state after all of them. At
            the end of an epoch a call makes fewer updates.
        cache_dir: Directory of compiled code, for other processes; None takes torch's default.

    Returns:
        A combinator; it comes directly after `apply` or `manual`, and after combinators that add to the same kernel, such as `ema`.

    Raises:
        ConfigError: If a level is unknown, or `unroll` is not valid.

    Example:
        >>> print(compile("step", unroll=4))
        compile('step', unroll=4)

    References:
        Ansel et al., "PyTorch 2: faster machine learning through dynamic Python bytecode transformation and graph compilation" (2024).
    """
    if level not in (*LEVELS, "model"):
        raise ConfigError(f"compile(level) must be 'trace', 'step', 'graph' or 'model', but got {level!r}")
    if not isinstance(unroll, int) or isinstance(unroll, bool) or unroll < 1 or (unroll > 1 and level == "model"):
        raise ConfigError(f"compile(unroll=...) must be a number of updates >= 1, and 1 at level 'model', but got {unroll!r}")
    check_type("compile(cache_dir=...)", cache_dir, str | PathLike | None, "a directory, or None for torch's default")
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
            raise ConfigError(f"compile(unroll={unroll}) needs a step with one optimizer, built by apply(); leave unroll out here")
        raise SeamError(
            f"compile({label}) makes one graph of an update, so it must come directly after apply(), manual() or ema(), but another combinator "
            "is between them; move compile() before it"
        )

    def start(state: TrainState) -> TrainState:
        check_device(level, state.store)
        return state

    def validate(combinators: tuple[Combinator, ...]) -> str | None:
        at = next(i for i, c in enumerate(combinators) if c.name == "compile")
        late = [c for c in combinators[at:] if c.name == "ema" and c.facts.get("every") == steps(1)]
        return (
            f"{late[0]} is after compile({label}) and would average once per call; move it before compile()"
            if late and unroll > 1
            else None
        )

    return Combinator("compile", wrap, "step", "step", args=label, phase="update", repeats=unroll, start=start, validate=validate)


@attrs.define(eq=False, repr=False)
class _CompiledModel:
    """A `LossFn` that calls the compiled form of its model.

    The compiled form of the last model is cached, and both are set in one assignment. It depends only on the model, so two states that
    alternate are each computed correctly, but compile again at every change.
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
    """A `Step` that makes several updates in one call, with one graph.

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
        """Make the updates of one item; the input state is donated."""
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
        """Make updates one by one: the remainder of an epoch, or updates without a graph; some of them may be skipped."""
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
    """An item with at most `most` batches; the others are not taken from the source."""
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
    """The progress before each update, computed on access: only schedules and stages need it."""

    at: Progress
    updates: int

    def __len__(self) -> int:
        return self.updates

    def __getitem__(self, update: Any) -> Any:
        return _ahead(self.at, range(self.updates)[update], 0)


@attrs.frozen(eq=False, repr=False)
class _Keys(Sequence[int]):
    """The key of each update, computed on access: a graph without random numbers needs none, and a compiled graph only the first."""

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
