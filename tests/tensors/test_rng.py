"""Laws of `fnlight.tensors.rng`: keys that are independent, and generators that are restored."""

import random
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fnlight.tensors import fold_in, isolated, rng, seed_generators

KEYS = st.integers(0, 2**64 - 1)
PARTS = st.lists(st.integers(0, 2**40), min_size=1, max_size=4)


def draws() -> tuple[Any, ...]:
    """One number of each global generator."""
    return torch.rand(()).item(), random.random(), float(np.random.random())  # noqa: NPY002  # the global generator is what is tested


def states() -> tuple[Any, ...]:
    """Where the global generators stand."""
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002  # as above
    return torch.get_rng_state().tolist(), random.getstate(), keys.tolist(), position


@given(KEYS, PARTS)
def test_folding_is_a_pure_function_to_64_bits(key: int, parts: list[int]) -> None:
    """The same parts give the same key, of 64 bits, whether they are folded at once or one by one."""
    found = fold_in(key, *parts)
    assert 0 <= found < 2**64
    for part in parts:
        key = fold_in(key, part)
    assert key == found


@given(KEYS, st.integers(0, 2**32), st.integers(0, 2**32))
def test_the_order_of_parts_matters(key: int, a: int, b: int) -> None:
    """Two different parts folded in the other order give another key."""
    assert (fold_in(key, a, b) == fold_in(key, b, a)) == (a == b)


def test_keys_of_a_run_do_not_meet() -> None:
    """Streams, steps and micro-batches of some seeds give distinct keys, also in the low 32 bits that torch's generator takes."""
    keys = [fold_in(seed, stream, step, part) for seed in range(4) for stream in range(1, 8) for step in range(100) for part in range(4)]
    assert len(set(keys)) == len(keys)
    assert len({key & 0xFFFFFFFF for key in keys}) >= len(keys) - 2  # two of 11,200 meet by chance in one run of seventy


@pytest.mark.parametrize("place", [0, 1])
def test_one_bit_of_a_part_turns_half_of_the_bits_of_the_key(place: int) -> None:
    """Avalanche: on average 32 of 64 bits change with any one bit of a part, and each output bit with probability near 1/2."""
    counts, trials = [0] * 64, 0
    for base in range(40):
        for bit in range(32):
            parts = [base, 7 * base + 1]
            before = fold_in(base, *parts)
            parts[place] ^= 1 << bit
            changed = before ^ fold_in(base, *parts)
            trials += 1
            for i in range(64):
                counts[i] += changed >> i & 1
    assert 31.5 < sum(counts) / trials < 32.5
    assert all(0.42 < count / trials < 0.58 for count in counts)


def test_keys_are_what_they_always_were() -> None:
    """Keys are part of what a checkpoint means, so they never change."""
    assert fold_in(0) == 0
    assert fold_in(0, 0) == 0xE220A8397B1DCDAF  # the first number of splitmix64 from 0
    assert fold_in(0, 1) == 0x6E789E6AA1B965F4  # and the second
    assert [rng.TRAIN, rng.ORDER, rng.SAMPLE, rng.COLLATE, rng.LOADER, rng.EVALUATE, rng.PREDICT] == [1, 2, 3, 4, 5, 6, 7]


@given(KEYS)
def test_a_key_seeds_torch_python_and_numpy(key: int) -> None:
    """From one key all three global generators give the same numbers again, and others from another key."""
    with isolated():
        seed_generators(key)
        first = draws()
        draws()
        seed_generators(key)
        assert draws() == first
        seed_generators(fold_in(key, 1))
        assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_all_bits_of_a_key_count() -> None:
    """Seeds that agree in the 32 bits that torch's generator takes give keys that do not."""
    low, high = 5, 5 + 2**32
    assert (fold_in(low, 1) & 0xFFFFFFFF) != (fold_in(high, 1) & 0xFFFFFFFF)


def test_isolated_puts_all_generators_back() -> None:
    """Whatever is drawn and seeded inside, the generators stand where they stood, and go on as if nothing had happened."""
    before = states()
    with isolated():
        seed_generators(3)
        draws()
    assert states() == before
    expected = draws()
    with isolated():
        pass
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    random.setstate(before[1])
    assert draws()[:2] == expected[:2]


def test_isolated_puts_generators_back_after_an_error() -> None:
    """An exception inside leaves nothing behind either."""
    before = states()

    def fail() -> None:
        with isolated():
            seed_generators(3)
            raise ZeroDivisionError("half-way")

    with pytest.raises(ZeroDivisionError, match="half-way"):
        fail()
    assert states() == before


def test_isolation_nests() -> None:
    """Each level puts back its own place."""
    with isolated():
        seed_generators(1)
        inner = states()
        with isolated():
            seed_generators(2)
            draws()
        assert states() == inner


def test_numpy_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NumPy is not loaded, it is neither seeded nor loaded."""
    before = states()
    monkeypatch.delitem(sys.modules, "numpy")
    with isolated():
        seed_generators(3)
        first = torch.rand(())
        seed_generators(3)
        assert torch.equal(torch.rand(()), first)
    assert "numpy" not in sys.modules
    assert states()[2:] == before[2:]


def listed() -> Any:
    """An accelerator with a list of generators, as CUDA and XPU have, which is empty until it is started."""
    module = SimpleNamespace(default_generators=())

    def current_device() -> int:
        module.default_generators = module.default_generators or (torch.Generator(), torch.Generator())
        return 1

    module.current_device = current_device
    return module


def whole() -> Any:
    """An accelerator with functions only, as MPS has."""
    held = torch.Generator()
    return SimpleNamespace(manual_seed=held.manual_seed, get_rng_state=held.get_state, set_rng_state=held.set_state, held=held)


@pytest.mark.parametrize("index", [None, 0, 1])
def test_the_generator_of_an_accelerator_is_seeded_and_put_back(monkeypatch: pytest.MonkeyPatch, index: int | None) -> None:
    """The generator of the very device, or of the current one, is seeded from the key and put back; others stay."""
    module = listed()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    device = torch.device("cuda") if index is None else torch.device("cuda", index)
    with isolated(device):
        generators = module.default_generators
        before = [g.get_state() for g in generators]
        seed_generators(fold_in(0, 1), device)
        used = 1 if index is None else index
        assert generators[used].initial_seed() == fold_in(0, 1) >> 1
        assert torch.equal(generators[1 - used].get_state(), before[1 - used])
        torch.rand(3, generator=generators[used])
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))


def test_an_accelerator_without_a_list_of_generators_is_seeded_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device module that offers functions only, as MPS does, is seeded and put back through them."""
    module = whole()
    before = module.held.get_state()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    with isolated(torch.device("mps")):
        seed_generators(fold_in(0, 1), torch.device("mps"))
        assert module.held.initial_seed() == fold_in(0, 1) >> 1
    assert torch.equal(module.held.get_state(), before)


def test_devices_without_numbers_of_their_own_need_no_generator() -> None:
    """The CPU's generator is seeded anyway, and the meta device draws nothing."""
    for device in (torch.device("cpu"), torch.device("meta")):
        with isolated(device):
            seed_generators(5, device)
            first = torch.rand(())
            seed_generators(5)
            assert torch.equal(torch.rand(()), first)
