"""Parts of a model that are not trained, always or until some epoch.

A frozen parameter gets no gradient, so its optimizer passes it over: it has no memory, no weight decay, and no backward pass of its own.
What is frozen at a step is a function of the completed epochs; before and after a step every parameter is as the task made it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import attrs
from torch import nn

from fnlight.errors import ConfigError, OptimizerError
from fnlight.optim import matches, meant
from fnlight.pipe import Combinator
from fnlight.state import Store, TrainState


def freeze(*patterns: str, eval_mode: bool = False, name: str = "freeze") -> Combinator:
    """Do not train the parameters of some names.

    Args:
        *patterns: Beginnings of names in whole parts, which may hold ``*``: ``"backbone"``, ``"layers.*.norm"``.
        eval_mode: True also keeps the modules of these names in eval mode while training: BatchNorm uses its statistics and leaves them
            alone, dropout is off.
        name: Its own name in a pipe, where it occurs twice.

    Returns:
        A combinator from `Step` to `Step`.

    Raises:
        ConfigError: If there is no pattern; and in a run, if one means no parameter.

    Example:
        >>> print(freeze("backbone", eval_mode=True))
        freeze('backbone', eval_mode=True)
    """
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigError(f"freeze takes patterns of names, as in freeze('backbone'), but got {patterns!r}")
    return _freezing("freeze", name, dict.fromkeys(patterns), eval_mode=eval_mode, label=", ".join(map(repr, patterns)))


def unfreeze_at(epochs: Mapping[str, int], eval_mode: bool = False, *, name: str = "unfreeze_at") -> Combinator:
    """Train the parameters of some names only from an epoch on: gradual unfreezing.

    The optimizer holds them from the beginning, with the learning rate of their group, and its memory of them begins when they do. A schedule
    counts from the beginning of training; one of their own group may begin later. Where several patterns mean a parameter, the latest counts.
    What the task itself has frozen, with ``requires_grad=False``, stays so.

    Args:
        epochs: Patterns, as those of `freeze`, to the number of completed epochs from which on they are trained.
        eval_mode: True also keeps the modules of these names in eval mode until then.
        name: Its own name in a pipe, where it occurs twice.

    Returns:
        A combinator from `Step` to `Step`.

    Raises:
        ConfigError: If an epoch is not a whole number of at least 0; and in a run, if a pattern means no parameter.
        OptimizerError: In a run, if the optimizer does not hold a parameter that is to be trained later.

    Example:
        >>> print(unfreeze_at({"layer4": 2, "layer3": 4}))
        unfreeze_at({'layer4': 2, 'layer3': 4})

    References:
        Howard and Ruder, "Universal language model fine-tuning for text classification" (2018).
    """
    if not isinstance(epochs, Mapping) or not epochs:
        raise ConfigError(f"unfreeze_at takes patterns of names with epochs, as in {{'layer4': 2}}, but got {epochs!r}")
    for pattern, epoch in epochs.items():
        if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
            raise ConfigError(
                f"unfreeze_at({{{pattern!r}: ...}}) must be completed epochs, a whole number of at least 0, but got {epoch!r}"
            )
    return _freezing("unfreeze_at", name, epochs, eval_mode=eval_mode, label=repr(dict(epochs)))


@attrs.frozen(eq=False, repr=False)
class _Rows:
    """Which parameters patterns mean in the model of a store, with the epoch from which on they are trained, None for never."""

    rows: Sequence[tuple[int | None, tuple[str, ...]]]

    def close(self, error: BaseException | None) -> None:
        """Nothing is open."""


def _rows(store: Store, key: str, until: Mapping[str, int | None]) -> Sequence[tuple[int | None, tuple[str, ...]]]:
    """What the patterns mean, looked up once in a run."""
    found = store.run.resources.get(key)
    if found is None:
        rows = [(epoch, tuple(n for n in store.named if matches(n, pattern))) for pattern, epoch in until.items()]
        found = store.run.resources[key] = _Rows(rows)
    return found.rows


def _freezing(who: str, key: str, until: Mapping[str, int | None], *, eval_mode: bool, label: str) -> Combinator:
    def wrap(step: Any) -> Any:
        def freezing(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
            store, epoch = state.store, state.progress.epoch
            cold = [n for start, names in _rows(store, key, until) if start is None or epoch < start for n in names]
            if not cold:
                return step(state, batch)
            still = [pattern for pattern, start in until.items() if start is None or epoch < start] if eval_mode else []
            with _frozen(store, cold), _in_eval_mode(store.module, still):
                return step(state, batch)

        return freezing

    def start(state: TrainState) -> TrainState:
        _check(state, who, until)
        state.store.run.resources.pop(key, None)
        return state

    label += (", eval_mode=True" if eval_mode else "") + ("" if key == who else f", name={key!r}")
    return Combinator(who, wrap, "step", "step", args=label, key=key, phase="update", start=start)


def _check(state: TrainState, name: str, until: Mapping[str, int | None]) -> None:
    store = state.store
    optimizers = [optim.optimizer for optim in store.optims.values() if optim.optimizer is not None]
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for pattern, epoch in until.items() if store.named else ():
        try:
            names = meant(pattern, store.module, name)
        except OptimizerError as error:
            raise ConfigError(str(error)) from error
        mine = [n for n in names if store.named[n].requires_grad]
        if not mine and epoch is not None and store.params:
            raise ConfigError(
                f"{name} means {pattern!r}, but the task has frozen all of that itself, with requires_grad=False; leave one out"
            )
        left = [n for n in mine if epoch is not None and id(store.named[n]) not in held]
        if left:
            raise OptimizerError(
                f"{name} trains {pattern!r} from epoch {epoch} on, but the optimizer does not hold {', '.join(left[:5])}; "
                "give all parameters to it in configure_optimizers: those that are frozen are passed over"
            )


@contextmanager
def _frozen(store: Store, names: Iterable[str]) -> Iterator[None]:
    stores = (store, *store.phases.values())
    params, changed = [each.params for each in stores], [p for p in map(store.named.__getitem__, names) if p.requires_grad]
    for p in changed:
        p.requires_grad_(False)
    for each in stores:
        each.params = [p for p in each.params if p.requires_grad]
    try:
        yield
    finally:
        for p in changed:
            p.requires_grad_(True)
        for each, before in zip(stores, params, strict=True):
            each.params = before


@contextmanager
def _in_eval_mode(module: nn.Module, patterns: list[str]) -> Iterator[None]:
    """Modules of these names, or that have parameters of these names of their own, in eval mode."""
    meant = [m for n, m in module.named_modules() if any(matches(n, p) or fnmatchcase(f"{n}.", p) for p in patterns)] if patterns else []
    before = [(m, m.training) for m in meant]
    for m in meant:
        m.training = False
    try:
        yield
    finally:
        for m, training in before:
            m.training = training
