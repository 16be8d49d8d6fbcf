"""Activation checkpointing: activations are computed again in the backward pass, which saves memory and costs time."""

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
    """Keep only the inputs of some modules, and compute their activations again in the backward pass.

    Loss, gradients and buffers are bit-identical to those without it. The second pass draws the same random numbers, reads the same buffer
    values and writes no buffers. (Numbers that a module draws from ``random`` or NumPy in its forward pass are not repeated.) Parameter
    names do not change, so checkpoints stay compatible. The cost is at most one more forward pass of these modules. If a pattern matches
    nested modules, the outermost is used; for a container without ``forward``, such as ``nn.ModuleList``, its modules are used.

    Args:
        *patterns: The first parts of qualified module names, with ``*`` as a wildcard: ``"blocks"``, ``"encoder.layers.*"``.

    Returns:
        A combinator from `LossFn` to `LossFn`. Place it before `grad`.

    Raises:
        ConfigError: If there is no pattern; at the start of a run, if a pattern matches no module.
        StepError: In a step, if the model calls none of these modules.

    Example:
        >>> print(recompute("encoder.layers"))
        recompute('encoder.layers')

    References:
        Chen et al., "Training deep nets with sublinear memory cost" (2016).
    """
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigError(f"recompute takes patterns of module names, as in recompute('blocks'), but got {patterns!r}")

    def wrap(loss_fn: Any) -> Any:
        known: WeakKeyDictionary[nn.Module, list[_Part]] = WeakKeyDictionary()  # a cache: the matching modules of each model

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
                    f"{combinator} matches {', '.join(part.name for part in parts[:5])}, but the model calls none of them, so no memory is saved; "
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
    """A module to recompute, and its submodules that have buffers."""

    name: str
    module: nn.Module
    holders: Sequence[nn.Module]


def _parts(model: nn.Module, patterns: Sequence[str]) -> list[_Part]:
    for pattern in patterns:
        if not any(True for _ in _meant(model, (pattern,), "")):
            names = [name for name, _ in model.named_modules() if name]
            near = get_close_matches(pattern, names, n=4, cutoff=0.5) or names[:4]
            says = f"the closest names are {near}" if near else "it has no submodules"
            raise ConfigError(f"recompute has the pattern {pattern!r}, but no module of the model matches it; {says}")
    found = {id(m): _Part(name, m, [h for h in m.modules() if buffers_of(h)]) for name, m in _meant(model, patterns, "")}
    return list(found.values())


def _meant(module: nn.Module, patterns: Sequence[str], prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost matching modules that have a ``forward``."""
    for leaf, child in module.named_children():
        name = prefix + leaf
        if type(child).forward is not nn.Module.forward and any(matches(name, pattern) for pattern in patterns):
            yield name, child
        else:
            yield from _meant(child, patterns, f"{name}.")


@contextmanager
def _patched(parts: Sequence[_Part], called: list[int]) -> Iterator[None]:
    """Replace the forward functions of the modules by checkpointed ones; `called` collects the calls."""
    inside, before = list[bool](), [vars(part.module).get("forward", _ABSENT) for part in parts]
    for i, part in enumerate(parts):
        vars(part.module)["forward"] = _checkpointed(part, inside, called, i)
    try:
        yield
    finally:
        for part, forward in zip(parts, before, strict=True):
            if forward is _ABSENT:
                del vars(part.module)["forward"]
            else:
                vars(part.module)["forward"] = forward


def _checkpointed(part: _Part, inside: list[bool], called: list[int], number: int) -> Callable[..., Any]:
    forward = part.module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        if inside or not torch.is_grad_enabled():  # a shared module inside another one, which is recomputed as a whole
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
    """Record the buffers that the first pass writes, with their values before it."""
    held = [(m, name, b, version_of(b), b.clone()) for m in part.holders for name, b in buffers_of(m).items() if b is not None]
    yield
    for m, name, b, version, copy in held:
        if buffers_of(m)[name] is not b or version_of(b) != version or isinstance(m, NORMS):  # norms keep the version
            changed.append((m, name, copy))


@attrs.frozen(eq=False, repr=False)
class _AsBefore:
    """Give the second pass the buffers from before the first one, and drop its writes."""

    changed: list[tuple[nn.Module, str, Tensor]]
    _now: list[Tensor | None] = attrs.field(factory=list, init=False)

    def __enter__(self) -> None:
        self._now[:] = [buffers_of(m)[name] for m, name, _ in self.changed]
        for m, name, copy in self.changed:
            buffers_of(m)[name] = copy.clone()

    def __exit__(self, *error: object) -> None:
        for (m, name, _), now in zip(self.changed, self._now, strict=True):
            buffers_of(m)[name] = now
