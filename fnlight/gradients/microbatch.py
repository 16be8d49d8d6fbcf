"""Batches that do not fit into memory: `microbatch` trains on a batch in parts, as many as are asked for or as it takes."""

import gc
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fnlight.data import Part, cut, num_samples
from fnlight.errors import ConfigError, FaultWarning, ParallelError, StepError, warn
from fnlight.pipe import Combinator
from fnlight.protocols import GradFn, Gradients, StoreView
from fnlight.tensors import BATCH_NORMS, buffers_of, map_nodes

_SAYS_SO = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "RESOURCE_EXHAUSTED")
_FITS = 1 << 62  # a size that no part has: nothing is to be tried again


def microbatch(size: int | str) -> Combinator:
    """Compute the gradient of every batch in parts of at most so many samples; it is the gradient of the whole batch.

    Parts are cut along the first dimension of every tensor of a batch, as even as possible. A loss `Mean(total, weight)` is summed with its
    weight; a plain loss and plain metrics count with the samples of the part, so a mean over samples stays one. What couples the samples
    of a batch sees those of its part only: BatchNorm, contrastive losses, a mean over tokens that are not evenly spread (give `Mean` there).
    The generators are seeded for each part, so dropout draws other numbers than for the whole.

    ``"auto"`` begins with whole batches. When a step runs out of memory, it is tried again, from its beginning, in parts of half the size; the
    size that fits stays, and is saved with the state as ``memory["microbatch"]``. The step is then bitwise what it would have been with that
    size from the start: gradients, buffers and generators of the failed attempt are undone.

    On several ranks that hold the whole model each (`fnlight.parallel.ddp`) all of them go over to the smallest size that any of them needs. So that one may
    fail while others do not, their gradients then come together after the backward pass, not during it.

    Args:
        size: Samples in a part at most, at least 1; or ``"auto"``.

    Returns:
        A combinator from `GradFn` to `GradFn` (of a group); it stands behind `grad` and `accumulate`.

    Raises:
        ConfigError: If the size is neither.

    Example:
        >>> print(microbatch(16))
        microbatch(16)
    """
    if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ConfigError(f'microbatch must be a number of samples >= 1 or "auto", but got {size!r}')

    def wrap(grad_fn: GradFn) -> GradFn:
        def parted(store: StoreView, batches: Sequence[Any], key: int) -> Gradients:
            return grad_fn(store, _parts(batches, size, _together(store)), key)

        return parted if size != "auto" else _fitting(grad_fn)

    init = (lambda store: {"size": None}) if size == "auto" else None
    return Combinator("microbatch", wrap, "grad", "grad", args=repr(size), init=init)


def _fitting(grad_fn: GradFn) -> GradFn:
    """A gradient function that halves the parts until they fit."""

    def fitting(store: StoreView, batches: Sequence[Any], key: int) -> Gradients:
        store.host.refuse("microbatch('auto') repeats a step that runs out of memory, so Python must be there; give it a size")
        tree, buffers = store.memory["microbatch"], _buffers(store.module)
        while True:
            found, smaller = _attempt(grad_fn, store, _parts(batches, tree["size"], _together(store)), key)
            if smaller is None:
                return found
            _undo(store, buffers)  # outside of any handler: a traceback holds the tensors that did not fit
            warn(_split(store.module, tree["size"], smaller), FaultWarning)
            tree["size"] = smaller

    return fitting


def _attempt(grad_fn: GradFn, store: StoreView, parts: Sequence[Any], key: int) -> tuple[Any, int | None]:
    """The gradients, and None; or the size of parts to try again with, the smallest that any rank wants."""
    place, agreed = store.place, list[int]()

    def fits_everywhere() -> bool:
        agreed.append(place.smallest(_FITS, store.device))
        return agreed[0] == _FITS

    store.place = None if place is None else _apart(place, store, fits_everywhere)
    try:
        found = grad_fn(store, parts, key)
    except (RuntimeError, MemoryError) as error:
        if agreed:
            raise  # others have gone on
        smaller = _smaller(parts, error)
    else:
        return found, agreed[0] if agreed and agreed[0] < _FITS else None
    finally:
        store.place = place
    return None, smaller if place is None else place.smallest(smaller, store.device)


def _apart(place: Any, store: StoreView, done: Callable[[], bool]) -> Any:
    found = place.apart(store, done)
    if found is None:
        raise ParallelError(
            f'microbatch("auto") repeats a step that did not fit into memory, which a rank of {place} cannot do alone, since the others '
            "need it in every forward pass; give a number of samples"
        )
    return found


def _together(store: StoreView) -> int:
    """How many ranks must make as many forward passes as each other; 0 where each goes its way."""
    return store.place.world.size if store.place is not None and store.place.lockstep else 0


def _parts(batches: Sequence[Any], size: Any, together: int) -> tuple[Any, ...]:
    """The batches of a step, those of more than `size` samples in parts: as many on all ranks where they must go together."""
    found: list[Any] = []
    for given in batches:
        part = given if given.__class__ is Part else Part(given, 1.0)  # of a rank whose part differs from others', or a whole one
        _check_cut(part.batch)
        batch, count = part.batch, num_samples(part.batch)
        most = max(count, _largest(part, count, together)) if together else count
        if size is None or most <= size:
            found.append(given)
            continue
        number = -(-most // size)
        for a, b in pairwise([count * i // number for i in range(number + 1)]):
            # without samples the first one stands in, so that a forward pass of all ranks has this one among them
            found.append(Part(cut(batch, a, b, count), (b - a) / count * part.share) if b > a else Part(cut(batch, 0, 1, count), 0.0))
    return tuple(found)


def _check_cut(batch: Any) -> None:
    """Refuse a batch that cannot be parted, whatever its size: it would be taken whole."""
    found = list[Any]()

    def look(node: Any) -> Any:
        if isinstance(node, Tensor) or getattr(node, "shape", None) is not None:
            found.append(node)
            return node
        if isinstance(node, PackedSequence) or callable(getattr(node, "to", None)):
            raise StepError(
                f"microbatch cannot part a batch that holds a {type(node).__name__}: only tensors, arrays and lists are cut; give smaller batches with "
                "accumulate=, or let train_step make that object from tensors"
            )
        return NotImplemented

    map_nodes(look, batch)
    if not found and not isinstance(batch, list):
        raise StepError(f"microbatch cannot part a batch without tensors ({type(batch).__name__}); give smaller batches with accumulate=")


def _largest(part: Part, count: int, ranks: int) -> int:
    """How many samples the largest of the ranks' parts of a batch holds, from what this one of `count` samples counts."""
    if part.most is not None:
        return part.most
    return -(-round(count * ranks / part.share) // ranks) if part.share else 1  # a stand-in: no rank has more than one sample


def _smaller(parts: Sequence[Any], error: Exception) -> int:
    """Half of the largest part; the error itself if it was no lack of memory, or nothing is left to part."""
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(text in str(error) for text in _SAYS_SO):
        raise error
    largest = max(num_samples(part.batch if part.__class__ is Part else part) for part in parts)
    if largest <= 1:
        error.add_note(
            "microbatch='auto' has tried one sample at a time, and that does not fit either: use a smaller model or shorter samples"
        )
        raise error
    return (largest + 1) // 2


def _buffers(module: nn.Module) -> list[tuple[nn.Module, str, Any, Any]]:
    """Every buffer: whose it is, its name, itself, and a copy of its values."""
    owned = [(m, name, b) for m in module.modules() for name, b in buffers_of(m).items()]
    return [(m, name, b, None if b is None else b.clone()) for m, name, b in owned]


def _undo(store: StoreView, buffers: list[tuple[nn.Module, str, Any, Any]]) -> None:
    """Forget an attempt: its gradients, what it wrote into buffers, and the memory that it holds."""
    for p in store.params:
        p.grad = None
    with torch.no_grad():
        for module, name, buffer, values in buffers:
            buffers_of(module)[name] = buffer if buffer is None else buffer.copy_(values)
    gc.collect()
    if store.device.type != "cpu":
        empty: Callable[[], None] | None = getattr(torch.get_device_module(store.device), "empty_cache", None)
        if empty is not None:
            empty()


def _split(module: nn.Module, before: int | None, size: int) -> str:
    norms = [name or "the model" for name, m in module.named_modules() if isinstance(m, BATCH_NORMS) and m.training]
    coupled = f"; {', '.join(norms[:3])} from now on normalises over the samples of a part only" if norms else ""
    tried = "whole batches" if before is None else f"parts of {before} samples"
    return f"out of memory with {tried}: the step is repeated, and training goes on, in parts of at most {size} samples{coupled}"
