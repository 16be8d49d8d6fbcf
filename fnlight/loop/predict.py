"""Prediction: every batch of a loader once, in eval mode and without gradients; the state is not changed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import zip_longest
from typing import Any

import attrs

from fnlight.data import Part, Source
from fnlight.errors import ConfigError, check_type
from fnlight.loop.evaluate import average_of, inference, sources_of, step_of
from fnlight.optim import weights_to_use
from fnlight.runtime import A_SIGNALS, Signals
from fnlight.state import Store, TrainState
from fnlight.tensors import PREDICT, fold_in, isolated, map_tensors, seed_generators

_NOTHING: Any = object()


def predict(
    state: TrainState,
    loader: Any,
    *,
    predict_step: Callable[[Any, Any], Any] | None = None,
    weights: str | None = None,
    limit: int | float | None = None,
    donate: bool = False,
    signals: Signals | None = None,
) -> Iterator[Any]:
    """Predict on a loader, one batch at a time: a generator that holds only the current batch.

    For a state on several ranks, rank 1 of 4 gets the outputs of the second batch, the sixth and so on; `collect` gathers all of them.

    Args:
        state: The state to predict with; it is not changed (see `inference`), and can be trained further while predictions are read.
        loader: One loader; for several, call `predict` for each.
        predict_step: ``(model, batch) -> output``; None uses the task's.
        weights: The name of the averaged weights to use; None uses the parameters (for a schedule-free optimizer, the averaged ones).
        limit: The largest number of batches (int), or a fraction of them (float).
        donate: True uses the state's own module instead of a copy; do not train the state at the same time. Buffers that a forward pass
            writes to are then restored after each batch; with a copy, their values are kept until the last batch.
        signals: The signal handlers, or None; after a signal, `Interrupted` is raised instead of the next output.

    Returns:
        An iterator of outputs, in the order of the loader.

    Raises:
        ConfigError: If there is no `predict_step`, no averaged weights of that name, or `signals` is given with several ranks.
        Interrupted: If a signal came, once the outputs are read.

    Example:
        >>> import torch
        >>> from fnlight.state import Task
        >>> task = Task(torch.nn.Identity(), lambda model, batch: batch.sum(), predict_step=lambda model, batch: model(batch) + 1)
        >>> list(predict(TrainState.create(task), [torch.zeros(2)]))
        [tensor([1., 1.])]
    """
    if isinstance(loader, Mapping):
        raise ConfigError(f"predict takes one loader at a time, but got a mapping of {sorted(loader)}; call it once for each")
    fn = step_of(state, "predict_step", predict_step)
    check_type("predict(signals=...)", signals, Signals | None, A_SIGNALS)
    if signals is not None and state.store.place is not None:
        raise ConfigError(
            "predict(signals=...) works in one process only: a rank that ends early would leave the others waiting; leave it out"
        )
    check_type("predict(weights=...)", weights, str | None, 'the name of averaged weights, such as "ema", or None')
    store, place = state.live, state.store.place
    owned = not donate or bool(
        weights_to_use(store.optims.values(), store.module)
    )  # averaged weights are computed once, not for each batch
    if owned:
        module = state.module() if place is None else place.copy(store.module, {})
        store = Store(module, type(store.optim)(None), {weights: store.memory[weights]} if weights in store.memory else {}, place)
    average_of(store, weights)
    world = place and place.world
    if place is not None:
        place.sync(store)
    source = sources_of(loader, state.device, limit, place)[""]
    found = _predictions(store, fold_in(state.seed, PREDICT), source, fn=fn, weights=weights, signals=signals, world=world, owned=owned)
    return Outputs(found, world)


@attrs.frozen(eq=False, repr=False)
class Outputs:
    """The result of `predict`: an iterator of the outputs of this process.

    Args:
        found: The outputs, in the order of the loader.
        world: The ranks that share the batches; None in a single process.

    Example:
        >>> list(Outputs(iter([1, 2])))
        [1, 2]
    """

    found: Iterator[Any]
    world: Any = None

    def __iter__(self) -> Iterator[Any]:
        """This iterator."""
        return self

    def __next__(self) -> Any:
        """The output of the next batch."""
        return next(self.found)

    def close(self) -> None:
        """Release the loader and its workers."""
        getattr(self.found, "close", lambda: None)()


def _predictions(
    store: Store,
    key: int,
    source: Source,
    fn: Callable[[Any, Any], Any],
    weights: str | None,
    signals: Signals | None,
    world: Any,
    owned: bool,
) -> Iterator[Any]:
    batches = source.epoch(key, 0) if signals is None else signals.until(source.epoch(key, 0))
    i, every = (0, 1) if world is None else (1 + world.rank - world.size, world.size)
    with nullcontext() if world is None else world.waiting("in a prediction"):
        while True:
            with isolated(store.device):  # around each batch: the caller's code runs in between
                item = next(batches, None)
                if item is None:
                    return None if signals is None else signals.check()
                i += every
                seed_generators(fold_in(key, i), store.device)
                with inference(store, weights, owned=owned) as module:
                    stands_in = item[0].__class__ is Part
                    out = fn(module, item[0].batch if stands_in else item[0])
                store.end_step()
            del item
            if not stands_in:
                yield out
            del out


def collect(outputs: Iterable[Any]) -> list[Any]:
    """All outputs of `predict` as a list, on the CPU; with several ranks, every rank gets all outputs in the order of the loader.

    Args:
        outputs: The result of `predict`.

    Returns:
        One entry per batch.

    Example:
        >>> import torch
        >>> collect(iter([torch.ones(1)]))
        [tensor([1.])]
    """
    check_type("collect(outputs)", outputs, Iterable, "what predict(...) gave")
    mine, world = [map_tensors(lambda t: t.cpu(), out) for out in outputs], outputs.world if isinstance(outputs, Outputs) else None
    with nullcontext() if world is None else world.waiting("after a prediction"):
        turns = zip_longest(*([mine] if world is None else world.gather(mine)), fillvalue=_NOTHING)
    return [out for turn in turns for out in turn if out is not _NOTHING]
