"""The tools for tests find what they promise to find, and name it."""

import attrs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fnlight import Mean, Optim, Task, TrainState, apply, ema, grad, pipe, update
from fnlight.errors import ConfigError, FnlightError, StepError, TaskCheckError
from fnlight.state import Record
from fnlight.testing import RecordingSink, assert_pure, assert_trees_equal, check_task, tiny_batches, tiny_task, trees_equal
from fnlight.testing.compare import next_numbers

KINDS = ("mlp", "convnet", "tokens")


class Net(nn.Module):
    """A linear layer whose forward may be given a twist."""

    def __init__(self, twist=None):
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.spare = nn.Linear(2, 2)
        self.spare.requires_grad_(False)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))
        self.twist = twist

    def forward(self, x):
        out = self.lin(x)
        return out if self.twist is None else self.twist(self, out)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def loss_of(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def task_of(train_step=loss_of, twist=None, **given):
    torch.manual_seed(0)
    return Task(Net(twist), train_step, **{"configure_optimizers": adam, **given})


def broken(check, match, task, batch=None):
    """The check finds it, and is the first one that does."""
    with pytest.raises(TaskCheckError, match=match) as caught:
        check_task(task, tiny_batches()[0] if batch is None else batch)
    message = str(caught.value)
    return message.startswith(f"{check}: ") and f"skip=['{check}']" in message


@pytest.mark.parametrize("kind", KINDS)
def test_the_tiny_tasks_keep_every_law(kind):
    """Each tiny task passes all checks, and none of them is skipped."""
    report = check_task(tiny_task(kind), tiny_batches(kind)[0])
    assert (len(report.checked), report.skipped) == (9, {})


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_tasks_and_batches_are_functions_of_their_seed(kind):
    """The same arguments give the same model and data, another seed gives others, and no generator is moved."""
    before = next_numbers()
    assert trees_equal([tiny_task(kind).model, tiny_batches(kind)], [tiny_task(kind).model, tiny_batches(kind)])
    assert not trees_equal(tiny_task(kind, seed=1).model, tiny_task(kind).model)
    assert not trees_equal(tiny_batches(kind, seed=1), tiny_batches(kind))
    assert next_numbers() == before


def test_tiny_batches_come_as_asked():
    """Number and size of the batches are arguments, and an unknown kind is refused."""
    batches = tiny_batches("convnet", num_batches=2, batch_size=5)
    assert [x.shape for x, _ in batches] == [(5, 1, 6, 6)] * 2
    with pytest.raises(ConfigError, match="no tiny task called 'gpt'; there are mlp, convnet, tokens"):
        tiny_batches("gpt")
    with pytest.raises(ConfigError, match="no tiny task called 'gpt'"):
        tiny_task("gpt")


def test_a_check_is_an_assertion_and_an_fnlight_error():
    """What `check_task` raises reads as a failed assertion in a test, and is caught with the others of fnlight."""
    assert issubclass(TaskCheckError, AssertionError)
    assert issubclass(TaskCheckError, FnlightError)


def test_a_step_that_counts_its_calls_is_not_deterministic():
    """A train_step whose result changes from call to call is found, and the differing places are named."""
    calls = []

    def train_step(model, batch):
        calls.append(1)
        return loss_of(model, batch) * len(calls)

    assert broken("deterministic", r"(?s)differs in.*loss: largest difference.*gradient/lin\.weight", task_of(train_step))


def test_a_generator_of_ones_own_is_not_deterministic():
    """Random numbers from a generator that fnlight does not seed are found."""
    own = torch.Generator().manual_seed(0)

    def train_step(model, batch):
        return loss_of(model, batch) + torch.rand((), generator=own)

    assert broken("deterministic", r"not from one of your own", task_of(train_step))


def test_a_step_that_seeds_is_not_keyed():
    """A train_step that seeds a global generator itself, and so draws the same numbers at each step, is found."""

    def train_step(model, batch):
        torch.manual_seed(0)
        return loss_of(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))

    assert broken("keyed", r"seeds the global generator of torch itself", task_of(train_step))


@pytest.mark.parametrize("name", ["train_step", "eval_step", "predict_step"])
def test_a_step_that_changes_its_batch_is_named(name):
    """Each of the three functions is watched for changes of tensors in place and of containers."""

    def in_place(model, batch):
        batch["x"].mul_(2)
        return {"loss": model(batch["x"]).sum()}

    def popping(model, batch):
        batch.pop("y")
        return {"loss": model(batch["x"]).sum()}

    x, y = tiny_batches()[0]
    for step, place in ((in_place, r"x: largest difference"), (popping, r"y: only in the first")):
        given = {"train_step": lambda model, batch: loss_of(model, (batch["x"], batch["y"])), "eval_step": step, "predict_step": step}
        if name == "train_step":
            given = {"train_step": lambda model, batch, step=step: step(model, batch)["loss"]}
        elif name == "predict_step":
            del given["eval_step"]
        batch = {"x": x, "y": y}
        assert broken("batch", rf"{name} changes the batch.*\n.*{place}", task_of(**given), batch)
        assert trees_equal(batch, {"x": x, "y": y})


def remember(model, out):
    model.hidden = out.detach().mean(0)
    return out


def count(model, out):
    model.calls += 1
    return out


def freeze(model, out):
    model.lin.bias.requires_grad_(False)
    return out


def nudge(model, out):
    with torch.no_grad():
        model.spare.weight.add_(1.0)
    return out


def calm(model, out):
    model.eval()
    return out


@pytest.mark.parametrize(
    "twist, place",
    [
        (remember, r"hidden: only in the second"),
        (count, r"calls: 0 against 1"),
        (freeze, r"lin\._parameters/bias/requires_grad: True against False"),
        (nudge, r"spare\._parameters/weight/value: largest difference 1"),
        (calm, r"training: True against False"),
    ],
)
def test_a_model_that_changes_outside_of_its_buffers_is_named(twist, place):
    """Plain attributes, parameters, modes and what is trainable must be as they were after `train_step`."""
    report = ["deterministic", "keyed", "batch"]
    with pytest.raises(TaskCheckError, match=rf"(?s)^model: train_step changes the model.*{place}"):
        check_task(task_of(twist=twist), tiny_batches()[0], skip=report)


def test_a_step_that_goes_backward_itself_is_found():
    """Gradients are for fnlight to compute: a `train_step` that fills them does not train, and one that fills some is named with the parameters."""

    def train_step(model, batch, inputs=None):
        loss_of(model, batch).backward(inputs=inputs)
        return loss_of(model, batch)

    with pytest.raises(StepError, match=r"leave backward\(\) to fnlight, but has gone backward itself"):
        check_task(task_of(train_step), tiny_batches()[0])
    some = task_of(lambda model, batch: train_step(model, batch, [model.lin.bias]))
    assert broken("model", r"lin\.bias\.grad: filled", some)


def test_buffers_may_change_in_training():
    """A running statistic in a buffer is what buffers are for."""

    def train_step(model, batch):
        model.seen += 1
        return loss_of(model, batch)

    assert "model" in check_task(task_of(train_step), tiny_batches()[0]).checked


def test_parameters_without_gradient_are_named():
    """Every trainable parameter that no gradient reaches is listed; frozen ones are not."""

    def train_step(model, batch):
        return F.cross_entropy(F.linear(batch[0], model.lin.weight, model.lin.bias.detach()), batch[1])

    with pytest.raises(TaskCheckError, match=r"^gradients: no gradient reaches\n  lin\.bias\nIs it detached"):
        check_task(task_of(train_step), tiny_batches()[0])


def test_a_gradient_that_is_no_number_is_named():
    """A NaN that arises on the way back only is found where it arrives."""

    def train_step(model, batch):
        return loss_of(model, batch) + torch.sqrt(model.lin.bias.sum() * 0.0)

    assert broken("gradients", r"NaN or infinite in\n  lin\.bias", task_of(train_step))


def test_nothing_trainable_is_no_fault():
    """A task without trainable parameters is checked as far as it goes, and the report says what was left out and why."""
    task = Task(nn.BatchNorm1d(4, affine=False), lambda model, batch: model(batch[0]).mean())
    report = check_task(task, tiny_batches()[0])
    assert report.skipped == {
        "gradients": "nothing is trainable",
        "evaluation": "the task has no eval_step and no predict_step",
        "overfit": "nothing is trainable",
    }
    assert "skipped  overfit: nothing is trainable" in str(report)
    assert "ok       batch: no step changes its batch" in str(report)


@pytest.mark.parametrize("name", ["eval_step", "predict_step"])
def test_evaluation_that_changes_parameters_is_named(name):
    """Neither evaluation nor prediction may change what is trained."""

    def step(model, batch):
        model.lin.bias.data.add_(1.0)
        return {"loss": loss_of(model, batch)}

    assert broken("evaluation", rf"{name} changes the model\n  lin._parameters/bias", task_of(**{name: step}))


@pytest.mark.parametrize("name", ["eval_step", "predict_step"])
def test_evaluation_may_write_buffers(name):
    """They are put back after an evaluation or a prediction, so it is no fault of the task."""

    def step(model, batch):
        model.seen += 1
        return {"loss": loss_of(model, batch)}

    assert "evaluation" in check_task(task_of(**{name: step}), tiny_batches()[0]).checked


@pytest.mark.parametrize(
    "out, match",
    [
        (lambda out: None, r"eval_step gives NoneType: None, no dict of metrics"),
        (lambda out: {}, r"eval_step gives dict: \{\}, no dict of metrics"),
        (lambda out: {"logits": out}, r"metrics \['logits'\] that do not come to one number"),
    ],
)
def test_evaluation_must_give_metrics(out, match):
    """What `eval_step` gives is a dict of values that each come to one number."""
    task = task_of(eval_step=lambda model, batch: out(model(batch[0])))
    assert broken("evaluation", match, task)


@pytest.mark.parametrize("twist", [lambda model, out: out - out.mean(0), lambda model, out: out.softmax(0), lambda model, out: out.flip(0)])
def test_a_leak_between_samples_is_found(twist):
    """A reduction over the batch, a softmax over it and a permutation of it all let one sample see another."""
    assert broken("leak", r"what the model gives for sample 0 changes when other samples", task_of(twist=twist))


def test_a_leak_is_found_in_tokens_too():
    """Whole numbers have no gradient, but samples of them are told apart all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Flatten(), nn.Linear(20, 8))

    def train_step(model, batch):
        out = model(batch[0])
        return F.cross_entropy(out, batch[1][:, 0]), {}

    def predict_step(model, batch):
        return model(batch[0]).cumsum(0)

    check_task(Task(model, train_step, configure_optimizers=adam), tiny_batches("tokens")[0])
    assert broken("leak", r"what predict_step gives", Task(model, train_step, None, predict_step, adam), tiny_batches("tokens")[0])


def test_batch_norm_is_no_leak():
    """Layers that couple samples in training only are no leak: it is looked for in eval mode."""
    assert "leak" in check_task(tiny_task("mlp"), tiny_batches("mlp")[0]).checked


def test_where_samples_cannot_be_told_apart_the_leak_is_not_looked_for():
    """One sample, tensors of different lengths and outputs without a row a sample are reported as skipped, with the reason."""
    x, y = tiny_batches()[0]
    skipped = [
        check_task(task_of(), (x[:1], y[:1]), skip="overfit").skipped["leak"],
        check_task(task_of(lambda model, batch: loss_of(model, batch[:2])), (x, y, torch.zeros(3))).skipped["leak"],
        check_task(task_of(lambda model, batch: loss_of(model.lin, batch)), (x, y)).skipped["leak"],
    ]
    assert skipped == [
        "the batch has one sample only",
        "the tensors of the batch do not agree on a number of samples",
        "neither the model nor predict_step gives a tensor with a row a sample",
    ]


def test_a_loss_that_does_not_fall_is_found():
    """A learning rate of next to nothing, and a loss that is the wrong way up, do not overfit one batch."""
    slow = task_of(configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=1e-9))
    rising = task_of(lambda model, batch: 2 * loss_of(model, batch).detach() - loss_of(model, batch))
    assert broken("overfit", r"the loss on one batch goes from 0\.\d+ to 0\.\d+ in 50 steps", slow)
    assert broken("overfit", r"the loss on one batch goes from", rising)


def test_overfitting_leaves_the_schedule_out():
    """A long warm-up does not look like a loss that does not fall."""
    task = task_of(configure_optimizers=lambda model: Optim(adam(model), schedule=lambda count: 1e-6))
    assert "overfit" in check_task(task, tiny_batches()[0]).checked


def test_overfit_steps_are_counted():
    """`overfit_steps` is how many steps are tried."""
    slow = task_of(configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=1e-3))
    with pytest.raises(TaskCheckError, match=r"in 7 steps, and should fall"):
        check_task(slow, tiny_batches()[0], overfit_steps=7)


def test_what_a_file_cannot_hold_is_found():
    """A module whose extra state does not come back from a file breaks the round trip."""

    class Forgetful(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("born", torch.rand(()), persistent=False)

        def get_extra_state(self):
            return 1

        def set_extra_state(self, state):
            self.born = torch.tensor(float(state))

    assert broken("round_trip", r"buffers/born: largest difference", Task(Forgetful(), loss_of, configure_optimizers=adam))


def test_checks_can_be_left_out_by_name():
    """`skip` names checks that are not made; a name that does not exist is refused with the list of those that do."""
    task = task_of(twist=count)
    report = check_task(task, tiny_batches()[0], skip=("model", "overfit", "round_trip"))
    assert report.skipped["model"] == "asked for"
    with pytest.raises(ConfigError, match=r"no check called \['purity'\]; there are \['deterministic', 'keyed'"):
        check_task(task, tiny_batches()[0], skip=["purity"])


def test_a_bad_loss_keeps_its_own_message():
    """What `train_step` must not return is said in the words of training."""
    with pytest.raises(StepError, match="train_step returned no loss"):
        check_task(task_of(lambda model, batch: None), tiny_batches()[0])


def test_checking_leaves_everything_as_it_was():
    """The task's model, the batch and the global generators are as before."""
    task, batch = tiny_task(), tiny_batches()[0]
    before, drawn = [TrainState.create(task).module(), [t.clone() for t in batch]], next_numbers()
    check_task(task, batch)
    assert trees_equal(before, [task.model, batch])
    assert all(p.grad is None for p in task.model.parameters())
    assert next_numbers() == drawn


def test_uneven_weights_and_schedules_pass():
    """A loss as `Mean(total, weight)` is checked like any other."""

    def train_step(model, batch):
        loss = loss_of(model, batch)
        return Mean(loss * 6, 6), {"twice": 2 * loss}

    assert len(check_task(task_of(train_step, predict_step=lambda model, batch: model(batch[0])), tiny_batches()[0]).checked) == 9


STATE_CHANGES = {
    "params/0.weight": lambda s: s.store.named["0.weight"].data.add_(1),
    "buffers/1.running_mean": lambda s: s.store.module[1].running_mean.add_(1),
    "opt_state/0.weight/exp_avg": lambda s: s.opt_state["0.weight"]["exp_avg"].add_(1),
    "groups/0/lr": lambda s: s.store.optim.optimizer.param_groups[0].update(lr=0.5),
    "memory/ema/0.weight": lambda s: s.memory["ema"]["0.weight"].add_(1),
}


def trained():
    task = tiny_task()
    step = pipe(task.train_step, grad(), apply(), ema(0.5))
    return step(TrainState.create(task), tiny_batches()[0])[0]


@pytest.mark.parametrize("place", STATE_CHANGES)
def test_states_are_compared_part_by_part(place):
    """One changed number in parameters, buffers, optimizer, groups or memory is found and named."""
    a = trained()
    b = a.copy()
    assert trees_equal(a, b)
    STATE_CHANGES[place](b)
    assert not trees_equal(a, b)
    with pytest.raises(AssertionError, match=rf"1 places differ, expected none:\n  {place}: "):
        assert_trees_equal(a, b)


def test_states_differ_in_progress_history_and_seed_but_not_in_time():
    """Counts, history and seed count in a comparison; seconds and why a run ended do not."""
    a = trained()
    assert not trees_equal(a, attrs.evolve(a, progress=attrs.evolve(a.progress, batch=9)))
    assert not trees_equal(a, a.recorded({"val/loss": 0.5}))
    assert not trees_equal(a, attrs.evolve(a, seed=1))
    assert trees_equal(a, attrs.evolve(a, progress=attrs.evolve(a.progress, seconds=9.0), stopped="enough"))


def test_trees_are_compared_bitwise():
    """NaN equals NaN, a dtype is part of a value, arrays are looked into, and every kind of container is walked."""
    numpy = pytest.importorskip("numpy")
    assert trees_equal({"x": [torch.tensor(float("nan"))]}, {"x": [torch.tensor(float("nan"))]})
    assert trees_equal((Mean(torch.ones(()), 2), numpy.arange(3)), (Mean(torch.ones(()), 2), numpy.arange(3)))
    assert not trees_equal(numpy.arange(3), numpy.arange(3) + 1)
    assert not trees_equal(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not trees_equal(torch.tensor(1.0), torch.tensor(1.0).nextafter(torch.tensor(2.0)))
    with pytest.raises(AssertionError, match=r"10 places differ(?s:.*)and 2 more"):
        assert_trees_equal(list(range(10)), list(range(1, 11)))


def test_the_standard_step_is_pure():
    """`update` passes, from a fresh state and from a trained one."""
    assert_pure(update, TrainState.create(tiny_task()), tiny_batches()[0])
    assert_pure(update, update(TrainState.create(tiny_task()), tiny_batches()[0])[0], tiny_batches()[1])


def test_a_step_with_a_memory_of_its_own_is_not_pure():
    """A closure that counts calls gives another result the second time."""
    calls = []

    def step(state, batch):
        calls.append(1)
        return update(state, batch)[0], {"calls": len(calls)}

    with pytest.raises(AssertionError, match=r"(?s)called again on the same state and batch.*1/calls: 1 against 2"):
        assert_pure(step, TrainState.create(tiny_task()), tiny_batches()[0])


def test_a_step_that_reads_the_generators_where_they_stand_is_not_pure():
    """Random numbers that do not follow from the state are found."""
    with pytest.raises(AssertionError, match=r"1/drawn"):
        assert_pure(lambda state, batch: (state, {"drawn": torch.rand(())}), TrainState.create(tiny_task()), tiny_batches()[0])


def test_a_step_that_reaches_the_callers_state_or_batch_is_not_pure():
    """What a step changes behind the back of its copy is found."""
    state, (x, y) = TrainState.create(tiny_task()), tiny_batches()[0]
    weight = state.store.named["0.weight"]

    def reaching(_, batch):
        weight.data.zero_()
        return TrainState.create(tiny_task()), {}

    with pytest.raises(AssertionError, match=r"changes the state that it was given:\n  params/0\.weight"):
        assert_pure(reaching, state, (x, y))
    with pytest.raises(AssertionError, match=r"changes the batch that it was given:\n  0: largest"):
        assert_pure(lambda _, batch: (None, {"x": batch[0].zero_()}), TrainState.create(tiny_task()), (x, y))


def test_a_sink_that_records_keeps_everything():
    """Records, flushes and closings are kept in order, and values are found by step."""
    sink = RecordingSink()
    sink(Record(1, 0, {"train/loss": 0.5}))
    sink(Record(2, 0, {"train/loss": 0.25, "val/loss": 1.0}))
    sink.flush()
    sink.close()
    assert sink.steps("train/loss") == {1: 0.5, 2: 0.25}
    assert sink.steps("val/loss") == {2: 1.0}
    assert (len(sink.records), sink.flushed, sink.closed) == (2, 1, 1)
