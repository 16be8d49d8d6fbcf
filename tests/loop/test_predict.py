"""Predictions come once a batch, in the order of the loader, and leave everything as it was."""

import gc
import weakref

import torch
from torch import nn

from fnlight.gradients import grad
from fnlight.loop import collect, predict
from fnlight.pipe import pipe
from fnlight.step import apply
from tests.loop.test_evaluate import created, loader, rows, train_step


def test_predictions_come_in_the_order_of_the_loader():
    """Concatenated outputs are the module's output on all data."""
    state = created()
    module = state.module().eval()
    with torch.no_grad():
        assert torch.allclose(torch.cat(collect(predict(state, loader()))), module(rows()), atol=1e-6)


def test_a_state_may_train_on_while_predictions_are_read():
    """Predictions are those of the state they were asked of, also after it was donated."""
    state = created(model=nn.Linear(3, 3))
    expected = collect(predict(state, loader()))
    outputs = predict(state, loader())
    got = [next(outputs)]
    assert torch.is_grad_enabled()
    pipe(train_step, grad(), apply())(state, rows())
    got += list(outputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_predict_holds_no_more_than_one_batch():
    """What was yielded is free as soon as the caller lets go of it."""
    state = created(model=nn.Linear(3, 3))
    seen = []
    for out in predict(state, [rows(2) for _ in range(4)]):
        seen.append(weakref.ref(out))
        del out
        gc.collect()
        assert [ref() for ref in seen[:-1]] == [None] * (len(seen) - 1)
    assert len(seen) == 4


def test_predict_works_on_the_state_itself_when_donated():
    """donate=True makes no copy of the module."""
    state = created(predict_step=lambda model, batch: id(model))
    assert next(predict(state, loader(), donate=True)) == id(state.store.module)
    assert next(predict(state, loader())) != id(state.store.module)


def test_predictions_can_be_trained_on():
    """Outputs are ordinary tensors: they may be inputs and targets of another training."""
    out = collect(predict(created(), [rows()]))[0]
    weight = torch.ones(3, requires_grad=True)
    (out * weight).sum().backward()
    assert torch.equal(weight.grad, out.sum(0))
