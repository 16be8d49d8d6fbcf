"""`loss_scale`: wrong arguments are refused, skipped steps change nothing, and an error says when the scale is not the cause."""

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
        ({"min_scale": 0.0}, r"min_scale must be at least 2\*\*-126, but got 0.0"),
        ({"init": 1.0, "min_scale": 2.0}, r"min_scale must be at most init=1.0, but got 2.0"),
        ({"max_consecutive": "many"}, r"max_consecutive must be a whole number of at least 1, but got 'many'"),
    ],
)
def test_wrong_arguments_of_loss_scale_are_refused(given, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(fl.errors.ConfigError, match=message):
        fl.loss_scale(**given)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([fl.grad(), fl.loss_scale()], r"loss_scale is for fp16, but this step computes in another precision"),
        ([fl.autocast(torch.bfloat16), fl.grad(), fl.loss_scale()], r"put autocast\(torch.float16\) before grad\(\)"),
        ([halves(), fl.grad()], r"autocast\(fp16\) needs a loss scale"),
        ([halves(), fl.grad(), fl.clip_norm(1.0), fl.loss_scale()], r"clip_norm\(1.0\) comes before loss_scale.*move loss_scale"),
        ([halves(), fl.grad(), fl.loss_scale(), fl.microbatch(2)], r"move microbatch before loss_scale"),
        (
            [halves(), fl.autocast(torch.bfloat16), fl.grad()],
            r"two combinators have the same name 'autocast', autocast\(fp16\) and autocast\(bf16\)",
        ),
        ([halves(), fl.loss_scale(), fl.grad()], r"loss_scale takes a GradFn"),
    ],
)
def test_combinators_that_do_not_fit_together_are_refused(parts, message):
    """`pipe` raises an error that says what to move, before any work."""
    with pytest.raises(fl.errors.SeamError, match=message):
        fl.pipe(loss_fn, *parts, fl.apply())


def test_an_incomplete_pipe_can_be_completed_later():
    """A pipe that is not a step yet is not refused; the complete one is checked."""
    inner = fl.pipe(loss_fn, halves(), fl.grad())
    print_out = str(fl.pipe(inner, fl.loss_scale(interval=10), fl.apply()))
    assert print_out == "loss_fn > autocast(fp16) > grad > loss_scale(interval=10) > apply"


def test_the_text_of_loss_scale_shows_the_given_arguments():
    """Defaults are left out."""
    assert str(fl.loss_scale()) == "loss_scale"
    assert str(fl.loss_scale(init=8.0, max_consecutive=3)) == "loss_scale(init=8.0, max_consecutive=3)"


def test_gradients_that_never_recover_end_the_run():
    """Without the limit, a data set of infinities would be skipped forever."""
    step = fl.pipe(loss_fn, halves(), fl.grad(), fl.loss_scale(max_consecutive=5), fl.apply())
    state = fl.TrainState.create(fl.Task(nn.Linear(2, 1), loss_fn, configure_optimizers=configure))
    with pytest.raises(
        fl.errors.NonFiniteError, match=r"gradients of 5 steps were NaN or infinite, and the loss scale, 2048 by now, has not grown"
    ):
        list(fl.run(step, state, [torch.full((2, 2), torch.inf)]))


def scaled_run(data, **given):
    """The states of a run on these batches."""
    step = fl.pipe(loss_fn, halves(), fl.grad(), fl.loss_scale(**given), fl.apply(), fl.stop_when(fl.max_epochs(1)))
    return fl.run(step, fl.TrainState.create(fl.Task(nn.Linear(4, 1), loss_fn, configure_optimizers=configure)), data)


GOOD, BAD = torch.ones(2, 4), torch.full((2, 4), torch.nan)


def test_skips_that_alternate_with_good_steps_end_the_run():
    """One good step does not make the skipped ones forgotten, or the scale would fall to 0 and every weight become NaN."""
    with pytest.raises(fl.errors.NonFiniteError, match=r"gradients of 100 steps.*6.10352e-05 by now, has not grown in between"):
        list(scaled_run([BAD, GOOD] * 170))


def test_the_scale_never_falls_below_the_smallest():
    """However many steps are skipped, the scale stays a number to divide by, and the weights stay finite."""
    found = list(scaled_run([BAD, GOOD] * 170, max_consecutive=1000, min_scale=0.25))
    assert min(metrics["loss_scale"].value for _, metrics in found) == 0.25
    state = found[-1][0]
    assert all(p.isfinite().all() for p in state.params.values())
    assert state.memory["loss_scale"]["scale"] == 0.25


def test_skips_are_forgotten_once_the_scale_has_grown():
    """Steps that are skipped now and then, as dynamic scaling means it, do not end a run."""
    *_, (state, _) = scaled_run([BAD, GOOD, GOOD] * 20, interval=2, max_consecutive=2)
    assert state.progress.skipped == 20
    assert state.memory["loss_scale"]["scale"] == 65536.0


def test_a_gradient_that_becomes_infinite_when_it_is_divided_is_skipped():
    """With a scale below 1 the gradient that is applied is larger than the one that came: the test looks at what is applied."""

    def steep(model, batch):
        return (model.weight * 3e38 * 4).sum()

    step = fl.pipe(steep, halves(), fl.grad(), fl.loss_scale(init=2.0**-10), fl.apply())
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    state, metrics = step(fl.TrainState.create(fl.Task(model, steep, configure_optimizers=configure)), torch.ones(1, 1))
    assert metrics["skipped"].value == 1
    assert state.params["weight"].item() == 0.0


def test_weights_in_fp16_are_refused():
    """The error is raised before the first step."""
    step = fl.pipe(loss_fn, halves(), fl.grad(), fl.loss_scale(), fl.apply())
    state = fl.TrainState.create(fl.Task(nn.Linear(2, 1).half(), loss_fn, configure_optimizers=configure))
    with pytest.raises(fl.errors.ConfigError, match=r"keeps weights in fp32.*\['weight', 'bias'\] are in fp16"):
        next(fl.run(step, state, [torch.ones(2, 2)]))


def test_a_closure_optimizer_cannot_skip():
    """LBFGS evaluates the loss several times per step, so its step cannot be skipped."""
    step = fl.pipe(loss_fn, halves(), fl.grad(), fl.loss_scale(), fl.apply())
    task = fl.Task(nn.Linear(2, 1), loss_fn, configure_optimizers=lambda model: torch.optim.LBFGS(model.parameters()))
    with pytest.raises(fl.errors.OptimizerError, match=r"LBFGS evaluates the loss several times.*cannot be skipped"):
        step(fl.TrainState.create(task), torch.ones(2, 2))


def test_unscale_takes_gradients_of_every_kind():
    """Sparse gradients and several dtypes are divided in place, and a single infinity is found."""
    sparse = torch.sparse_coo_tensor([[1]], torch.tensor([4.0]), (3,), check_invariants=False)
    values = [torch.tensor([2.0]), torch.tensor([8.0], dtype=torch.float64), sparse]
    assert unscale(values, torch.tensor(2.0)).item() == 0.0
    assert [v.to_dense().tolist() for v in values] == [[1.0], [4.0], [0.0, 2.0, 0.0]]
    values[1].fill_(torch.nan)
    assert unscale(values, torch.tensor(2.0)).item() == 1.0
    assert unscale([], torch.tensor(2.0)).item() == 0.0


def test_a_skipped_step_does_not_change_buffers():
    """Otherwise the running statistics after a batch of infinities would stay infinite."""
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
    """If the last batch is skipped, the final state is saved, although its step already has a checkpoint."""

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
