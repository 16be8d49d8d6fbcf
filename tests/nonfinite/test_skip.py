"""Steps that are left out change nothing and are counted, and too many in a row end the run."""

from itertools import islice

import pytest
import torch
from torch import nn

import fnlight as fl
from fnlight.testing import assert_trees_equal

OPTIMIZERS = {
    "fused AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1),
    "SGD with momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9),
}


def loss_fn(model, batch):
    return (model(batch[0]) * batch[1]).square().mean(), {"scale": batch[1]}


def model_of():
    with fl.tensors.isolated():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def task_of(name="fused AdamW", fn=loss_fn):
    return fl.Task(model_of(), fn, configure_optimizers=OPTIMIZERS[name])


def batches(scales):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, generator=generator), torch.tensor(float(s))) for s in scales]


def after(data, *parts, name="fused AdamW"):
    step = fl.pipe(loss_fn, fl.grad(), *parts, fl.apply(), fl.epoch_means())
    return list(islice(fl.run(step, fl.TrainState.create(task_of(name)), data), len(data)))[-1][0]


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_that_are_not_finite_are_as_if_their_batches_were_not_there(name, bad):
    """Parameters, buffers, optimizer memory and means are bitwise those of a run without them; steps and samples count them."""
    data = batches([1, bad, 1, 1, bad, bad, 1])
    good = [batch for batch in data if bool(torch.isfinite(batch[1]))]
    state = after(data, fl.skip_nonfinite(max_consecutive=3), fl.clip_norm(0.5), name=name)
    plain = after(good, fl.clip_norm(0.5), name=name)
    assert_trees_equal(dict(state.params), dict(plain.params))
    assert_trees_equal(dict(state.buffers), dict(plain.buffers))
    assert_trees_equal({k: dict(v) for k, v in state.opt_state.items()}, {k: dict(v) for k, v in plain.opt_state.items()})
    assert (state.progress.step, state.progress.samples, plain.progress.step) == (7, 28, 4)
    means, expected = state.history[-1].metrics, plain.history[-1].metrics
    assert means["train/skipped"] == 3
    assert {k: means[k] for k in ("train/loss", "train/scale")} == {k: expected[k] for k in ("train/loss", "train/scale")}
    assert state.memory["skip_nonfinite"]["worst"].item() == 2


def test_too_many_in_a_row_end_the_run_and_name_the_gradients():
    """The error names the parameters, and its note the place."""

    def half_bad(model, batch):
        return model[2](model[1](model[0](batch[0]).detach())).mean() * batch[1]

    step = fl.pipe(half_bad, fl.grad(), fl.skip_nonfinite(max_consecutive=2), fl.apply())
    state = fl.TrainState.create(task_of(fn=half_bad))
    with pytest.raises(
        fl.errors.NonFiniteError, match=r"2 steps in a row were skipped.*gradients of: 1\.weight, 1\.bias, 2\.weight, 2\.bias;"
    ) as error:
        list(fl.run(step, state, batches([1, 1, "nan", "nan", 1, 1])))
    assert error.value.__notes__ == ["at step 4, in epoch 0, up to its batch 4"]


def test_what_was_left_out_last_is_seen_at_the_end_of_a_run():
    """A run that ends between two looks does not hide it."""
    config = fl.FitConfig(max_epochs=1, nonfinite="skip", device="cpu", progress=False)
    with pytest.raises(fl.errors.NonFiniteError, match=r"10 steps in a row"):
        fl.fit(fl.TrainState.create(task_of()), batches([1] * 5 + ["nan"] * 10), config)
    fine = fl.fit(fl.TrainState.create(task_of()), batches([1] * 5 + ["nan"] * 9), config)
    assert fine.history[-1].metrics["train/skipped"] == 9


def test_gradients_alone_may_be_infinite():
    """A finite loss with an infinite gradient is left out too."""

    def root(model, batch):
        return model(batch[0]).mean() + (model[2].bias * 0).abs().sqrt().sum()

    step = fl.pipe(root, fl.grad(), fl.skip_nonfinite(), fl.apply())
    state = fl.TrainState.create(task_of(fn=root))
    before = {k: v.clone() for k, v in state.params.items()}
    state, metrics = step(state, batches([1])[0])
    assert metrics["skipped"].value.item() == 1
    assert_trees_equal(dict(state.params), before)


def test_a_spike_is_left_out_once_the_window_is_full():
    """It is judged by the losses before it, and neither it nor a NaN enters the window."""
    data = batches([1.0, 1.01, 0.99, 1.02, 50.0, 1.0, 1.0])
    flat = [(torch.ones(4, 3), scale) for _, scale in data]
    step = fl.pipe(lambda m, b: m(b[0]).mean() * 0 + b[1], fl.grad(), fl.skip_spikes(sigma=6, window=4), fl.apply())
    state, spikes = fl.TrainState.create(task_of()), []
    for batch in flat:
        state, metrics = step(state, batch)
        spikes.append(metrics["spikes"].value.item())
    assert spikes == [0, 0, 0, 0, 1, 0, 0]
    assert sorted(state.memory["skip_spikes"]["losses"].tolist()) == pytest.approx([0.99, 1.0, 1.0, 1.02])
    early = fl.TrainState.create(task_of())
    early, metrics = step(early, flat[4])
    assert metrics["spikes"].value.item() == 0


def test_a_group_of_more_batches_is_no_spike():
    """Of plain losses that are accumulated the mean counts, so groups of one, two and four batches are compared with each other."""
    step = fl.pipe(lambda m, b: m(b[0]).mean() * 0 + b[1], fl.grad(), fl.accumulate(4), fl.skip_spikes(sigma=6, window=3), fl.apply())
    state, x = fl.TrainState.create(task_of()), torch.ones(2, 3)
    for count in (1, 2, 1, 4):
        state, metrics = step(state, fl.data.Item.of(*[(x, torch.tensor(1.0))] * count, state=state))
        assert metrics["spikes"].value.item() == 0
    assert state.memory["skip_spikes"]["losses"].tolist() == [1.0, 1.0, 1.0]


def test_a_spike_changes_no_weight():
    """The step of a spike leaves parameters and buffers as they were."""
    step = fl.pipe(loss_fn, fl.grad(), fl.skip_spikes(sigma=3, window=3), fl.apply())
    state = fl.TrainState.create(task_of())
    for batch in batches([1, 1, 1]):
        state, _ = step(state, batch)
    before = {k: v.clone() for k, v in (*state.params.items(), *state.buffers.items())}
    state, metrics = step(state, batches([1000])[0])
    assert metrics["spikes"].value.item() == 1
    assert_trees_equal({**state.params, **state.buffers}, before)


def test_a_loss_that_has_moved_for_good_ends_the_run():
    """Nothing would be trained any more."""
    data = [(torch.ones(4, 3), torch.tensor(v)) for v in [1.0, 1.1, 0.9] + [9.0] * 6]
    step = fl.pipe(lambda m, b: m(b[0]).mean() * 0 + b[1], fl.grad(), fl.skip_spikes(3.0, window=3, max_consecutive=3), fl.apply())
    with pytest.raises(fl.errors.NonFiniteError, match=r"more than 3 standard deviations above its mean for 3 steps in a row"):
        list(islice(fl.run(step, fl.TrainState.create(task_of()), data), 9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fl.skip_nonfinite(0), r"skip_nonfinite\(max_consecutive=...\) must be None or a whole number of at least 1, but got 0"),
        (lambda: fl.skip_spikes(sigma=0), r"sigma=...\) must be a finite number above 0, but got 0"),
        (lambda: fl.skip_spikes(window=1), r"window=...\) must be a whole number of at least 2, but got 1"),
        (lambda: fl.skip_spikes(max_consecutive=True), r"skip_spikes\(max_consecutive=...\) must be None or"),
    ],
)
def test_a_skip_that_means_nothing_is_refused(make, message):
    """Arguments are checked when the combinator is made."""
    with pytest.raises(fl.errors.ConfigError, match=message):
        make()


def test_what_could_hide_a_nan_stands_behind():
    """clip_value makes an infinity finite."""
    with pytest.raises(fl.errors.SeamError, match=r"clip_value\(1.0\) comes before skip_nonfinite and may hide"):
        fl.pipe(loss_fn, fl.grad(), fl.clip_value(1.0), fl.skip_nonfinite(), fl.apply())
