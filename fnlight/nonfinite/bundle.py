"""Debug bundles: the state before a failed step, its batch and its key, as files without code, to repeat the step elsewhere.

::

    runs/a/bundles/step-00000007/
      state/                 the state before the step, a normal checkpoint
      batch.safetensors      the tensors of the batches
      bundle.json            the structure of the batches, the error, the position in the data, and the configuration
"""

import dataclasses
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fnlight.checkpoint import Folder, chunks, decode, encode, load, make, refuse_links, save
from fnlight.data import Item
from fnlight.errors import BrokenCheckpointError, CheckpointError, ConfigError, NonFiniteError, check_type
from fnlight.metrics import Mean
from fnlight.pipe import Combinator
from fnlight.state import History, Task, TrainState
from fnlight.step import pure
from fnlight.tensors import map_tensors
from fnlight.triggers import Tick, condition, steps

EVERY = steps(20)
"""When the copy of the state is replaced by a new one."""

_KEY = "debug_bundle"
_BATCH, _JSON, _STATE, _FORMAT = "batch.safetensors", "bundle.json", "state", 1


def debug_bundle(dir: str | os.PathLike[str], every: Callable[[Tick], bool] = EVERY, *, config: str | None = None) -> Combinator:
    """Write a bundle to repeat a step that raises an error or has a non-finite loss; ``fnlight replay`` repeats the step.

    It keeps a copy of the state, made every n steps, and the batches since then. This needs the memory of a second state and n batches, and
    the time of one copy per n steps. When a step fails, the steps since the copy are trained again until one fails.

    Args:
        dir: The run's directory on this machine; bundles go to ``DIR/bundles/step-00000007``.
        every: When the copy is replaced by a new one; give `check_finite` the same trigger.
        config: The configuration as JSON, for ``fnlight replay``.

    Returns:
        A combinator from `Step` to `Step`; put it after all combinators that change tensors, and after `check_finite`.

    Raises:
        ConfigError: If the directory is a URL; at the start of a run, if several processes train together.

    Example:
        >>> print(debug_bundle("runs/a"))
        debug_bundle('runs/a', every=steps(20))
    """
    check_type("debug_bundle(dir)", dir, str | os.PathLike, "a str or os.PathLike")
    check_type("debug_bundle(config=...)", config, str | None, "text, or None")
    path = os.fspath(dir)
    if "://" in path:
        raise ConfigError(f"debug_bundle writes to this machine, but {path} is a URL; give a directory")
    due = condition(every, "debug_bundle(every=...)")

    def wrap(step: Any) -> Any:
        def watched(state: TrainState, batch: Any) -> tuple[TrainState, Mapping[str, Any]]:
            item, before = batch if batch.__class__ is Item else Item.of(batch, state=state), state.progress
            window = state.store.run.resources.get(_KEY) or state.store.run.resources.setdefault(_KEY, _Window())
            window.admit(state, item)
            try:
                state, metrics = step(state, batch)
            except Exception as error:
                error.add_note(_written(window, step, error, dir=os.path.join(path, "bundles"), config=config))
                window.clear()
                raise
            window.version, window.due = state.version, due(Tick(before, state.progress))
            return state, metrics

        return watched

    return Combinator("debug_bundle", wrap, "step", "step", args=f"{path!r}, every={every}", phase="update", start=_begin)


def _begin(state: TrainState) -> TrainState:
    if state.store.place is not None:
        raise ConfigError(
            "debug_bundle works in one process only: a rank that fails alone cannot repeat steps that need all ranks; leave it out, and repeat "
            "the failure in one process, with the same global batches"
        )
    state.store.run.resources[_KEY] = _Window()
    return state


@attrs.define(eq=False, repr=False)
class _Window:
    """A copy of a state, and the history and the item of each step since then; one of the resources of the run."""

    start: TrainState | None = None
    entries: list[tuple[History, Item]] = attrs.field(factory=list)
    version: int = -1
    due: bool = False

    def admit(self, state: TrainState, item: Item) -> None:
        if self.version != state.version or self.due:
            self.start, self.entries = state.copy(), []
        self.entries.append((state.history, attrs.evolve(item, position=None)))

    def clear(self) -> None:
        self.start, self.entries, self.version = None, [], -1

    def close(self, error: BaseException | None) -> None:  # noqa: ARG002  # what every resource of a run takes
        """At the end of a run, free the copy."""
        self.clear()


def _written(window: _Window, step: Any, error: Exception, dir: str, config: str | None) -> str:
    """Write the bundle of a failure; return the note for the error."""
    try:
        state, item, again = _first_failure(window, step, error)
        path = _write(state, item, error, again=again, dir=dir, config=config)
    except Exception as problem:  # noqa: BLE001  # the first error is the one that matters
        return f"no debug bundle could be written: {type(problem).__name__}: {problem}"
    if not again:
        return f"the step did not fail when it was repeated; the state before it and its batch are in {path}"
    return f"the state before step {state.progress.step + 1} and its batch are in {path}; repeat it with: fnlight replay {path} --task module:task"


def _first_failure(window: _Window, step: Any, error: Exception) -> tuple[TrainState, Item, bool]:
    """Repeat the steps of a window until one fails like the error: the state before it, its item, and whether it failed the same way."""
    state = window.start
    assert state is not None
    before, item = state, window.entries[-1][1]
    for history, item in window.entries:
        before = attrs.evolve(state, history=history).copy()
        failure, state, _ = _taken(step, attrs.evolve(state, history=history), item, isinstance(error, NonFiniteError))
        if failure is not None or state is None:
            return before, item, type(failure) is type(error)
    return before, item, False


def _taken(step: Any, state: TrainState, item: Item, finite: bool) -> tuple[Exception | None, TrainState | None, Mapping[str, Any]]:
    """Run one step: its error, or its results."""
    try:
        after, metrics = step(state, item)
    except Exception as error:  # noqa: BLE001  # any error is the result
        return error, None, {}
    losses = {
        name: value for name, value in metrics.items() if name == "loss" or name.endswith("/loss")
    }  # of several optimizers, NAME/loss
    for name, loss in losses.items() if finite else ():
        value = float(loss.total if isinstance(loss, Mean) else loss)
        if not math.isfinite(value):
            return NonFiniteError(f"the {name} of step {after.progress.step} is {value}"), after, metrics
    return None, after, metrics


def _write(state: TrainState, item: Item, error: Exception, again: bool, dir: str, config: str | None) -> str:
    refuse_links(os.path.dirname(dir), os.path.basename(dir))
    name = f"step-{state.progress.step + 1:08d}"
    while os.path.exists(os.path.join(dir, name)):
        name += "-again"
    hidden, path = Folder(dir).child(f".{name}.tmp-{secrets.token_hex(4)}"), os.path.join(dir, name)
    make(hidden)
    save(state, hidden.child(_STATE).path)
    tensors: dict[str, Tensor] = {}
    classes: list[Any] = []
    lacks, batches = None, None
    try:
        batches = encode(_plain(item.batches, [], classes), _collect(tensors), "batch")
        hidden.write(_BATCH, chunks(tensors))
    except CheckpointError as problem:
        lacks, batches = str(problem), None
    at = {"epoch": item.epoch, "batch": item.batch, "last": item.last, "samples": item.samples}
    body = {
        "format": _FORMAT, "error": [type(error).__name__, str(error)], "repeated": again, "step": state.progress.step + 1,
        "key": state.key, "item": at, "batches": batches, "classes": classes,
        "lacks": lacks, "config": config, "torch": torch.__version__,
    }  # fmt: skip
    hidden.write(_JSON, [json.dumps(body, indent=1).encode("ascii")])
    os.rename(hidden.path, path)
    return path


def _collect(tensors: dict[str, Tensor]) -> Callable[[str, Tensor], str]:
    def put(name: str, tensor: Tensor) -> str:
        while name in tensors:
            name += "'"
        tensors[name] = tensor.detach()
        return name

    return put


def _plain(tree: Any, place: list[int], classes: list[Any]) -> Any:
    """A batch as dicts, lists, tuples and leaves; other classes are listed in `classes` by place and name."""
    kind = type(tree)
    if isinstance(tree, Mapping):
        return {key: _plain(value, [*place, i], classes) for i, (key, value) in enumerate(tree.items())}
    if kind in (list, tuple):
        return kind([_plain(value, [*place, i], classes) for i, value in enumerate(tree)])
    if kind.__module__ == "numpy" and kind.__name__ == "ndarray":
        classes.append([place, "ndarray"])
        return torch.from_numpy(tree)
    names = _fields(kind)
    if names is None:
        return tree
    classes.append([place, kind.__name__])
    return {name: _plain(getattr(tree, name), [*place, i], classes) for i, name in enumerate(names)}


def _fields(kind: type) -> list[str] | None:
    """The field names of a dataclass, an attrs class or a named tuple; None for other classes."""
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    if attrs.has(kind):
        return [field.name for field in attrs.fields(kind)]
    if issubclass(kind, tuple) and isinstance(names := getattr(kind, "_fields", None), tuple):
        return list(names)
    return None


@attrs.frozen(eq=False)
class Bundle:
    """The result of `load_bundle`.

    Args:
        state: The state before the step.
        item: The batches of the step and their position in the data; None if they could not be written.
        error: The name of the class of the error, and its message.
        key: The random key of the step.
        repeated: Whether the step failed again when it was repeated in the same process.
        config: The configuration as JSON; None if there was none, or if it held functions.
        lacks: Why the batches could not be written; None if they were.

    Example:
        >>> [field.name for field in attrs.fields(Bundle)][:2]
        ['state', 'item']
    """

    state: TrainState
    item: Item | None
    error: tuple[str, str]
    key: int
    repeated: bool
    config: str | None
    lacks: str | None

    def replay(self, step: Any, item: Item | None = None) -> tuple[Exception | None, TrainState | None, Mapping[str, Any]]:
        """Repeat the step on a copy of the state.

        Args:
            step: A pipe like that of the run.
            item: The batches, if the bundle holds none.

        Returns:
            Its error, or None; the state after it, if there is one; and its metrics.
        """
        given = self.item if self.item is not None else item
        if given is None:
            raise ConfigError(
                f"the bundle holds no batches ({self.lacks}); give item=..., the first item of `fnlight.batches(loader, bundle.state)`"
            )
        return _taken(pure(step), self.state, given, self.error[0] == "NonFiniteError")


def load_bundle(path: str | os.PathLike[str], task: Task, types: Mapping[str, Any] | None = None) -> Bundle:
    """Read a debug bundle; reading runs no code from it, and imports nothing by name.

    Args:
        path: The bundle's directory.
        task: The task of the run.
        types: Names to the dataclasses, attrs classes and named tuples that occur in batches.

    Returns:
        The bundle.

    Raises:
        CheckpointError: If there is no bundle, or its state is of another task.
        BrokenCheckpointError: If it is damaged.
        ConfigError: If a batch contains a class that is not among `types`.

    Example:
        >>> load_bundle("no/such/bundle", Task(torch.nn.Linear(1, 1), max))
        Traceback (most recent call last):
        fnlight.errors.CheckpointError: no debug bundle at no/such/bundle: there is no bundle.json
    """
    check_type("load_bundle(path, ...)", path, str | os.PathLike, "a str or os.PathLike")
    check_type("load_bundle(path, task)", task, Task, "a Task")
    check_type("load_bundle(types=...)", types, Mapping | None, "a mapping of names to classes, or None")
    folder = Folder(os.fspath(path))
    if folder.size(_JSON) is None:
        raise CheckpointError(f"no debug bundle at {folder.path}: there is no {_JSON}")
    state = load(folder.child(_STATE).path, task)
    try:
        body = json.loads(folder.read(_JSON))
        if body["format"] != _FORMAT:
            raise ValueError(f"format {body['format']!r}, but this fnlight reads {_FORMAT}")
        item = None
        if body["batches"] is not None:
            tree = decode(body["batches"], folder.tensors(_BATCH).__getitem__)
            names = {tuple(place): str(name) for place, name in body["classes"]}
            batches = _rebuilt(tree, (), names, {"PackedSequence": PackedSequence, **(types or {})})
            item = Item(
                tuple(_to(batch, state.device) for batch in batches), **{k: body["item"][k] for k in ("epoch", "batch", "last", "samples")}
            )
        name, says = map(str, body["error"])
        config, lacks = (None if body[k] is None else str(body[k]) for k in ("config", "lacks"))
        return Bundle(
            state=state, item=item, error=(name, says), key=int(body["key"]), repeated=bool(body["repeated"]), config=config, lacks=lacks
        )
    except ConfigError:
        raise
    except Exception as error:  # safetensors raises its own class, and damage can cause any error
        raise BrokenCheckpointError(f"the debug bundle {folder.path} is broken: {error!r:.200}") from error


def _to(tree: Any, device: torch.device) -> Any:
    return tree if device.type == "cpu" else map_tensors(lambda tensor: tensor.to(device), tree)


def _rebuilt(tree: Any, place: tuple[int, ...], names: Mapping[tuple[int, ...], str], types: Mapping[str, Any]) -> Any:
    """The inverse of `_plain`: classes come from the given ones, and are built without calling them."""
    if isinstance(tree, dict):
        tree = {key: _rebuilt(value, (*place, i), names, types) for i, (key, value) in enumerate(tree.items())}
    elif isinstance(tree, list | tuple):
        tree = type(tree)([_rebuilt(value, (*place, i), names, types) for i, value in enumerate(tree)])
    name = names.get(place)
    if name is None:
        return tree
    if name == "ndarray":
        return tree.numpy()
    kind = types.get(name)
    if not isinstance(kind, type) or _fields(kind) != list(tree):
        raise ConfigError(
            f"the batch contains {name}({', '.join(tree)}), but no such class is known; name the module that holds it, or give it in types="
        )
    if issubclass(kind, tuple):
        return tuple.__new__(kind, tree.values())
    made = object.__new__(kind)
    for field, value in tree.items():
        object.__setattr__(made, field, value)
    return made
