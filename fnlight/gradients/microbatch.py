"""Micro-batches, for batches that do not fit into memory: a given size, or the largest size that fits."""

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

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "RESOURCE_EXHAUSTED")
_FITS = 1 << 62  # larger than any micro-batch: the step need not be repeated


def microbatch(size: int | str) -> Combinator:
    """Compute the gradient of every batch in micro-batches of at most `size` samples; the result is the gradient of the whole batch.

    A batch is split along the first dimension of its tensors, as evenly as possible. A loss `Mean(total, weight)` is summed with its
    weight. A plain loss and plain metrics are weighted by the samples of the micro-batch, so a mean over samples stays exact. Layers and
    losses that mix samples use one micro-batch only: BatchNorm, contrastive losses, a mean over tokens of unequal number (use `Mean` there).
    The generators are seeded for each micro-batch, so dropout draws other numbers than for the whole batch.

    ``"auto"`` starts with whole batches. When a step runs out of memory, it is repeated from its start in micro-batches of half the size.
    The size that fits is kept and saved as ``state.memory["microbatch"]``. Gradients, buffers and generators of the failed attempt are
    restored, so the result is bit-identical to a run with that size from the start.

    With several ranks that each hold the whole model (`fnlight.parallel.ddp`), all ranks use the smallest size that any rank needs. The
    gradients are then reduced after the backward pass, not during it, because one rank may fail while the others do not.

    Args:
        size: The largest number of samples in a micro-batch, at least 1; or ``"auto"``.

    Returns:
        A combinator from `GradFn` to `GradFn` (of a group). Place it after `grad` and `accumulate`.

    Raises:
        ConfigError: If `size` is not one of these.

    Example:
        >>> print(microbatch(16))
        microbatch(16)
    """
    if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ConfigError(f'microbatch must be a number of samples >= 1 or "auto", but got {size!r}')

    def wrap(grad_fn: GradFn) -> GradFn:
        def splitting(store: StoreView, batches: Sequence[Any], key: int) -> Gradients:
            return grad_fn(store, _parts(batches, size, _lockstep_ranks(store)), key)

        return splitting if size != "auto" else _fitting(grad_fn)

    init = (lambda store: {"size": None}) if size == "auto" else None
    return Combinator("microbatch", wrap, "grad", "grad", args=repr(size), init=init)


def _fitting(grad_fn: GradFn) -> GradFn:
    """A gradient function that halves the micro-batches until they fit."""

    def fitting(store: StoreView, batches: Sequence[Any], key: int) -> Gradients:
        store.host.refuse("microbatch('auto') repeats a step that runs out of memory, which a graph cannot do; give a size")
        tree, buffers = store.memory["microbatch"], _buffers(store.module)
        while True:
            found, smaller = _attempt(grad_fn, store, _parts(batches, tree["size"], _lockstep_ranks(store)), key)
            if smaller is None:
                return found
            _undo(store, buffers)  # not inside an except block: the traceback would keep the tensors alive
            warn(_split(store.module, tree["size"], smaller), FaultWarning)
            tree["size"] = smaller

    return fitting


def _attempt(grad_fn: GradFn, store: StoreView, parts: Sequence[Any], key: int) -> tuple[Any, int | None]:
    """The gradients and None; or None and the micro-batch size to try next, the smallest that any rank needs."""
    place, agreed = store.place, list[int]()

    def fits_everywhere() -> bool:
        agreed.append(place.smallest(_FITS, store.device))
        return agreed[0] == _FITS

    store.place = None if place is None else _deferred_placement(place, store, fits_everywhere)
    try:
        found = grad_fn(store, parts, key)
    except (RuntimeError, MemoryError) as error:
        if agreed:
            raise  # the other ranks have continued
        smaller = _smaller(parts, error)
    else:
        return found, agreed[0] if agreed and agreed[0] < _FITS else None
    finally:
        store.place = place
    return None, smaller if place is None else place.smallest(smaller, store.device)


def _deferred_placement(place: Any, store: StoreView, done: Callable[[], bool]) -> Any:
    found = place.apart(store, done)
    if found is None:
        raise ParallelError(
            f'microbatch("auto") repeats a step that ran out of memory, but a rank of {place} cannot repeat it alone, because the other '
            "ranks take part in every forward pass; give a number of samples instead"
        )
    return found


def _lockstep_ranks(store: StoreView) -> int:
    """The number of ranks that must make the same number of forward passes; 0 if ranks are independent."""
    return store.place.world.size if store.place is not None and store.place.lockstep else 0


def _parts(batches: Sequence[Any], size: Any, together: int) -> tuple[Any, ...]:
    """The batches of a step, split into parts of at most `size` samples; ranks in lockstep get the same number of parts."""
    found: list[Any] = []
    for given in batches:
        part = given if given.__class__ is Part else Part(given, 1.0)  # a rank's unequal share of a batch, or a whole batch
        _check_cut(part.batch)
        batch, count = part.batch, num_samples(part.batch)
        most = max(count, _largest(part, count, together)) if together else count
        if size is None or most <= size:
            found.append(given)
            continue
        number = -(-most // size)
        for a, b in pairwise([count * i // number for i in range(number + 1)]):
            # a part without samples: a zero-weight dummy, so that this rank takes part in the forward pass of all ranks
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
    """The largest number of samples of any rank, computed from the share of this rank with `count` samples."""
    if part.most is not None:
        return part.most
    return -(-round(count * ranks / part.share) // ranks) if part.share else 1  # a dummy batch: no rank has more than one sample


def _smaller(parts: Sequence[Any], error: Exception) -> int:
    """Half of the largest size; raises the error if it is not out-of-memory, or if the size is already 1."""
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(text in str(error) for text in _OUT_OF_MEMORY):
        raise error
    largest = max(num_samples(part.batch if part.__class__ is Part else part) for part in parts)
    if largest <= 1:
        error.add_note(
            "microbatch='auto' has tried one sample at a time, which does not fit either; use a smaller model or shorter samples"
        )
        raise error
    return (largest + 1) // 2


def _buffers(module: nn.Module) -> list[tuple[nn.Module, str, Any, Any]]:
    """For every buffer: its module, its name, the buffer, and a copy of its values."""
    owned = [(m, name, b) for m in module.modules() for name, b in buffers_of(m).items()]
    return [(m, name, b, None if b is None else b.clone()) for m, name, b in owned]


def _undo(store: StoreView, buffers: list[tuple[nn.Module, str, Any, Any]]) -> None:
    """Undo an attempt: drop its gradients, restore the buffers, and free its memory."""
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
    coupled = f"; {', '.join(norms[:3])} normalises over one micro-batch only from now on" if norms else ""
    tried = "whole batches" if before is None else f"micro-batches of {before} samples"
    return f"out of memory with {tried}: the step is repeated, and training continues, in micro-batches of at most {size} samples{coupled}"
