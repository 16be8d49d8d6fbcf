"""What a stream remembers from one epoch to the next: counters such as ``self.epoch += 1``, orders, generators of its own.

Such a stream is no function of (seed, epoch). So its plain attributes are looked at before each epoch. Those that have changed are saved with the
state, a resumed run begins with them, and after a run they are what they were before it.
"""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from fnlight.data.parts import generator_state, parts, set_generator
from fnlight.tensors import equal

_PLAIN = (bool, int, float, str, bytes, type(None))
_LONG = 100_000  # entries of a list, an array or a tensor that is remembered; a longer one is data
_OWN = ("state_dict", "load_state_dict"), ("get_state", "set_state")
_RUNS = ("__iter__", "run", "__call__")
"""What a part that is iterated has. Others, such as a replay buffer that a stream reads, are filled by somebody else, and left alone."""

_DROPPED: Any = object()


@attrs.frozen(eq=False, repr=False)
class Counters:
    """The plain attributes of a loader and of its parts, as they were at first.

    Args:
        loader: The user's loader; what has a state of its own (``state_dict`` and ``load_state_dict``) is left out.

    Example:
        >>> from types import SimpleNamespace
        >>> loader = SimpleNamespace(epoch=0, rows=[])
        >>> counters = Counters(loader)
        >>> loader.epoch += 1
        >>> counters.changed()
        {'epoch': 1}
        >>> counters.put({})
        >>> loader.epoch
        0
    """

    loader: Any
    nodes: dict[str, Any] = attrs.field(init=False, default=attrs.Factory(lambda self: dict(_counting(self.loader)), takes_self=True))
    first: dict[str, Any] = attrs.field(init=False, default=attrs.Factory(lambda self: self._now(), takes_self=True))

    def _now(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, node in self.nodes.items():
            for name, value in vars(node).items():
                kept = _kept(value)
                if kept is not _DROPPED:
                    found[f"{path}.{name}" if path else name] = kept
        return found

    def changed(self) -> dict[str, Any]:
        """The attributes that are not what they were at first, by path."""
        return {path: value for path, value in self._now().items() if not (path in self.first and equal(self.first[path], value))}

    def put(self, changed: Mapping[str, Any]) -> None:
        """Make the attributes what they were at first, but for some that had changed.

        Args:
            changed: What `changed` gave.
        """
        wanted, now = {**self.first, **changed}, self._now()
        for at in now.keys() - wanted.keys():  # what was not there at first: the class has it
            path, _, name = at.rpartition(".")
            if isinstance(getattr(type(self.nodes[path]), name, self), _PLAIN):
                vars(self.nodes[path]).pop(name, None)
        for at, value in wanted.items():
            path, _, name = at.rpartition(".")
            if path in self.nodes and not (at in now and equal(value, now[at])):
                _put(self.nodes[path], name, value)


def _counting(loader: Any) -> list[tuple[str, Any]]:
    """The parts whose attributes are looked at."""
    closed: list[str] = []
    found: list[tuple[str, Any]] = []
    for path, node in parts(loader):
        if any(path.startswith(f"{each}.") for each in closed):
            continue
        if any(all(callable(getattr(node, name, None)) for name in names) for names in _OWN):
            closed.append(path)
        elif not path or any(callable(getattr(node, name, None)) for name in _RUNS):
            found.append((path, node))
    return found if "" not in closed else []


def _kept(value: Any) -> Any:
    """A copy of a plain value, in a form that a checkpoint holds; for others a mark."""
    if isinstance(value, _PLAIN):
        return value
    if type(value) in (list, tuple):
        return type(value)(value) if len(value) <= _LONG and all(type(each) in _PLAIN for each in value) else _DROPPED
    if isinstance(value, Tensor):
        return value.detach().clone() if value.dim() <= 1 and value.numel() <= _LONG and value.device.type == "cpu" else _DROPPED
    if type(value).__name__ == "ndarray":
        return _copied(value)
    state = generator_state(value)
    return _DROPPED if state is None else {"generator": state}


def _copied(array: Any) -> Any:
    short = array.ndim <= 1 and array.size <= _LONG and array.dtype.kind in "bif"
    return torch.from_numpy(array.copy()) if short else _DROPPED


def _put(node: Any, name: str, value: Any) -> None:
    held = vars(node).get(name)
    if isinstance(value, dict):
        if held is not None:
            set_generator(held, value["generator"])
    elif isinstance(held, Tensor) and held.shape == value.shape:
        held.copy_(value)
    elif isinstance(held, Tensor):
        vars(node)[name] = value.clone()
    elif isinstance(value, Tensor) and held is not None:
        vars(node)[name] = value.numpy().copy()
    elif type(held) is list and isinstance(value, list):
        held[:] = value  # others may hold the same list
    else:
        vars(node)[name] = value
