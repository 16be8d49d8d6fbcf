"""A loss scale refuses what it cannot mean, and says when it is not the scale that is wrong."""

import pytest
import torch
from torch import nn

import fnlight as fl
from fnlight.precision.loss_scale import unscale


def loss_fn(model, batch):
    return model(batch).float().square().mean()


def configure(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def halves():
    return fl.autocast(torch.float16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"init": 0}, r"loss_scale: init must be above 0, but got 0"),
        ({"growth": 1.0}, r"growth must be above 1, but got 1.0"),
        ({"backoff": 1.0, "interval": 0}, r"backoff must be between 0 and 1, but got 1.0; interval must be a whole number"),
        ({"max_consecutive": "many"}, r"max_consecutive must be a whole number of at least 1, but got 'many'"),
    ],
)
def test_a_scale_that_means_nothing_is_refused(given, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(fl.errors.ConfigError, match=message):
        fl.loss_scale(**given)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([fl.grad(), fl.loss_scale()], r"loss_scale is for fp16, but this step computes in another precision"),
        ([fl.autocast(torch.bfloat16), fl.grad(), fl.loss_scale()], r"put autocast\(torch.float16\) in front of grad\(\)"),
        ([halves(), fl.grad()], r"autocast\(fp16\) trains only with a loss scale"),
        ([halves(), fl.grad(), fl.clip_norm(1.0), fl.loss_scale()], r"clip_norm\(1.0\) stands in front of loss_scale.*move loss_scale"),
        ([halves(), fl.grad(), fl.loss_scale(), fl.microbatch(2)], r"move microbatch in front of loss_scale"),
        (
            [halves(), fl.autocast(torch.bfloat16), fl.grad()],
            r"two combinators have the same name 'autocast', autocast\(fp16\) and autocast\(bf16\)",
        ),
        ([halves(), fl.loss_scale(), fl.grad()], r"loss_scale takes a GradFn"),
    ],
)
def test_company_that_contradicts_itself_is_refused(parts, message):
    """The pipe says what to move where, before any work."""
    with pytest.raises(fl.errors.SeamError, match=message):
        fl.pipe(loss_fn, *parts, fl.apply())


def test_a_part_of_a_step_may_still_be_completed():
    """A pipe that is no step yet lacks nothing; wrapped further, it is checked."""
    inner = fl.pipe(loss_fn, halves(), fl.grad())
    print_out = str(fl.pipe(inner, fl.loss_scale(interval=10), fl.apply()))
    assert print_out == "loss_fn > autocast(fp16) > grad > loss_scale(interval=10) > apply"


def test_what_shows_itself_is_what_was_given():
    """Defaults are left out."""
    assert str(fl.loss_scale()) == "loss_scale"
    assert str(fl.loss_scale(init=8.0, max_consecutive=3)) == "loss_scale(init=8.0, max_consecutive=3)"


def test_gradients_that_never_recover_end_the_run():
    """A data set of infinities would otherwise be skipped for ever."""
    step = fl.pipe(loss_fn, halves(), fl.grad(), fl.loss_scale(max_consecutive=5), fl.apply())
    state = fl.TrainState.create(fl.Task(nn.Linear(2, 1), loss_fn, configure_optimizers=configure))
    with pytest.raises(fl.errors.NonFiniteError, match=r"gradients of 5 steps in a row.*loss scale of 2048"):
        list(fl.run(step, state, [torch.full((2, 2), torch.inf)]))


def test_weights_in_fp16_cannot_be_scaled():
    """It is said before the first step."""
    step = fl.pipe(loss_fn, halves(), fl.grad(), fl.loss_scale(), fl.apply())
    state = fl.TrainState.create(fl.Task(nn.Linear(2, 1).half(), loss_fn, configure_optimizers=configure))
    with pytest.raises(fl.errors.ConfigError, match=r"keeps weights in fp32.*\['weight', 'bias'\] are fp16 themselves"):
        next(fl.run(step, state, [torch.ones(2, 2)]))


def test_a_closure_optimizer_cannot_skip():
    """LBFGS evaluates the loss several times in a step."""
    step = fl.pipe(loss_fn, halves(), fl.grad(), fl.loss_scale(), fl.apply())
    task = fl.Task(nn.Linear(2, 1), loss_fn, configure_optimizers=lambda model: torch.optim.LBFGS(model.parameters()))
    with pytest.raises(fl.errors.OptimizerError, match=r"LBFGS evaluates the loss several times.*cannot be skipped"):
        step(fl.TrainState.create(task), torch.ones(2, 2))


def test_unscale_takes_gradients_of_every_kind():
    """Sparse ones and several dtypes, in place; one infinity anywhere is seen."""
    sparse = torch.sparse_coo_tensor([[1]], torch.tensor([4.0]), (3,), check_invariants=False)
    values = [torch.tensor([2.0]), torch.tensor([8.0], dtype=torch.float64), sparse]
    assert unscale(values, torch.tensor(2.0)).item() == 0.0
    assert [v.to_dense().tolist() for v in values] == [[1.0], [4.0], [0.0, 2.0, 0.0]]
    values[1].fill_(torch.nan)
    assert unscale(values, torch.tensor(2.0)).item() == 1.0
    assert unscale([], torch.tensor(2.0)).item() == 0.0


def test_a_skipped_step_leaves_no_trace_in_buffers():
    """The running statistics of a batch of infinities would be infinite for ever."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    step = fl.pipe(loss_fn, halves(), fl.grad(), fl.loss_scale(), fl.apply())
    state = fl.TrainState.create(fl.Task(model, loss_fn, configure_optimizers=configure))
    good, bad = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.full((4, 2), torch.inf)
    state, _ = step(state, good)
    before = {name: b.clone() for name, b in state.buffers.items()}
    params = {name: p.clone() for name, p in state.params.items()}
    state, metrics = step(state, bad)
    assert state.progress.skipped == 1
    assert metrics["skipped"].value == 1
    assert all(torch.equal(b, before[name]) for name, b in state.buffers.items())
    assert all(torch.equal(p, params[name]) for name, p in state.params.items())


def test_the_last_checkpoint_is_of_the_last_attempt(tmp_path):
    """A run whose last batch is skipped saves where it ended, though its step has a checkpoint already."""

    def overflowing(model, batch):
        return (model(batch[0]) * batch[1]).float().square().mean()

    batches = [(torch.ones(2, 2), torch.tensor(v)) for v in (1.0, 1.0, torch.inf)]
    task = fl.Task(nn.Linear(2, 1), overflowing, configure_optimizers=configure)
    config = fl.FitConfig(max_epochs=1, precision="fp16", dir=tmp_path, save_every=fl.steps(1), device="cpu", progress=False)
    state = fl.fit(fl.TrainState.create(task), batches, config)
    found = fl.load(tmp_path, task)
    assert (state.progress.step, state.progress.epoch, state.progress.skipped) == (2, 1, 1)
    assert found.progress == state.progress
    assert found.memory["loss_scale"]["scale"].item() == state.memory["loss_scale"]["scale"].item() == 32768
    assert found.stopped == "1 epochs done"
