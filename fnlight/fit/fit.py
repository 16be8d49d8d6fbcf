"""`fit`: resume, compose, check, run."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import attrs

from fnlight.checkpoint import STATE, Folder, checkpoints, held, newest, refuse_links, restore
from fnlight.data import Sharded, Source, check_data, kept_by, length_of, placed, without_digests
from fnlight.errors import BrokenCheckpointError, CheckpointWarning, ConfigError, TaskWarning, check_type, warn
from fnlight.fit.compose import compose, loaders_of, settings, text_of, train_source
from fnlight.fit.config import FitConfig
from fnlight.fit.preflight import preflight
from fnlight.loop import run
from fnlight.parallel import World, alone, check_same, ddp, join, placed_on
from fnlight.precision import to_fp8
from fnlight.runtime import Signals
from fnlight.state import A_STATE, TrainState
from fnlight.tensors import check_context, default_device, existing
from fnlight.triggers import epochs

_TURN = threading.RLock()  # of the process; one that a thread has it may take again, for a fit within a sink or a rule


def fit(state: TrainState, loaders: Any, config: FitConfig) -> TrainState:
    """Train a state on loaders with a configuration, and return the final state.

    One `fit` runs at a time in a process: one in another thread waits for it, with a warning. One within a sink or a rule runs at once.

    Args:
        state: The state to start from; it is not changed, unless ``config.donate``.
        loaders: `Loaders`, or just a training loader.
        config: The configuration.

    Returns:
        The final state. Its `stopped` says why the run ended, and its `history` prints as a table.

    Raises:
        ConfigError: If state, loaders and configuration do not fit together; raised before any work starts.
        LoaderError: If a loader is missing or empty.
        StepError: If a step function returns a value of the wrong kind.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fnlight.state import Task
        >>> task = Task(nn.Linear(1, 1), lambda model, batch: (model(batch) - batch).square().mean(),
        ...             configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        >>> data = [torch.ones(2, 1), torch.zeros(2, 1)]
        >>> state = fit(TrainState.create(task, seed=0), data, FitConfig(max_epochs=3, progress=False))
        >>> state
        TrainState(step=6, epoch=3, batch=0, 2 parameters, SGD, stopped: 3 epochs done)
    """
    check_type("fit(state, ...)", state, TrainState, A_STATE)
    check_type("fit(..., config)", config, FitConfig, "a FitConfig")
    check_context("fit(...)", state.device)
    began = time.perf_counter()
    with _turn():
        return _fitted(state, loaders, config, began)


def _fitted(state: TrainState, loaders: Any, config: FitConfig, began: float) -> TrainState:
    given = loaders_of(loaders)
    config = _dev_run(state, config) if config.fast_dev_run else config
    train, given_place = train_source(given, config), state.store.place
    with _together(state, config, train) as (state, place, donate):
        writes = place is None or place.writes
        with _listening(config, place) as signals, held(config.dir if writes else None) as locks:
            state = _placed(_counted(_resumed(state, config, donate), train, config), config)
            with settings(config):
                state = _converted(state, config)
                step = compose(state.task, config, given, signals)
                preflight(state, given, config, step=step, signals=signals)
                if writes:
                    _write_config(config)
                state.store.run.resources.update(locks)
                state.store.wall_time.begin(time.perf_counter, began)
                state = _drain(run(step, state, train, donate=True, signals=signals))
        return state if place is None or given_place is not None else alone(state)


@contextmanager
def _turn() -> Iterator[None]:
    """Wait until no other thread fits: generators of random numbers, the default dtype and the settings of kernels are those of the process."""
    if not _TURN.acquire(blocking=False):
        warn(
            "another thread of this process is in fl.fit, whose random numbers and settings are those of the process: this one waits until it has ended; "
            "to run several at once, start a process for each",
            TaskWarning,
        )
        _TURN.acquire()
    try:
        yield
    finally:
        _TURN.release()


@contextmanager
def _together(state: TrainState, config: FitConfig, train: Source) -> Iterator[tuple[TrainState, Any, bool]]:
    """The state on all ranks that train together, the placement, and whether the state may be donated."""
    place, donate = state.store.place, config.donate
    before = World() if place is None else place.everyone
    with join() if config.parallel == "auto" and place is None else nullcontext(before) as world:
        if world.size > 1:
            own = isinstance(train.loader, Sharded)
            samples = None if own else length_of(getattr(train.loader, "dataset", None))
            with world.waiting("before the first step"):
                check_same(world, state, batches=None if own else train.num_batches, samples=samples, config=text_of(config))
                if place is None:
                    state, donate = placed_on(state if donate else state.copy(), ddp()), True
        yield state, state.store.place, donate


@contextmanager
def _listening(config: FitConfig, place: Any) -> Iterator[Signals | None]:
    """The signal handlers, or None; with several ranks, a signal to one rank ends all of them."""
    with Signals(deadline=config.signals_deadline) if config.signals else nullcontext() as signals:
        if signals is not None and place is not None:
            signals.shared = True
        yield signals


def _dev_run(state: TrainState, config: FitConfig) -> FitConfig:
    n = int(config.fast_dev_run)
    return attrs.evolve(
        config, max_epochs=state.progress.epoch + 1, max_steps=None, max_time=None, stop=None, min_epochs=0, min_steps=0,
        limit_train=n, overfit_batches=0, limit_eval=n, eval_every=epochs(1), sanity_batches=0,
        dir=None, debug_bundle=False, profile_steps=None, max_nonfinite=None if config.nonfinite == "rollback" else config.max_nonfinite,
        nonfinite="raise" if config.nonfinite == "rollback" else config.nonfinite, save_every=epochs(1), permanent=None, save_in_background=True, keep=attrs.fields(FitConfig).keep.default, sinks=(), log_times=False, log_every=attrs.fields(FitConfig).log_every.default,
    )  # fmt: skip


def _resumed(state: TrainState, config: FitConfig, donate: bool) -> TrainState:
    """The state to start from: the newest checkpoint's or the given one; it may be donated in either case."""
    place = state.store.place
    found = _kept(config.dir, config.resume and place is None) if config.dir is not None and (place is None or place.writes) else None
    if place is not None:
        found = place.everyone.gather(found)[0]  # one rank looks, so that all resume from the same checkpoint
    if found is not None and not config.resume:
        raise ConfigError(
            f"{config.dir} already holds a run, up to {os.path.basename(found)}; resume it with FitConfig(resume=True), or give another dir"
        )
    if found is not None:
        resumed = restore(found, state, allow=[each for each in config.allow if each not in ("batch_size", "data")], rename=config.rename)
        if resumed.seed != state.seed:
            warn(
                f"the run in {config.dir} has seed {resumed.seed}, which sets its data order, but the given state has {state.seed}; {resumed.seed} is used",
                CheckpointWarning,
            )
        if resumed.stopped is None:
            resumed.store.wall_time.lose(_age(dict(checkpoints(found)).get(resumed.progress.step, found)))
        return resumed
    broken = checkpoints(config.dir) if config.dir is not None and (place is None or place.writes) else []
    if broken:
        raise BrokenCheckpointError(
            f"none of the {len(broken)} checkpoints in {config.dir} is valid, so the run cannot be resumed, and a new run there would overwrite "
            "them; see what is wrong with fl.verify(path), restore them from a copy, or give another dir"
        )
    return state if donate else state.copy()


def _kept(dir: str, once: bool) -> str | None:
    """The newest valid checkpoint; with `once`, the directory itself: `restore` then finds the checkpoint and reads its files only once."""
    return (dir if checkpoints(dir) else None) if once else newest(dir)


def _age(path: str) -> float:
    """Seconds since a checkpoint was written; 0 in a remote store, whose clock differs, and where the file is missing."""
    written = os.path.join(path, STATE)
    return time.time() - os.path.getmtime(written) if os.path.exists(written) else 0.0


def _counted(state: TrainState, train: Source, config: FitConfig) -> TrainState:
    """The state, its place in the epoch counted in batches of today's size."""
    before, kept = state.progress, state.memory.get("loader", {})
    if "data" in config.allow and kept:
        state.store.memory["loader"] = without_digests(kept)
    check_data(train, kept_by(state))
    after = placed(train, before, earlier="batch_size" in config.allow)
    if after.samples != before.samples:
        warn(
            f"the batch size differs from that of the saved state: the run goes back from sample {before.epoch_samples} of epoch "
            f"{before.epoch} to sample {after.epoch_samples}, where a batch of the new size ends, and trains on the samples between them twice",
            CheckpointWarning,
        )
    return state if after is before else attrs.evolve(state, progress=after)


def _placed(state: TrainState, config: FitConfig) -> TrainState:
    if config.device == "auto" and state.device.type != "cpu":
        return state  # the user moved it there
    device = default_device() if config.device == "auto" else existing(config.device)
    if device.type == state.device.type and device.index in (None, state.device.index):
        return state
    return state.moved(device)


def _converted(state: TrainState, config: FitConfig) -> TrainState:
    """The same state; with ``precision="fp8"``, its linear layers are converted to fp8 in place."""
    if config.precision == "fp8":
        store = state.store
        store.module = to_fp8(store.module)
        if store.device.type != "cuda":
            raise ConfigError(
                f"FitConfig(precision='fp8') needs a GPU, but the state is on {store.device}; train on a GPU, or give precision='bf16'"
            )
        for phase in store.phases.values():
            phase.module = store.module
    return state


def _write_config(config: FitConfig) -> None:
    if config.dir is None or "://" in config.dir:
        return
    text, path = text_of(config), os.path.join(config.dir, "config.json")
    if text is None:  # the file of an earlier part of the run would be wrong now
        with suppress(FileNotFoundError):
            os.remove(path)
        return
    os.makedirs(config.dir, exist_ok=True)
    refuse_links(config.dir, "config.json")
    Folder(config.dir).rewrite("config.json", f"{text}\n".encode())


def _drain(steps: Iterator[Any]) -> TrainState:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
