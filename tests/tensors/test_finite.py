"""NaN and infinity are found in tensors of every kind, and nothing else is."""

import pytest
import torch

from fnlight.tensors.finite import listed, not_finite

BIG = {torch.float16: 6e4, torch.float32: 3e38, torch.float64: 1e308, torch.bfloat16: 3e38, torch.complex64: 3e38, torch.float8_e5m2: 5e4}


@pytest.mark.parametrize("dtype", BIG, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_one_bad_entry_is_found_at_every_place(dtype, value, place):
    """Large numbers are none, although the sum of their squares is infinite."""
    good = torch.full((3,), BIG[dtype], dtype=torch.float64).to(dtype)
    bad = torch.full((3,), BIG[dtype], dtype=torch.float64)
    bad[place] = value
    named = {"ints": torch.arange(3), "good": good, "bad": bad.to(dtype), "empty": torch.empty(0), "also": torch.ones(())}
    assert not_finite(named) == ["bad"]
    assert not_finite({name: t for name, t in named.items() if name != "bad"}) == []


def test_an_imaginary_part_and_a_sparse_entry_count():
    """Complex and sparse tensors are looked at as they are stored."""
    sparse = torch.sparse_coo_tensor([[1]], torch.tensor([torch.nan]), (3,), check_invariants=False)
    assert not_finite({"z": torch.tensor([complex(1.0, torch.inf)]), "s": sparse, "conj": torch.tensor([1j]).conj()}) == ["z", "s"]
    assert not_finite({}) == not_finite({"n": torch.arange(2)}) == []


def test_many_names_are_cut_short():
    """A message stays readable."""
    assert listed([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert listed(["a"]) == "a"
