"""Random numbers as a function of one seed: keys are folded from it, generators are seeded from keys and restored afterwards.

A run holds one integer, the seed. Before every micro-batch, sample and evaluation batch the global generators (of torch, Python and, if it is
loaded, NumPy) are seeded with ``fold_in(seed, stream, ...)``. So generator states need not be saved, and each step can be replayed alone.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch

from fnlight.tensors.device import module_of

_MASK = (1 << 64) - 1
_PYTHON: Any = random.seed.__self__  # the generator behind `random.random` and the others
_seed_python: Any = random.Random.__base__.seed  # pyright: ignore[reportOptionalMemberAccess]  # what random.seed calls for a number

# The first number folded into a seed says what the random numbers are for, so that no two purposes share a stream.
TRAIN, ORDER, SAMPLE, COLLATE, LOADER, EVALUATE, PREDICT = range(1, 8)
RANK = 1 << 33  # beyond those as well: rank 0 draws what a single process does
NOISE = (1 << 32) - 1  # noise in the gradients shares no random numbers with the model either
SKIPPED = 1 << 32  # beyond every number of a micro-batch: attempts at one step share no random numbers


def fold_in(key: int, *parts: int) -> int:
    """Mix integers into a key: the same parts give the same key, any other parts an unrelated one.

    Args:
        key: A non-negative integer, 64 bits of which count.
        *parts: Non-negative integers, such as a stream, a step and a micro-batch.

    Returns:
        An integer of 64 bits, every one of which depends on every bit of the parts.

    Example:
        >>> fold_in(0, 1, 2) == fold_in(fold_in(0, 1), 2)
        True
        >>> fold_in(0, 1, 2) == fold_in(0, 2, 1)
        False

    References:
        Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014): the splitmix64 finaliser.
    """
    for part in parts:
        key = (key + 0x9E3779B97F4A7C15 * (part + 1)) & _MASK
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK
        key ^= key >> 31
    return key


def seed_generators(key: int, device: torch.device | None = None) -> None:
    """Seed the global generators of torch, Python and NumPy from a key; wrap the call in `isolated` to restore them.

    Args:
        key: What `fold_in` gave.
        device: The accelerator whose generator is seeded besides the CPU's; None or a CPU device means none.

    Example:
        >>> with isolated():
        ...     seed_generators(fold_in(0, 1))
        ...     first = torch.rand(3)
        ...     seed_generators(fold_in(0, 1))
        ...     bool((torch.rand(3) == first).all())
        True
    """
    low = key & 0xFFFFFFFF  # torch's CPU generator and NumPy take 32 bits
    torch.default_generator.manual_seed(low)
    _seed_python(_PYTHON, key)
    _PYTHON.gauss_next = None
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        try:
            numpy.random.mtrand._rand.seed(low)  # what numpy.random.seed calls, at a third of the time
        except (AttributeError, TypeError):  # a bit generator of the user's choice
            numpy.random.seed(low)
    extra = None if device is None or device.type == "cpu" else _accelerator(device)
    if extra is not None:
        _device_generator(extra).manual_seed(key >> 1)  # signed 64 bits


@attrs.frozen(repr=False)
class _Whole:
    """The random numbers of an accelerator without a list of generators, such as MPS, with the methods of a generator."""

    module: Any

    def manual_seed(self, seed: int) -> None:
        self.module.manual_seed(seed)

    def get_state(self) -> Any:
        return self.module.get_rng_state()

    def set_state(self, state: Any) -> None:
        self.module.set_rng_state(state)


def _device_generator(device: torch.device) -> Any:
    module = module_of(device)
    if getattr(module, "default_generators", None) is None:
        return _Whole(module)
    places = (device.index, module.current_device())  # asking also starts the accelerator, which has no generators before
    return module.default_generators[next(i for i in places if i is not None)]


def _accelerator(device: torch.device | None) -> torch.device | None:
    """The device, if it has a generator of its own."""
    return None if device is None or device.type in ("cpu", "meta") else device


@contextmanager
def isolated(device: torch.device | None = None) -> Iterator[None]:
    """Restore the states of the global generators at the end of the block.

    Args:
        device: The accelerator whose generator is restored besides the CPU's.

    Example:
        >>> before = torch.default_generator.get_state()
        >>> with isolated():
        ...     _ = torch.rand(3)
        >>> bool((torch.default_generator.get_state() == before).all())
        True
    """
    cpu, python = torch.default_generator.get_state(), random.getstate()
    numpy: Any = sys.modules.get("numpy")
    arrays = None if numpy is None else numpy.random.get_state()
    accelerator = _accelerator(device)
    extra = None if accelerator is None else _device_generator(accelerator)
    kept = None if extra is None else extra.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(cpu)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)
        if extra is not None:
            extra.set_state(kept)
