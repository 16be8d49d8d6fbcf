"""Activations that are computed again in the backward pass rather than kept: memory for time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fnlight.errors import ConfigError, StepError
from fnlight.optim import matches
from fnlight.pipe import Combinator
from fnlight.state import TrainState
from fnlight.tensors import NORMS, buffers_of, version_of

_ABSENT: Any = object()


def recompute(*patterns: str) -> Combinator:
    """Keep of some modules only what goes in, and run them once more when the backward pass comes to them.

    Loss, gradients and buffers are bitwise what they are without: the second pass draws the random numbers of the first, sees the buffers as
    the first one saw them, and writes none. (Numbers that a module draws from ``random`` or NumPy in its forward pass are not drawn again.)
    Names of parameters stay, so checkpoints do too. It costs at most one more forward pass of these modules. Of modules that lie within each
    other the outermost is meant; a container that is only iterated over, such as ``nn.ModuleList``, means what it holds.

    Args:
        *patterns: Beginnings of names of modules in whole parts, which may hold ``*``: ``"blocks"``, ``"encoder.layers.*"``.

    Returns:
        A combinator from `LossFn` to `LossFn`; it stands in front of `grad`.

    Raises:
        ConfigError: If there is no pattern; and in a run, if one means no module.
        StepError: In a step, if the model calls none of the modules.

    Example:
        >>> print(recompute("encoder.layers"))
        recompute('encoder.layers')

    References:
        Chen et al., "Training deep nets with sublinear memory cost" (2016).
    """
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigError(f"recompute takes patterns of names of modules, as in recompute('blocks'), but got {patterns!r}")

    def wrap(loss_fn: Any) -> Any:
        known: WeakKeyDictionary[nn.Module, list[_Part]] = WeakKeyDictionary()  # of a pure function: what a model was found to hold

        def recomputing(model: Any, batch: Any) -> Any:
            if not torch.is_grad_enabled():
                return loss_fn(model, batch)
            parts, called = known.get(model), list[int]()
            first = parts is None
            if parts is None:
                parts = known[model] = _parts(model, patterns)
            with _patched(parts, called):
                out = loss_fn(model, batch)
            if first and not called:
                raise StepError(
                    f"{combinator} means {', '.join(part.name for part in parts[:5])}, but the model calls none of them, so nothing is saved; "
                    "name modules whose forward() is called"
                )
            return out

        return recomputing

    def start(state: TrainState) -> TrainState:
        _parts(state.store.module, patterns)
        return state

    combinator = Combinator("recompute", wrap, "loss", "loss", args=", ".join(map(repr, patterns)), start=start)
    return combinator


@attrs.frozen(eq=False, repr=False)
class _Part:
    """A module that is run again, with the modules in it that have buffers."""

    name: str
    module: nn.Module
    holders: Sequence[nn.Module]


def _parts(model: nn.Module, patterns: Sequence[str]) -> list[_Part]:
    for pattern in patterns:
        if not any(True for _ in _meant(model, (pattern,), "")):
            names = [name for name, _ in model.named_modules() if name]
            near = get_close_matches(pattern, names, n=4, cutoff=0.5) or names[:4]
            says = f"near to it are {near}" if near else "it has no modules within it at all"
            raise ConfigError(f"recompute means {pattern!r}, but the model has no such module; {says}")
    found = {id(m): _Part(name, m, [h for h in m.modules() if buffers_of(h)]) for name, m in _meant(model, patterns, "")}
    return list(found.values())


def _meant(module: nn.Module, patterns: Sequence[str], prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules of these names that can be called."""
    for leaf, child in module.named_children():
        name = prefix + leaf
        if type(child).forward is not nn.Module.forward and any(matches(name, pattern) for pattern in patterns):
            yield name, child
        else:
            yield from _meant(child, patterns, f"{name}.")


@contextmanager
def _patched(parts: Sequence[_Part], called: list[int]) -> Iterator[None]:
    """The forward functions of some modules, replaced by ones that keep nothing; `called` counts."""
    inside, before = list[bool](), [vars(part.module).get("forward", _ABSENT) for part in parts]
    for i, part in enumerate(parts):
        vars(part.module)["forward"] = _kept_small(part, inside, called, i)
    try:
        yield
    finally:
        for part, forward in zip(parts, before, strict=True):
            if forward is _ABSENT:
                del vars(part.module)["forward"]
            else:
                vars(part.module)["forward"] = forward


def _kept_small(part: _Part, inside: list[bool], called: list[int], number: int) -> Callable[..., Any]:
    forward = part.module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        if inside or not torch.is_grad_enabled():  # a shared module may lie within another one, which is run again as a whole
            return forward(*args, **kwargs)
        called.append(number)
        inside.append(True)
        try:
            return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: _contexts(part), **kwargs)
        finally:
            inside.pop()

    return call


def _contexts(part: _Part) -> Any:
    changed: list[tuple[nn.Module, str, Tensor]] = []
    return _watching(part, changed), _AsBefore(changed)


@contextmanager
def _watching(part: _Part, changed: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Note the buffers that the first pass writes, as they were before."""
    held = [(m, name, b, version_of(b), b.clone()) for m in part.holders for name, b in buffers_of(m).items() if b is not None]
    yield
    for m, name, b, version, copy in held:
        if buffers_of(m)[name] is not b or version_of(b) != version or isinstance(m, NORMS):  # norms leave the version
            changed.append((m, name, copy))


@attrs.frozen(eq=False, repr=False)
class _AsBefore:
    """The buffers as the first pass found them, for a second one whose writes are dropped."""

    changed: list[tuple[nn.Module, str, Tensor]]
    _now: list[Tensor | None] = attrs.field(factory=list, init=False)

    def __enter__(self) -> None:
        self._now[:] = [buffers_of(m)[name] for m, name, _ in self.changed]
        for m, name, copy in self.changed:
            buffers_of(m)[name] = copy.clone()

    def __exit__(self, *error: object) -> None:
        for (m, name, _), now in zip(self.changed, self._now, strict=True):
            buffers_of(m)[name] = now
