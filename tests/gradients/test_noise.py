"""Noise follows from the seed and the step, and is annealed."""

import math

import pytest
import torch
from torch import nn

import fnlight as fl


def still(model, batch):
    """A loss whose gradient is zero."""
    return (model(batch) * 0).sum()


def steps_of(*parts, seed=0, fn=still):
    with fl.tensors.isolated():
        torch.manual_seed(0)
        model = nn.Linear(200, 200)
    task = fl.Task(model, fn, configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=1.0))
    state = fl.TrainState.create(task, seed=seed)
    step, found = fl.pipe(fn, fl.grad(), *parts, fl.apply()), []
    before = state.params["weight"].clone()
    for _ in range(3):
        state, _ = step(state, torch.ones(1, 200))
        found.append(before - state.params["weight"])
        before = state.params["weight"].clone()
    return found


def test_the_noise_has_the_variance_of_the_paper():
    """sigma^2 = eta / (1 + t)^gamma, at steps 0, 1 and 2."""
    for t, noise in enumerate(steps_of(fl.grad_noise(0.3, gamma=0.55))):
        assert noise.std().item() == pytest.approx(math.sqrt(0.3 / (1 + t) ** 0.55), rel=0.02)
        assert abs(noise.mean().item()) < 0.01


def test_the_noise_is_a_function_of_seed_and_step():
    """One seed gives one noise, another seed another one, and each step its own."""
    first, again, other = (steps_of(fl.grad_noise(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first[2], again[2])
    assert not torch.equal(first[0], other[0])
    assert abs(torch.corrcoef(torch.stack([first[0].flatten(), first[1].flatten()]))[0, 1].item()) < 0.02


def test_the_noise_is_not_that_of_the_model():
    """What dropout draws in the same step is independent of it."""
    seen = []

    def drawing(model, batch):
        seen.append(torch.randn(200, 200))
        return still(model, batch)

    noise = steps_of(fl.grad_noise(1.0, gamma=0.0), fn=drawing)
    assert abs(torch.corrcoef(torch.stack([noise[0].flatten(), seen[0].flatten()]))[0, 1].item()) < 0.02


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fl.grad_noise(0.0), r"grad_noise must be a finite number above 0, but got 0.0"),
        (lambda: fl.grad_noise(gamma=-1), r"grad_noise\(gamma=...\) must be a finite number of at least 0, but got -1"),
    ],
)
def test_a_noise_that_means_nothing_is_refused(make, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(fl.errors.ConfigError, match=message):
        make()
