"""The combinators of a step compute what a hand-written loop computes."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fnlight.data import Item
from fnlight.errors import DonatedStateError, OptimizerError
from fnlight.gradients import accumulate, clip_norm, clip_value, grad
from fnlight.loop import evaluate, run
from fnlight.optim import Optim
from fnlight.pipe import Combinator, pipe
from fnlight.state import Task, TrainState
from fnlight.step import apply, ema, pure, update
from tests.small_steps import created, data, loss_fn, sgd


def plain(state, *batches, clip=lambda params: None, train_step=loss_fn):
    """The module after one hand-written step on each batch."""
    module = state.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    for batch in batches:
        optimizer.zero_grad()
        train_step(module, batch).backward()
        clip(list(module.parameters()))
        optimizer.step()
    return dict(module.named_parameters())


def same(state, params):
    return all(torch.equal(state.params[name], p) for name, p in params.items())


def test_a_step_is_the_hand_written_one():
    """Gradient and update are those of a plain loop, bitwise."""
    state = created()
    after, metrics = update(state, data())
    assert same(after, plain(state, data()))
    assert torch.equal(metrics["loss"], loss_fn(state.module(), data()).detach())
    assert after.progress.step == 1
    assert after.progress.samples == 4


def test_update_leaves_its_input_and_the_generators_alone():
    """The pure step works on a copy and puts the global generators back."""
    state = created(model=nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)))
    before, random = copy.deepcopy(state.module().state_dict()), torch.default_generator.get_state()
    update(state, data())
    assert all(torch.equal(state.module().state_dict()[k], v) for k, v in before.items())
    assert torch.equal(torch.default_generator.get_state(), random)
    assert torch.equal(update(state, data())[0].params["0.weight"], update(state, data())[0].params["0.weight"])


def test_a_step_donates_its_input():
    """What went in is no longer readable, and the error says what to do."""
    state = created()
    pipe(loss_fn, grad(), apply())(state, data())
    with pytest.raises(DonatedStateError, match=r"state of step 0 was donated to a later step.*fl.pure\(step\)"):
        _ = state.params


def test_a_step_that_fails_half_way_is_not_readable_either():
    """Buffers may have moved already, so nobody is shown a torn state."""

    def failing(model, batch):
        model(batch)
        raise RuntimeError("out of luck")

    state = created(failing, model=nn.BatchNorm1d(3))
    with pytest.raises(RuntimeError, match="out of luck"):
        pipe(failing, grad(), apply())(state, data())
    with pytest.raises(DonatedStateError, match="failed half-way"):
        _ = state.buffers
    with pytest.raises(RuntimeError, match="out of luck"):
        update(fresh := created(failing, model=nn.BatchNorm1d(3)), data())
    assert fresh.buffers["num_batches_tracked"] == 0


def test_gradients_are_gone_as_soon_as_their_place_is_needed():
    """Nobody sees them behind a step; what holds their memory lets go of it before the next, an evaluation, or the end of a run."""
    made = []

    def noted(grad_fn):
        def fn(store, batch, key):
            assert not any(ref() is not None for ref in made), "gradients of the step before"
            found = grad_fn(store, batch, key)
            made.append(weakref.ref(found.values[0]))
            return found

        return fn

    step = pipe(loss_fn, grad(), Combinator("noted", noted, "grad", "grad"), apply())
    state, _ = pure(step)(created(), data())
    assert made[-1]() is None
    for _ in range(3):
        state, _ = step(state, data())
        assert all(p.grad is None for p in state.store.params)
        assert made[-1]() is not None
    held = evaluate(state, [data()], eval_step=lambda model, batch: {"held": torch.tensor(float(made[-1]() is not None))})
    assert held == {"held": 0.0}
    for _state, _ in run(step, state, [data()] * 8):
        break
    assert len(made) == 5
    assert made[-1]() is None


def test_a_schedule_is_a_function_of_completed_steps():
    """The step after k completed ones uses base * schedule(k)."""
    rates = []

    def configure(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: rates.append(opt.param_groups[0]["lr"]))
        return Optim(optimizer, lambda count: 0.5**count)

    state = created(configure=configure)
    step = pipe(loss_fn, grad(), apply())
    for _ in range(3):
        state, _ = step(state, data())
    assert rates == [0.5, 0.25, 0.125]


def test_a_schedule_may_count_epochs():
    """With interval="epoch" it counts completed epochs."""
    state = created(configure=lambda m: Optim(sgd(m), lambda count: 0.5**count, interval="epoch"))
    step = pipe(loss_fn, grad(), apply())
    state, _ = step(state, Item((data(),), 0, 1, False, 4))
    state, _ = step(state, Item((data(),), 0, 2, True, 4))
    assert state.store.optim.optimizer.param_groups[0]["lr"] == 0.1
    assert (state.progress.epoch, state.progress.batch) == (1, 0)
    state, _ = step(state, Item((data(),), 1, 1, False, 4))
    assert state.store.optim.optimizer.param_groups[0]["lr"] == 0.05


def test_parameters_without_a_gradient_stay_as_they_are():
    """What the loss does not depend on keeps None as its gradient, as in a plain loop."""
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})

    def fn(model, batch):
        return F.mse_loss(model["used"](batch), batch)

    def configure(model):
        return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)

    state = created(fn, configure, model)
    after, metrics = pipe(fn, grad(), accumulate(2), clip_norm(1.0), clip_value(1.0), apply())(
        state.copy(), Item.of(data(), data(), state=state)
    )
    assert torch.equal(after.params["idle.weight"], state.params["idle.weight"])
    assert not torch.equal(after.params["used.weight"], state.params["used.weight"])
    assert metrics["grad_norm"] > 0


def test_a_closure_optimizer_evaluates_the_loss_as_often_as_it_likes():
    """LBFGS finds the parameters that it finds in a hand-written loop."""
    state = created(configure=lambda m: torch.optim.LBFGS(m.parameters(), max_iter=5))
    module = state.module()
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=5)

    def closure():
        optimizer.zero_grad()
        loss = loss_fn(module, data())
        loss.backward()
        return loss

    step = pipe(loss_fn, grad(), apply())
    for _ in range(2):
        state, _ = step(state, data())
        optimizer.step(closure)
    assert same(state, dict(module.named_parameters()))


def test_a_model_without_trainable_parameters_can_be_stepped():
    """Buffers move, counts go on, and no optimizer is asked for."""
    model = nn.BatchNorm1d(3, affine=False)
    state = created(lambda m, batch: m(batch).sum(), None, model)
    after, metrics = update(state, data())
    assert after.buffers["num_batches_tracked"] == 1
    assert after.progress.step == 1
    assert "loss" in metrics


def test_a_task_without_an_optimizer_cannot_train():
    """The error says what is missing."""
    with pytest.raises(OptimizerError, match=r"it has no configure_optimizers; give fl.Task one"):
        update(created(configure=None), data())


def test_pure_makes_any_step_pure():
    """A pipe with memory leaves its input readable as well."""
    state = created()
    step = pure(pipe(loss_fn, grad(), apply(), ema(0.9)))
    after, _ = step(state, data())
    assert "ema" not in state.memory
    assert "ema" in after.memory
    assert state.progress.step == 0


def test_a_line_search_sees_the_mean_loss_of_a_group():
    """LBFGS with a line search takes the same steps over two accumulated batches of plain losses as over one batch of both."""
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def train_step(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    def trained(step, *batches):
        task = Task(model, train_step, configure_optimizers=lambda m: torch.optim.LBFGS(m.parameters(), line_search_fn="strong_wolfe"))
        state = TrainState.create(task)
        for _ in range(2):
            state, _ = step(state, Item.of(*batches, state=state))
        return state.params

    whole = trained(pipe(train_step, grad(), apply()), (x, y))
    parts = trained(pipe(train_step, grad(), accumulate(2), apply()), (x[:4], y[:4]), (x[4:], y[4:]))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-7)
