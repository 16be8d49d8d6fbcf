"""A skipped step changes nothing: parameters, optimizer state and buffers stay the same."""

import copy

import pytest
import torch
from torch import nn

from fnlight.optim import buffers_before, step_where
from fnlight.optim.conditional_step import masks

OPTIMIZERS = {
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "fused SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "fused Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
}


def grads(model, seed, bad=False):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    if bad:
        model.weight.grad[0, 0] = torch.inf


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("left_out", [(0,), (2,), (0, 1, 3)])
def test_a_skipped_step_changes_nothing(name, left_out):
    """With some of five steps skipped, parameters and optimizer state are bit-identical to a run of the others, also if the first is skipped."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    plain = copy.deepcopy(model)
    ours, theirs = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](plain.parameters())
    for i in range(5):
        grads(model, i, bad=i in left_out)
        step_where(ours, torch.tensor(i not in left_out))
        if i not in left_out:
            grads(plain, i)
            theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[slot]), torch.as_tensor(b[slot])) for slot in b if b[slot] is not None)
    assert not {"grad_scale", "found_inf"} & vars(ours).keys()


def test_fused_sgd_with_momentum_does_not_skip_in_its_kernel():
    """SGD with momentum would start from uninitialised values if its kernel skipped the first step."""
    model = nn.Linear(3, 2)
    found = {name: masks(make(model.parameters())) for name, make in OPTIMIZERS.items()}
    assert [name for name, on_device in found.items() if on_device] == ["fused Adam", "fused AdamW", "fused SGD", "fused Adagrad"]


@pytest.mark.parametrize("finite", [False, torch.tensor(False)])
def test_buffers_are_restored(finite):
    """For a bool and a tensor; from the second step on, only buffers that change are copied."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    model.register_buffer("table", torch.ones(3))
    model[0].eval()
    model.register_buffer("seen", torch.zeros(()))
    first = buffers_before(model, None)
    model.seen += 1  # as a forward pass does
    model[0].train()
    names = first.changing()
    assert names == ["seen", "0.running_mean", "0.running_var", "0.num_batches_tracked"]
    before = {name: b.clone() for name, b in model.named_buffers()}
    held = buffers_before(model, names)
    assert list(held.held) == names
    model(torch.full((4, 2), torch.nan))
    held.put_back(finite)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_buffers_of_a_finite_step_are_kept():
    """With `finite` True the buffers keep their new values."""
    norm = nn.BatchNorm1d(2)
    held = buffers_before(norm, None)
    norm(torch.randn(4, 2))
    after = {name: b.clone() for name, b in norm.named_buffers()}
    held.put_back(torch.tensor(True))
    assert all(torch.equal(b, after[name]) for name, b in norm.named_buffers())
