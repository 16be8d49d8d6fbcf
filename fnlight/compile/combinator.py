"""`compile`: a step whose whole kernel, from the forward pass to the averaged weights, is one graph."""

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from fnlight.combinator import Combinator
from fnlight.compile.program import Bound, Program
from fnlight.compile.shadow import UnsettledError, UntraceableError, held
from fnlight.compile.trace import Call, trace
from fnlight.data import Item
from fnlight.errors import CompileWarning, ConfigError, SeamError
from fnlight.gradients import join_metrics
from fnlight.optim import set_lr
from fnlight.state import Progress, Store, TrainState
from fnlight.tree import leaves
from fnlight.update import Update

Level = Literal["trace", "step", "model"]

_LEVELS = ("trace", "step")
_MOST = 16  # graphs of one step: who needs more changes something all the time
_FOR_COMPILERS = {"fused": False, "foreach": False, "capturable": True}


def compile(level: Level = "step", *, unroll: int = 1, cache_dir: str | None = None) -> Combinator:
    """Make one graph of the whole update: forward, backward, what is done to gradients, the optimizer, averaged weights.

    - ``"trace"``: the operations in a row, without the Python between them: bitwise the eager step, and on small models twice as fast.
    - ``"step"``: that graph compiled by torch's compiler.
    - ``"model"``: only the model's forward pass, with its backward pass, by ``torch.compile``; it stands in front of `grad`.

    Each shape of batch has a graph of its own. What cannot be traced goes on at the next level below, with one `CompileWarning` that says why.

    Args:
        level: How much is compiled.
        unroll: Updates in one call, with the means of their metrics; a state stands behind all of them. At the end of an epoch fewer are made.
        cache_dir: Where compiled code is kept for other processes; None leaves it where torch has it.

    Returns:
        A combinator; it stands directly behind `apply` and what adds to its kernel, such as `ema`.

    Raises:
        ConfigError: If a level is unknown, or `unroll` does not fit.

    Example:
        >>> print(compile("step", unroll=4))
        compile('step', unroll=4)

    References:
        Ansel et al., "PyTorch 2: faster machine learning through dynamic Python bytecode transformation and graph compilation" (2024).
    """
    if level not in (*_LEVELS, "model"):
        raise ConfigError(f"compile takes one of the levels 'trace', 'step' and 'model', but got {level!r}")
    if not isinstance(unroll, int) or isinstance(unroll, bool) or unroll < 1 or (unroll > 1 and level == "model"):
        raise ConfigError(f"compile(unroll=...) must be a number of updates >= 1, and 1 at level 'model', but got {unroll!r}")
    label = repr(level) + (f", unroll={unroll}" if unroll > 1 else "")
    if level == "model":
        return Combinator("compile", _compiled_model, "loss", "loss", args=label)

    def wrap(step: Any) -> Any:
        if not isinstance(step, Update):
            raise SeamError(
                f"compile({label}) makes one graph of an update, so it must stand directly behind apply() and ema(), "
                "but something else stands between, which it should be moved in front of, or the step has several optimizers"
            )
        return Compiled(step, level, unroll, cache_dir)

    return Combinator("compile", wrap, "step", "step", args=label, phase="update", repeats=unroll)


def _compiled_model(loss_fn: Any) -> Any:
    made: dict[str, Any] = {}  # for the model of the last call

    def compiled(model: Any, batch: Any) -> Any:
        if made.get("model") is not model:
            made.update(model=model, call=torch.compile(model._call_impl))
        model._compiled_call_impl = made["call"]
        try:
            return loss_fn(model, batch)
        finally:
            model._compiled_call_impl = None

    return compiled


@attrs.frozen(eq=False)
class Compiled:
    """A `Step` whose kernel is a graph, made when it first meets a shape of batch.

    Args:
        update: The eager step.
        level: The level to begin with.
        unroll: Updates in one call.
        cache_dir: Where compiled code is kept.

    Example:
        >>> step = compile("trace")(Update(lambda store, batches, key: {}))
        >>> step.level, step.unroll
        ('trace', 1)
    """

    update: Update
    level: str
    unroll: int = 1
    cache_dir: str | None = None
    _programs: dict[Any, Program | None] = attrs.field(factory=dict, init=False, repr=False)  # of a pure function: what was made for what
    _full: list[bool] = attrs.field(factory=list, init=False, repr=False)  # whether it was said that there are too many
    _bound: dict[str, Bound] = attrs.field(factory=dict, init=False, repr=False)  # the tensors of the store that is at work

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
        """Take the updates of one item; the input state is donated."""
        item = Item.of(batch, state=state)
        store = state.donated()
        size = max(1, (item.group or len(item.batches)) // self.unroll)
        updates = [item.batches[i : i + size] for i in range(0, len(item.batches), size)]
        calls = [updates] if len(updates) == self.unroll else [[each] for each in updates]
        found, done, skipped = list[Mapping[str, Any]](), 0, 0
        for call in calls:
            metrics, left_out = self._take(state, store, call, done, skipped)
            found.append(metrics)
            done, skipped = done + len(call) - left_out, skipped + left_out
        store.skipped = False
        at, after = state.progress, state.advanced(item)
        for bound in self._bound.values():
            bound.version = store.version
        if done != 1 or skipped:
            after = attrs.evolve(after, progress=attrs.evolve(after.progress, step=at.step + done, skipped=at.skipped + skipped))
        return after, reduce(join_metrics, found)

    def _take(self, state: TrainState, store: Store, updates: Sequence[Any], done: int, skipped: int) -> tuple[Mapping[str, Any], int]:
        """Take the updates of one call; say also how many of them were skipped, of which a graph knows nothing."""
        at = attrs.evolve(state.progress, step=state.progress.step + done, skipped=state.progress.skipped + skipped)
        rates = [_rates(state, store, at, ahead) for ahead in range(len(updates))]
        program = self._program(state, store, updates, rates)
        if program is not None:
            keys = [_key(state, attrs.evolve(at, step=at.step + ahead)) for ahead in range(len(updates))]
            return program(self._bind(state, store), keys, rates, updates), 0
        self._bound.clear()  # an optimizer may put other tensors in the place of its own
        found = list[Mapping[str, Any]]()
        for batches in updates:
            _rates(state, store, at, 0)
            store.skipped = False
            try:
                found.append(self.update.kernel(store, batches, _key(state, at)))
            finally:
                for p in store.params:
                    p.grad = None
            at = attrs.evolve(at, step=at.step + (not store.skipped), skipped=at.skipped + store.skipped)
        return reduce(join_metrics, found), at.skipped - skipped - state.progress.skipped

    def _bind(self, state: TrainState, store: Store) -> Bound:
        bound = self._bound.get("store")
        if bound is None or bound.store is not store or bound.version != state.version:
            bound = self._bound["store"] = Bound(store, held(store, self.update.reads), state.version)
        return bound

    def _program(self, state: TrainState, store: Store, updates: Sequence[Any], rates: Sequence[Sequence[Any]]) -> Program | None:
        sign = _signature(state, store, updates, rates)
        if sign not in self._programs:
            if len(self._programs) >= _MOST:
                if not self._full:
                    self._full.append(True)
                    _warn(
                        f"{_MOST} graphs were made, and the next batch differs from all of them: {sign[-1]}; what is new goes on without a graph"
                    )
                return None
            try:
                self._programs[sign] = self._made(store, updates, rates)
            except UnsettledError:
                return None  # an optimizer makes its memory in its first step
        return self._programs[sign]

    def _made(self, store: Store, updates: Sequence[Any], rates: Sequence[Sequence[Any]]) -> Program | None:
        for level in _LEVELS[_LEVELS.index(self.level) :: -1]:
            lowers = level == "step"
            began = time.perf_counter()
            try:
                _check_optimizer(store)
                tensors = held(store, self.update.reads)
                takes = [[isinstance(lr, float) for lr in each] for each in rates]
                call = Call(self.update.kernel, store, self.update.reads, tensors, takes, updates, _FOR_COMPILERS if lowers else {})
                program = Program(trace(call, lowers), takes, lowers)
                if lowers:
                    program.compile(program.inputs(Bound(store, tensors), rates, updates), self.cache_dir)
            except UnsettledError:
                raise
            except UntraceableError as error:
                _warn(f"no graph at level {level!r}: {error}; going on {_BELOW[level]}")
            else:
                logging.getLogger("fnlight").info("compile(%r): %d updates in %.1f s", level, len(updates), time.perf_counter() - began)
                return program
        return None


def _check_optimizer(store: Store) -> None:
    if store.optim.offload:
        raise UntraceableError("the optimizer takes its step on the host")
    keys = sorted({course.key for course in store.optim.courses} - {"lr"})
    if keys:
        raise UntraceableError(f"a schedule changes {', '.join(keys)}, which a graph would freeze")


_BELOW = {"step": "at level 'trace'", "trace": "without a graph"}


def _warn(text: str) -> None:
    warnings.warn(f"compile: {text}", CompileWarning, stacklevel=6)


def _key(state: TrainState, at: Progress) -> int:
    return attrs.evolve(state, progress=at).key


def _rates(state: TrainState, store: Store, at: Progress, ahead: int) -> list[Any]:
    """The learning rates of an update that is so many updates ahead."""
    optim = store.optim
    if optim.scheduled:
        set_lr(optim, attrs.evolve(at, step=at.step + ahead) if ahead else at, state.history)
    return [group.get("lr") for group in optim.optimizer.param_groups] if optim.optimizer is not None else []


def _signature(state: TrainState, store: Store, updates: Sequence[Any], rates: Sequence[Sequence[Any]]) -> Any:
    """All that a graph depends on besides the contents of tensors."""
    optimizer = store.optim.optimizer
    groups = () if optimizer is None else tuple(_values(group) for group in optimizer.param_groups)
    modes = tuple([module.training for module in store.module.modules()])
    return state.task, len(store.params), modes, groups, tuple(isinstance(lr, float) for lr in rates[0]), tuple(map(_described, updates))


def _values(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple([_described(value) for key, value in group.items() if key not in ("params", "lr", "initial_lr")])


def _described(node: Any) -> Any:
    kind = node.__class__
    if kind is Tensor:
        return node.shape, node.dtype, node.device, node.stride()
    if kind is tuple or kind is list:
        return tuple([_described(each) for each in node])
    if node is None or kind in (bool, int, float, str):
        return node
    return tuple([(path, kind is type(leaf) or _described(leaf)) for path, leaf in leaves(node)])
