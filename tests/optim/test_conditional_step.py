"""What is left out leaves nothing behind: parameters, memory and buffers stay as they were."""

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
def test_a_step_that_is_left_out_is_as_if_it_had_never_been(name, left_out):
    """With some of five steps masked, parameters and memory are bitwise those of the others alone, the first step masked or not."""
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


def test_only_kernels_that_start_rightly_are_asked_to_mask():
    """SGD with momentum would begin with whatever memory held if its first step were masked in the kernel."""
    model = nn.Linear(3, 2)
    found = {name: masks(make(model.parameters())) for name, make in OPTIMIZERS.items()}
    assert [name for name, on_device in found.items() if on_device] == ["fused Adam", "fused AdamW", "fused SGD", "fused Adagrad"]


@pytest.mark.parametrize("finite", [False, torch.tensor(False)])
def test_buffers_are_put_back(finite):
    """Whether the host or the device knows; only those that change are copied from the second time on."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    model.register_buffer("table", torch.ones(3))
    model[0].eval()
    model.register_buffer("seen", torch.zeros(()))
    first = buffers_before(model, None)
    model.seen += 1  # by a forward pass
    model[0].train()
    names = first.changing()
    assert names == ["seen", "0.running_mean", "0.running_var", "0.num_batches_tracked"]
    before = {name: b.clone() for name, b in model.named_buffers()}
    held = buffers_before(model, names)
    assert list(held.held) == names
    model(torch.full((4, 2), torch.nan))
    held.put_back(finite)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_buffers_of_a_step_that_counts_stay():
    """A mask that lets everything through changes nothing."""
    norm = nn.BatchNorm1d(2)
    held = buffers_before(norm, None)
    norm(torch.randn(4, 2))
    after = {name: b.clone() for name, b in norm.named_buffers()}
    held.put_back(torch.tensor(True))
    assert all(torch.equal(b, after[name]) for name, b in norm.named_buffers())
