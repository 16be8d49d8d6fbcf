"""Averaged weights, kept in ``state.memory`` in addition to the weights.

`ema` and `swa` average during a run; evaluations and predictions use the average by name, as ``weights="ema"``, and a checkpoint holds
both. `averaged` and `average_checkpoints` give states whose parameters are an average, and `refresh_batch_norm` recomputes the BatchNorm
statistics for them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fnlight.checkpoint import checkpoints, load_weights
from fnlight.data import Source
from fnlight.errors import CheckpointError, ConfigError, check_type
from fnlight.loop import average_of, inference, named_tensors
from fnlight.optim import Optim
from fnlight.pipe import Combinator
from fnlight.state import A_STATE, Store, TrainState
from fnlight.step.update import Update
from fnlight.tensors import BATCH_NORMS, EVALUATE, assign, fold_in, foreach_lerp_, isolated, local_parts, seed_generators
from fnlight.triggers import Tick, condition, epochs, steps

Decay = float | Callable[[int], float]


@attrs.frozen(repr=False)
class _Warmup:
    """The result of `ema_warmup`."""

    decay: float
    offset: float

    def __call__(self, step: int) -> float:
        """The decay after this number of completed steps."""
        return min(self.decay, (1 + step) / (self.offset + step))

    def __repr__(self) -> str:
        return f"ema_warmup({self.decay}, {self.offset})" if self.offset != 10 else f"ema_warmup({self.decay})"


def ema_warmup(decay: float, offset: float = 10) -> Callable[[int], float]:
    """A decay for `ema` that rises with the completed steps n as ``(1 + n) / (offset + n)``, up to `decay`.

    Args:
        decay: What it comes to, in 0..1.
        offset: How slowly it rises, at least 1; with 10 it is 0.9 after 80 steps and 0.99 after 890.

    Returns:
        A function of completed steps.

    Raises:
        ConfigError: If the decay is not between 0 and 1, or the offset below 1.

    Example:
        >>> [round(ema_warmup(0.99)(n), 3) for n in (1, 80, 10_000)]
        [0.182, 0.9, 0.99]
    """
    _check_decay("ema_warmup", decay)
    if not isinstance(offset, int | float) or isinstance(offset, bool) or not 1 <= offset < float("inf"):
        raise ConfigError(f"ema_warmup's offset must be a number of at least 1, but got {offset!r}")
    return _Warmup(decay, offset)


def ema(decay: Decay, name: str = "ema", *, every: Callable[[Tick], bool] = steps(1)) -> Combinator:
    """Keep an exponential moving average of the parameters in ``state.memory``, complex ones too; in float32 for 16-bit and 8-bit floats.

    Buffers, such as the statistics of BatchNorm, are not averaged: an evaluation of the average uses those of the model.

    Args:
        decay: The decay of each update, in 0..1: ``average = decay * average + (1 - decay) * params``; or a function of completed steps,
            such as ``ema_warmup(0.999)``.
        name: Its key in ``state.memory``; `evaluate` and `predict` use it as ``weights="ema"``.
        every: When the average is updated, such as ``steps(10)``; the decay then applies once per 10 steps.

    Returns:
        A combinator from `Step` to `Step`.

    Raises:
        ConfigError: If the decay is not between 0 and 1.

    Example:
        >>> print(ema(0.999))
        ema(0.999)
        >>> print(ema(ema_warmup(0.999), every=steps(10)))
        ema(ema_warmup(0.999), every=steps(10))

    References:
        Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992).
    """
    if not callable(decay):
        _check_decay("ema", decay)
    due, always = condition(every, "ema(every=...)"), every == steps(1)

    def rest(decay: Callable[[int], float], live: Store) -> float:
        return 1 - decay(live.step.progress.step + 1)

    def average(store: Store) -> None:
        share = store.host.number(store, partial(rest, decay)) if callable(decay) else 1 - decay
        _towards(store.memory[name], store.named, share)

    def wrap(step: Any) -> Any:
        if isinstance(step, Update) and always:
            return step.then(average, name)

        def averaging(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
            before = state.progress
            state, metrics = step(state, batch)
            if due(Tick(before, state.progress)):
                share = 1 - (decay(state.progress.step) if callable(decay) else decay)
                _towards(state.store.memory[name], state.store.named, share)
            return state, metrics

        return averaging

    label = f"{decay}" + ("" if name == "ema" else f", {name!r}") + ("" if always else f", every={every}")
    return Combinator("ema", wrap, "step", "step", args=label, key=name, facts={"every": every}, init=_floating, phase="update")


def swa(start: int, every: Callable[[Tick], bool] = epochs(1), name: str = "swa") -> Combinator:
    """Keep the mean of the parameters at the times of a trigger, from some epoch on.

    Before the first time, ``weights="swa"`` means the parameters themselves. Buffers are not averaged; if the model has BatchNorm, call
    `refresh_batch_norm` on the final state. The learning rate schedule is set separately: high and constant from `start` on, or cyclic.

    Args:
        start: The number of completed epochs after which averaging starts.
        every: When the parameters are added to the mean.
        name: The key of the mean in ``state.memory``; `evaluate` and `predict` use it as ``weights="swa"``.

    Returns:
        A combinator from `Step` to `Step`.

    Raises:
        ConfigError: If `start` is not a number of epochs.

    Example:
        >>> print(swa(start=5))
        swa(start=5, every=epochs(1))

    References:
        Izmailov et al., "Averaging weights leads to wider optima and better generalization" (2018).
    """
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise ConfigError(f"swa(start=...) must be completed epochs, a whole number of at least 0, but got {start!r}")
    due = condition(every, "swa(every=...)")

    def count(store: Store) -> None:
        tree = store.memory[name]
        tree["count"] += 1
        if tree["count"] == 1:
            tree["weights"] = _floating(store)
        else:
            _towards(tree["weights"], store.named, 1 / tree["count"])

    def wrap(step: Any) -> Any:
        def averaging(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
            before = state.progress
            state, metrics = step(state, batch)
            if state.progress.epoch >= start and due(Tick(before, state.progress)):
                count(state.store)
            return state, metrics

        return averaging

    label = f"start={start}, every={every}" + ("" if name == "swa" else f", {name!r}")
    init: Callable[[Store], Any] = lambda store: {"count": 0, "weights": {}}  # noqa: E731  # too short for a name
    return Combinator("swa", wrap, "step", "step", args=label, key=name, init=init, phase="update")


def _floating(store: Store) -> dict[str, Tensor]:
    found = {n: p.detach().clone().to(_wide(p.dtype)) for n, p in store.named.items() if p.is_floating_point() or p.is_complex()}
    store.end_step()  # on a lazy device a clone shares memory until then (`to(copy=True)` for ever), and the next step would overwrite it
    return found


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What an average is kept in: with the few digits of a half or an 8-bit float, small changes would be rounded away."""
    if dtype.is_complex:
        return torch.complex64 if dtype == torch.complex32 else dtype
    return torch.float32 if dtype.itemsize < 4 else dtype


def _towards(averages: Mapping[str, Tensor], named: Mapping[str, Tensor], fraction: float | Tensor) -> None:
    """Move averages towards the parameters by a fraction; matched by name, since files do not keep the order."""
    values = list(averages.values())
    if not values:
        return
    try:
        targets = [named[n] for n in averages]
    except KeyError:  # refresh_batch_norm has added statistics to the averaged weights
        values, targets = [v for n, v in averages.items() if n in named], [named[n] for n in averages if n in named]
    with torch.no_grad():
        targets = [t if t.dtype == v.dtype else t.to(v.dtype) for t, v in zip(targets, values, strict=True)]
        if isinstance(fraction, Tensor):  # a number of a graph
            foreach_lerp_(values, targets, [fraction.to(v.dtype) for v in values])
        else:
            foreach_lerp_(local_parts(values), local_parts(targets), fraction)


def _check_decay(who: str, decay: Any) -> None:
    if not isinstance(decay, int | float) or isinstance(decay, bool) or not 0 <= decay < 1:
        raise ConfigError(f"{who} must be a decay of at least 0 and below 1, but got {decay!r}")


def averaged(state: TrainState, weights: str = "ema") -> TrainState:
    """A state whose parameters are an average: to export it, or to train on from it.

    Args:
        state: Holds the average in `memory`; it is not changed.
        weights: The name of the average, such as ``"ema"`` or ``"swa"``.

    Returns:
        A copy; only the parameters, and buffers that were computed for the average, differ from the state.

    Raises:
        ConfigError: If there is no average of that name.

    Example:
        >>> from fnlight.state import Task
        >>> state = TrainState.create(Task(nn.Linear(1, 1), lambda model, batch: model(batch).sum()))
        >>> state.store.memory["ema"] = {"weight": torch.full((1, 1), 0.5)}
        >>> averaged(state).params["weight"].item()
        0.5
    """
    check_type("averaged(state, ...)", state, TrainState, A_STATE)
    state = state.copy()
    targets = named_tensors(state.store.module)
    with torch.no_grad():
        for name, value in average_of(state.store, weights).items():
            assign(targets[name], value)
    return state


def refresh_batch_norm(
    state: TrainState, loader: Any, *, weights: str | None = None, forward: Any = None, limit: int | float | None = None
) -> TrainState:
    """Recompute the running statistics of BatchNorm, as exact means over the batches of a loader.

    The statistics from training belong to the weights during training, not to an average of them. Layers in eval mode keep their
    statistics; the other modules are in the mode of training.

    Args:
        state: The state; it is not changed.
        loader: Training data.
        weights: The average to compute the statistics for, such as ``"swa"``; they are stored with it. None uses the parameters.
        forward: ``(model, batch) -> anything``, called for its forward pass; None uses the task's `train_step`.
        limit: The largest number of batches (int), or a fraction of them (float).

    Returns:
        A copy of the state with the statistics.

    Raises:
        ConfigError: If no layer updates statistics, or there is no average of that name.

    Example:
        >>> from fnlight.state import Task
        >>> state = TrainState.create(Task(nn.BatchNorm1d(1), lambda model, batch: model(batch).sum()))
        >>> refresh_batch_norm(state, [torch.full((2, 1), 3.0)]).buffers["running_mean"].item()
        3.0
    """
    check_type("refresh_batch_norm(state, ...)", state, TrainState, A_STATE)
    check_type("refresh_batch_norm(forward=...)", forward, Callable | None, "a function of model and batch, or None for train_step")
    state = state.copy()
    store, fn = state.store, forward if forward is not None else state.task.train_step
    norms = {n: m for n, m in store.module.named_modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats and m.training}
    if not norms:
        raise ConfigError("refresh_batch_norm found no BatchNorm layer in training mode, so there are no statistics to compute")
    modes, before = [(m, m.training) for m in store.module.modules()], {n: b.clone() for n, b in store.module.named_buffers()}
    with isolated(state.device), inference(store, weights) as module:
        for m, training in modes:
            m.training = training
        _measure(state, module, norms, fn=fn, source=Source(loader, limit=limit, device=state.device))
        measured = {f"{n}.{b}".lstrip("."): value.clone() for n, m in norms.items() for b, value in m.named_buffers(recurse=False)}
    for name, buffer in store.module.named_buffers():
        buffer.copy_(before[name] if weights is not None else measured.get(name, before[name]))
    if weights is not None:
        average_of(store, weights).update(measured)
    return state


def _measure(state: TrainState, module: nn.Module, norms: Mapping[str, Any], fn: Any, source: Source) -> None:
    momenta, key = [m.momentum for m in norms.values()], fold_in(state.seed, EVALUATE)
    for m in norms.values():
        m.reset_running_stats()
        m.momentum = None  # a mean over batches, each with the same weight
    try:
        for i, (batch, _, _) in enumerate(source.epoch(key, 0), 1):
            seed_generators(fold_in(key, i), state.device)
            fn(module, batch)
    finally:
        for m, momentum in zip(norms.values(), momenta, strict=True):
            m.momentum = momentum


def average_checkpoints(state: TrainState, paths: Any, *, last: int | None = None) -> TrainState:
    """The mean of the weights of several checkpoints, read one after the other: a "soup".

    Floating-point and complex parameters and buffers are averaged, in float64 and complex128; other buffers come from the last of the checkpoints. Where the model has
    BatchNorm, give the result to `refresh_batch_norm`.

    Args:
        state: Gives the task, and everything but the weights; it is not changed.
        paths: A run's directory, or a sequence of checkpoints; or URLs.
        last: Average only this number of the latest ones; None averages all.

    Returns:
        A copy of the state with the mean as its weights.

    Raises:
        CheckpointError: If there are fewer than `last` checkpoints, or none.
        MismatchError: If a checkpoint holds weights of other names or shapes.
        BrokenCheckpointError: If a file is damaged.

    Example:
        >>> import tempfile
        >>> from fnlight.checkpoint import save
        >>> from fnlight.state import Task
        >>> state = TrainState.create(Task(nn.Linear(1, 1), lambda model, batch: model(batch).sum()))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = [save(state, f"{folder}/{i}") for i in range(2)]
        ...     mean = average_checkpoints(state, paths)
        >>> torch.equal(mean.params["weight"], state.params["weight"])
        True

    References:
        Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models" (2022).
    """
    check_type("average_checkpoints(state, ...)", state, TrainState, A_STATE)
    if last is not None and (not isinstance(last, int) or isinstance(last, bool) or last < 1):
        raise ConfigError(f"average_checkpoints(last=...) must be a whole number of at least 1, or None for all, but got {last!r}")
    every = list(paths) if isinstance(paths, list | tuple) else [path for _, path in checkpoints(paths)]
    if len(every) < (last or 1):
        raise CheckpointError(
            f"average_checkpoints(last={last}) found {len(every)} checkpoints in {paths!r}; keep more, as in keep=fl.last(5)"
        )
    chosen = every if last is None else every[-last:]
    part = attrs.evolve(state, store=Store(state.module(), Optim(None), {}), version=0)
    sums: dict[str, Tensor] = {}
    for path in chosen:
        part, _ = load_weights(part, path)
        for name, tensor in named_tensors(part.store.module).items():
            if tensor.is_floating_point() or tensor.is_complex():
                exact = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
                sums[name] = sums[name] + exact if name in sums else exact
    state, found = state.copy(), named_tensors(part.store.module)
    with torch.no_grad():
        for name, tensor in named_tensors(state.store.module).items():
            assign(tensor, sums[name] / len(chosen) if name in sums else found[name].detach())
    return state
