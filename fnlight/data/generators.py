"""Random numbers of a data set's own: generators and transforms that it holds are keyed for each sample, as the global generators are.

Not part of `fnlight.tensors.rng`, which seeds what belongs to the process: what is seeded here belongs to the user's data.
"""

import inspect
import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fnlight.data.parts import parts
from fnlight.tensors import fold_in

Reseed = Callable[[int], Any]


def own_generators(dataset: Any) -> tuple[Reseed, ...]:
    """What seeds the random numbers that a data set draws from generators of its own, or of its transforms.

    These are the generators of torch, Python and NumPy in its attributes, and transforms that can be seeded: ``set_random_seed`` of
    albumentations, ``set_random_state`` of MONAI.

    Args:
        dataset: A map-style data set.

    Returns:
        Functions of a key.

    Example:
        >>> from types import SimpleNamespace
        >>> data = SimpleNamespace(rng=random.Random())
        >>> [reseed(7) for reseed in own_generators(data)], data.rng.random() == random.Random(fold_in(7, 0)).random()
        ([None], True)
    """
    found: list[Callable[..., Any]] = []
    seeded: list[str] = []
    for path, node in parts(dataset):
        if any(path.startswith(f"{each}.") for each in seeded):
            continue  # who is seeded seeds its own
        transform = _transform(node)
        if transform is not None:
            found.append(transform)
            seeded.append(path)
        else:
            found += [each for value in vars(node).values() if (each := _generator(value)) is not None]
    return tuple(partial(_folded, reseed, place) for place, reseed in enumerate(found))


def _folded(reseed: Reseed, place: int, key: int) -> None:
    reseed(fold_in(key, place))


def _transform(node: Any) -> Reseed | None:
    by_generators = getattr(node, "set_random_state", None)
    if not callable(by_generators) or inspect.isclass(node):
        return None
    names = list(inspect.signature(by_generators).parameters)
    if names[:1] == ["seed"]:
        return partial(_by_seed, by_generators)
    return partial(_by_generators, by_generators) if names[:2] == ["random_generator", "py_random"] else None


def _by_seed(set_random_state: Callable[..., Any], key: int) -> None:
    set_random_state(seed=key & 0xFFFFFFFF)


def _by_generators(set_random_state: Callable[..., Any], key: int) -> None:
    numpy: Any = sys.modules["numpy"]
    set_random_state(numpy.random.default_rng(key), random.Random(key))


def _generator(value: Any) -> Reseed | None:
    if isinstance(value, torch.Generator):
        return partial(_torch, value)
    if isinstance(value, random.Random):
        return value.seed
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return partial(_numpy, value)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return partial(_legacy, value)
    return None


def _torch(generator: torch.Generator, key: int) -> None:
    generator.manual_seed(key >> 1)  # signed 64 bits


def _numpy(generator: Any, key: int) -> None:
    bits = generator.bit_generator
    bits.state = type(bits)(key).state


def _legacy(generator: Any, key: int) -> None:
    generator.seed(key & 0xFFFFFFFF)
