"""Evaluation: every batch of a loader once, in eval mode and without gradients; the state is not changed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fnlight.data import Part, Share, Source
from fnlight.errors import ConfigError, StepError, check_type
from fnlight.metrics import MEDIA, Tally, parted, put_states, read_in_order, read_torchmetrics, states_of, updates
from fnlight.optim import weights_to_use
from fnlight.runtime import A_SIGNALS, Signals
from fnlight.state import A_STATE, Store, TrainState
from fnlight.tensors import (
    EVALUATE,
    buffers_of,
    check_context,
    fold_in,
    is_sharded,
    isolated,
    local,
    parameters_of,
    seed_generators,
)

EvalStep = Callable[[Any, Any], Mapping[str, Any]]


def evaluate(
    state: TrainState,
    loader: Any,
    *,
    eval_step: EvalStep | None = None,
    weights: str | None = None,
    limit: int | float | None = None,
    signals: Signals | None = None,
) -> dict[str, float]:
    """Evaluate a state on a loader: a plain metric counts with the samples of its batch, so a mean over a batch becomes the exact mean over the data.

    For a state on several ranks, all ranks must call it. Each batch is evaluated by one rank, and all get the result of a single process.

    Args:
        state: The state to evaluate; it is not changed, see `inference`.
        loader: A loader, or a mapping of named loaders, whose metrics are then called ``NAME/metric``.
        eval_step: ``(model, batch) -> metrics``; None uses the task's.
        weights: The name of the averaged weights to use, such as ``"ema"``; None uses the parameters (for a schedule-free optimizer, the
            averaged ones).
        limit: The largest number of batches (int), or a fraction of them (float).
        signals: The signal handlers, or None; a signal ends the evaluation without a result.

    Returns:
        Names to floats.

    Raises:
        ConfigError: If there is no `eval_step`, or no averaged weights of that name.
        Interrupted: If a signal came.
        StepError: If `eval_step` returns no metrics.

    Example:
        >>> from fnlight.metrics import Mean
        >>> from fnlight.state import Task
        >>> task = Task(nn.Linear(1, 1), lambda model, batch: model(batch).sum(),
        ...             lambda model, batch: {"mean": Mean(batch.sum(), len(batch))},
        ...             configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        >>> evaluate(TrainState.create(task), [torch.ones(3, 1), torch.zeros(1, 1)])
        {'mean': 0.75}
    """
    fn = step_of(state, "eval_step", eval_step)
    check_type("evaluate(signals=...)", signals, Signals | None, A_SIGNALS)
    check_context("evaluate(...)", state.device, trains=False)
    with isolated(state.device), nullcontext() if (place := state.store.place) is None else place.everyone.waiting("in an evaluation"):
        found = evaluate_sources(state, sources_of(loader, state.device, limit, place), fn, weights=weights, signals=signals)
    return {name: value for name, value in found.items() if not isinstance(value, MEDIA)}


def sources_of(loader: Any, device: torch.device, limit: int | float | None = None, place: Any = None) -> dict[str, Source]:
    """Prepare the loaders of an evaluation, once for many evaluations.

    Args:
        loader: A loader, or a mapping of named loaders.
        device: The device that batches are moved to.
        limit: The largest number of batches (int), or a fraction of them (float).
        place: The placement of the state on several ranks; each rank then gets its share of the batches.

    Returns:
        Names to sources; a single loader has the name ``""``.

    Example:
        >>> sorted(sources_of({"a": [1], "b": [2]}, torch.device("cpu")))
        ['a', 'b']
    """
    loaders = loader if isinstance(loader, Mapping) else {"": loader}
    share = None if place is None else Share(place.world, whole=True, lockstep=place.lockstep)
    return {name: Source.of(each, limit=limit, device=device, share=share) for name, each in loaders.items()}


def evaluate_sources(
    state: TrainState, sources: Mapping[str, Source], fn: EvalStep, weights: str | None, signals: Signals | None = None
) -> dict[str, Any]:
    """Evaluate on prepared sources; the caller must restore the global generators.

    Args:
        state: The state to evaluate.
        sources: The result of `sources_of`.
        fn: ``(model, batch) -> metrics``.
        weights: The name of the averaged weights to use; None uses the parameters.
        signals: The signal handlers, or None.

    Returns:
        Names to floats, and to media if there are any.

    Raises:
        Interrupted: If a signal came.

    Example:
        >>> from fnlight.state import Task
        >>> state = TrainState.create(Task(nn.Identity(), lambda model, batch: batch.sum()))
        >>> with isolated():
        ...     evaluate_sources(state, sources_of([torch.ones(2)], state.device), lambda model, batch: {"n": batch.sum()}, None)
        {'n': 2.0}
    """
    found, place = dict[str, Any](), state.store.place
    with inference(state.live, weights) as module, nullcontext() if signals is None else signals.together(place is not None):
        if place is not None:
            place.sync(state.store)
        for name, source in sources.items():
            prefix = f"{name}/" if name else ""
            with source.aside(state.progress.epoch):
                scores = _one_source(state, module, source, fn=fn, signals=signals)
            found |= {prefix + metric: value for metric, value in scores.items()}
    return found


def _one_source(state: TrainState, module: nn.Module, source: Source, fn: EvalStep, signals: Signals | None) -> dict[str, Any]:
    key, tally, held = fold_in(state.seed, EVALUATE), Tally(), dict[str, Any]()
    found, place = source.epoch(key, 0), state.store.place
    first, every = (1, 1) if place is None else (1 + place.world.rank, place.world.size)
    for turn, (batch, samples, _) in enumerate(found if signals is None else signals.until(found, place is None or not place.lockstep)):
        i = first + turn * every

        def taken(batch: Any, i: int = i) -> tuple[Any, dict[str, Any]]:
            seed_generators(fold_in(key, i), state.device)
            return parted(fn(module, batch))

        if batch.__class__ is Part:
            _left_out(taken, batch.batch, held)
            continue
        metrics, objects = taken(batch)
        if not turn and updates(objects) > 1:  # of before this evaluation, perhaps
            for each in objects.values():
                each.reset()
            metrics, objects = taken(batch)
        _check_metrics(metrics, objects, held if turn else objects, i)
        held = objects
        if metrics:
            tally.add(i, metrics, samples)
        state.store.end_step()
    if signals is not None:
        signals.agreed(signals.number if place is None else int(place.everyone.all_reduce_max([signals.number])[0]))
        signals.check()
    if place is None:
        return {**tally.read(), **read_torchmetrics(held)}
    return {**read_in_order(tally, place.world.gather), **read_torchmetrics(held, place.world.gather)}


def _left_out(taken: Callable[[Any], tuple[Any, dict[str, Any]]], batch: Any, held: Mapping[str, Any]) -> None:
    """Take a batch that is another rank's, to keep step with it: nothing of it counts here."""
    before = states_of(held)
    _, objects = taken(batch)
    if held:
        put_states(held, before)
    for each in () if held else objects.values():
        each.reset()


def _check_metrics(metrics: Any, objects: Mapping[str, Any], before: Mapping[str, Any], i: int) -> None:
    if not isinstance(metrics, Mapping) or not (metrics or objects):
        got = "an empty dict" if isinstance(metrics, Mapping) else type(metrics).__name__
        raise StepError(f"eval_step must return a dict of metrics, but returned {got}, at batch {i} of the evaluation")
    other = sorted({name for name in (*objects, *before) if objects.get(name) is not before.get(name)})
    if other:
        raise StepError(
            f"eval_step must update and return the same torchmetrics objects at every batch, but those of {other} are other ones at batch {i} of "
            "the evaluation; make them once, outside of eval_step"
        )


def step_of(state: TrainState, name: str, given: Any) -> Any:
    """The given function, or else that of the task.

    Args:
        state: Gives the task.
        name: Such as ``"eval_step"``.
        given: A function, or None.

    Returns:
        The function.

    Raises:
        ConfigError: If there is neither.
        TypeError: If it is not a function, or the state is not a `TrainState`.

    Example:
        >>> from fnlight.state import Task
        >>> state = TrainState.create(Task(nn.Identity(), lambda model, batch: batch.sum(), eval_step=max))
        >>> step_of(state, "eval_step", None), step_of(state, "eval_step", min)
        (<built-in function max>, <built-in function min>)
    """
    check_type("the state", state, TrainState, A_STATE)
    fn = given if given is not None else getattr(state.task, name)
    if fn is None:
        raise ConfigError(f"this task has no {name}; give it one, as in fl.Task(model, train_step, {name}={name}, ...)")
    check_type(name, fn, Callable, "a function of model and batch")
    return fn


@contextmanager
def inference(store: Store, weights: str | None = None, *, owned: bool = False) -> Iterator[nn.Module]:
    """The live module in eval mode, without gradients, with averaged weights if named; everything is restored afterwards.

    Everything: weights, the modes of all modules, and buffers that a forward writes to, replaces or fills. Within one evaluation a buffer keeps
    what the batches before have written, as in a plain loop. Modes change through `eval()` and `train()`, both of which a model may override.

    Args:
        store: Holds the module.
        weights: The name of the averaged weights to use; None uses the parameters.
        owned: True for a module that is the caller's own copy: its buffers are not restored.

    Raises:
        ConfigError: If there are no averaged weights of that name.

    Example:
        >>> store = Store(nn.Dropout(), type("No", (), {"optimizer": None})(), {})
        >>> with inference(store) as module:
        ...     module.training
        False
        >>> store.module.training
        True
    """
    store.free_gradients()  # more free memory for the evaluation
    module, modes = store.module, [(m, m.training) for m in store.module.modules()]
    average = weights_to_use(store.optims.values(), module) if weights is None else average_of(store, weights)
    targets = named_tensors(module) if average else {}
    raw = {name: local(targets[name]).clone() if is_sharded(targets[name]) else targets[name].data for name in average}
    kept: list[_Kept] = []
    try:
        with torch.no_grad():
            for name, value in average.items():
                _put(targets[name], value)
            kept += [] if owned else _kept(module)  # after the averaged weights: these are what eval() may write to
            module.eval()
            yield module
    finally:
        if store.place is not None:
            store.place.rest(module)
        with torch.no_grad():
            _set_modes(modes)
            for each in kept:
                each.put_back()
            for name, value in raw.items():
                _put(targets[name], value)


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Give each module its mode by a call of its `train`, those that contain others first."""
    for m, training in modes:
        if m.training != training:
            m.train(training)
    for m, training in modes:
        m.training = training


@attrs.frozen(eq=False)
class _Kept:
    """The tensors of one module's dict, and copies of those that a forward can write to."""

    entries: dict[str, Any]
    before: dict[str, Any]
    copies: list[tuple[Tensor, Tensor, Tensor]]

    def put_back(self) -> None:
        """Let the dict hold the same tensors with the same values again."""
        for tensor, memory, value in self.copies:
            if not is_sharded(tensor):
                tensor.data = memory  # a forward may have assigned to `.data`
            memory.copy_(value)
        if [*map(id, self.entries.values())] != [*map(id, self.before.values())]:
            self.entries.clear()
            self.entries.update(self.before)


def _kept(module: nn.Module) -> list[_Kept]:
    """The buffers; and the parameters of modules with a `train` of their own, such as adapters that merge into a weight."""
    found = [buffers_of(m) for m in module.modules()]
    found += [parameters_of(m) for m in module.modules() if _overrides_mode(m)]
    return [
        _Kept(entries, dict(entries), [_copy_of(t) for t in entries.values() if t is not None and _is_writable(t)]) for entries in found
    ]


def _overrides_mode(m: nn.Module) -> bool:
    return type(m).train is not nn.Module.train or type(m).eval is not nn.Module.eval


def _copy_of(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    memory = local(tensor).detach() if is_sharded(tensor) else tensor.data
    return tensor, memory, memory.clone()


def _is_writable(tensor: Tensor) -> bool:
    """Say whether torch writes to it in place: not where elements share memory, nor to one of inference mode."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_inference():
        return False
    return all(stride or size < 2 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _put(target: Tensor, value: Tensor) -> None:
    """Make a tensor share the data of another one; for a sharded tensor, whose address torch keeps, copy the values."""
    if is_sharded(target):
        with torch.no_grad():
            local(target).copy_(local(value))
    else:
        target.data = value if value.dtype == target.dtype else value.to(target.dtype)  # averages of halves are kept in float32


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module by name, live.

    Args:
        module: Any module.

    Returns:
        Names to tensors.

    Example:
        >>> list(named_tensors(nn.BatchNorm1d(1)))
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def average_of(store: Store, weights: str | None) -> dict[str, Tensor]:
    """The averaged weights of a name in `memory`: tensors by parameter name, or a dict that holds them as ``"weights"``.

    Args:
        store: Holds the memory.
        weights: The name; None means the parameters themselves.

    Returns:
        Names to tensors, live; empty where the parameters are to be used.

    Raises:
        ConfigError: If there are no averaged weights of that name.

    Example:
        >>> store = Store(nn.Linear(1, 1), type("No", (), {"optimizer": None})(), {"swa": {"count": 0, "weights": {}}})
        >>> average_of(store, "swa"), average_of(store, None)
        ({}, {})
    """
    if weights is None:
        return {}
    check_type("weights", weights, str, 'the name of averaged weights, such as "ema", or None')
    known = named_tensors(store.module).keys()
    found = {
        key: tree for key in store.memory if (tree := _tensors_of(store.memory[key], not store.named)) is not None and tree.keys() <= known
    }
    if weights not in found:
        raise ConfigError(
            f"weights={weights!r} names averaged weights, but the state has {sorted(found) or 'none'}; train with fl.ema(decay) or FitConfig(ema=...)"
        )
    return found[weights]


def _tensors_of(tree: Any, bare: bool) -> dict[str, Tensor] | None:
    nested = tree.get("weights") if isinstance(tree, dict) else None
    if isinstance(nested, dict):
        return nested
    return tree if isinstance(tree, dict) and (tree or bare) and all(isinstance(t, Tensor) for t in tree.values()) else None
