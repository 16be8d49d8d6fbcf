"""A pipe joins what fits, says what does not, and gives every combinator its memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fnlight.compile import compile  # noqa: A004  # as users import it
from fnlight.errors import MemoryWarning, MonitorError, SeamError
from fnlight.gradients import accumulate, clip_norm, grad
from fnlight.pipe import Combinator, pipe
from fnlight.pipe.combinator import TICK
from fnlight.precision import autocast
from fnlight.state import Task, TrainState
from fnlight.step import apply, ema
from fnlight.triggers import patience


def train_step(model, batch):
    """A loss."""
    return F.mse_loss(model(batch), batch)


def created(**options):
    model = nn.Linear(2, 2)
    return TrainState.create(Task(model, train_step, configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.1), **options))


def counting(name="counting", **options):
    """A Step combinator that counts its calls in the memory."""

    def wrap(step):
        def counted(state, batch):
            state, metrics = step(state, batch)
            state.store.memory[name]["calls"] += 1
            return state, metrics

        return counted

    return Combinator(name, wrap, "step", "step", init=lambda store: {"calls": torch.zeros(())}, **options)


def test_a_pipe_is_its_functions_applied_in_order():
    """`pipe(x, f, g)` is `g(f(x))`."""
    add = Combinator("add", lambda fn: lambda model, batch: fn(model, batch) + 1, "loss", "loss")
    double = Combinator("double", lambda fn: lambda model, batch: fn(model, batch) * 2, "loss", "loss")
    assert pipe(lambda model, batch: batch, add, double)(None, 3) == 8
    assert double(add(lambda model, batch: batch))(None, 3) == 8


def test_a_pipe_prints_in_reading_order():
    """The text names every combinator with its arguments."""
    step = pipe(train_step, autocast(), grad(), accumulate(4), clip_norm(1.0), apply(), ema(0.99))
    assert str(step) == "train_step > autocast(bf16) > grad > accumulate(4) > clip_norm(1.0) > apply > ema(0.99)"
    assert repr(step) == str(step)
    assert step.batches_per_step == 4


def test_a_pipe_can_be_wrapped_further():
    """A pipe of a pipe is one pipe, with one list of combinators."""
    whole = pipe(pipe(train_step, grad()), clip_norm(1.0), apply())
    assert str(whole) == "train_step > grad > clip_norm(1.0) > apply"
    state, metrics = whole(created(), torch.ones(3, 2))
    assert state.progress.step == 1
    assert set(metrics) == {"loss", "grad_norm"}


@pytest.mark.parametrize(("n", "batches"), [(1, 2), (4, 8), ({0: 1, 5: 3}, {0: 2, 5: 6})])
def test_a_pipe_that_is_wrapped_further_consumes_as_many_batches(n, batches):
    """Updates of several batches, several in one call: what is added around them changes nothing of that."""
    whole = pipe(train_step, grad(), accumulate(n), apply(), compile("trace", unroll=2))
    assert whole.batches_per_step == batches
    assert pipe(whole, counting()).batches_per_step == batches


def test_a_users_own_step_takes_step_combinators():
    """The innermost function is what the first combinator takes."""

    def own_step(state, batch):
        return state, {"loss": torch.tensor(batch)}

    step = pipe(own_step, counting())
    state, _ = step(created(), 1.0)
    step(state, 1.0)
    assert state.store.memory["counting"]["calls"] == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pipe(train_step, grad(), apply(), clip_norm(1.0)), r"clip_norm\(1.0\) takes a GradFn of a group.*after apply it gets a Step.*move clip_norm\(1.0\) between grad\(\) and apply\(\)"),
        (lambda: pipe(train_step, clip_norm(1.0), grad(), apply()), r"grad takes a LossFn.*after clip_norm\(1.0\) it gets a GradFn of a group.*move grad before clip_norm\(1.0\)"),
        (lambda: pipe(train_step, accumulate(2), clip_norm(1.0), grad(), apply()), r"after clip_norm\(1.0\) it gets.*move grad before accumulate\(2\)"),
        (lambda: pipe(train_step, grad(), autocast()), r"autocast\(bf16\) takes a LossFn.*after grad.*move autocast\(bf16\) before grad\(\)"),
        (lambda: pipe(train_step, grad(), clip_norm(1.0), accumulate(2)), r"accumulate\(2\) takes a GradFn of one batch.*move accumulate\(2\) directly after grad\(\)"),
        (lambda: pipe(train_step, autocast(), apply()), r"apply takes a GradFn.*after autocast\(bf16\) it gets a LossFn.*put grad\(\) before apply"),
        (lambda: pipe(train_step, autocast(), ema(0.9)), r"put grad\(\) and apply\(\) before ema\(0.9\)"),
        (lambda: pipe(train_step, grad(), ema(0.9)), r"put apply\(\) before ema\(0.9\)"),
        (lambda: pipe(train_step, grad(), apply), r"got the function apply; call it first, as in apply\(\.\.\.\)"),
        (lambda: pipe(train_step, grad(), 3), r"pipe joins combinators, but got int: 3"),
        (lambda: pipe(None, grad()), r"starts from a function such as task.train_step, but got NoneType"),
        (lambda: pipe(train_step, grad(), apply(), ema(0.9), ema(0.99)), r"two combinators have the same name 'ema', ema\(0.9\) and ema\(0.99\)"),
        (lambda: pipe(train_step, autocast(), autocast(), grad()), r"two combinators have the same name 'autocast', autocast"),
    ],
)  # fmt: skip
def test_a_seam_that_does_not_fit_says_what_to_move_where(make, message):
    """The error names both neighbours, what each takes and gives, and the way out."""
    with pytest.raises(SeamError, match=message):
        make()


def test_two_averages_live_side_by_side_under_two_names():
    """A name of its own makes a second combinator of a kind possible."""
    step = pipe(train_step, grad(), apply(), ema(0.9), ema(0.99, name="slow"))
    state, _ = step(created(), torch.ones(3, 2))
    assert sorted(state.memory) == ["ema", "slow"]


def test_a_tick_has_one_order():
    """Combinators of a phase must stand in the order of the tick."""

    def phased(phase):
        return Combinator(phase, lambda step: step, "step", "step", phase=phase)

    assert pipe(train_step, grad(), apply(), *map(phased, TICK[1:])).kind == "step"
    with pytest.raises(
        SeamError, match=r"evaluate \(evaluate\) comes after save \(save\), but the order of a tick is: .*; move evaluate before save"
    ):
        pipe(train_step, grad(), apply(), phased("save"), phased("evaluate"))


def test_memory_starts_before_the_first_step():
    """`init` sees the store as it is before the first update."""
    state = created()
    before = {name: p.clone() for name, p in state.params.items()}
    step = pipe(train_step, grad(), apply(), ema(0.5))
    after, _ = step(state, torch.ones(3, 2))
    for name, p in after.params.items():
        assert torch.equal(after.memory["ema"][name], torch.lerp(before[name], p, 0.5))


def test_a_combinator_added_later_is_reported_and_starts_afresh():
    """A state that was trained without it has no memory for it."""
    state, _ = pipe(train_step, grad(), apply())(created(), torch.ones(3, 2))
    step = pipe(train_step, grad(), apply(), ema(0.5))
    with pytest.warns(MemoryWarning, match=r"ema\(0.5\) starts with new memory at step 1: the state has none for 'ema'"):
        after, _ = step(state, torch.ones(3, 2))
    assert "ema" in after.memory


def test_a_combinator_removed_later_is_reported_and_its_memory_kept():
    """A pipe that does not own a tree leaves it as it is."""
    state, _ = pipe(train_step, grad(), apply(), ema(0.5))(created(), torch.ones(3, 2))
    kept = {name: value.clone() for name, value in state.memory["ema"].items()}
    with pytest.warns(MemoryWarning, match=r"holds the memory of \['ema'\], which no combinator of this pipe uses; it is kept unchanged"):
        after, _ = pipe(train_step, grad(), apply())(state, torch.ones(3, 2))
    assert all(torch.equal(after.memory["ema"][name], value) for name, value in kept.items())


def test_what_is_adopted_once_is_not_asked_again():
    """A second step through the same pipe neither warns nor starts the memory again."""
    step = pipe(train_step, grad(), apply(), counting())
    state = created()
    for _ in range(3):
        state, _ = step(state, torch.ones(3, 2))
    assert state.memory["counting"]["calls"] == 3


def test_start_and_finish_run_in_reading_order():
    """Each sees the state as its neighbour left it; finish also sees the state before any of them."""
    seen = []

    def hook(name):
        return Combinator(
            name, lambda step: step, "step", "step",
            start=lambda state: seen.append(f"start {name}") or state,
            finish=lambda before, state: seen.append(f"finish {name} {len(before.history)} {len(state.history)}") or state.recorded({name: 1.0}),
        )  # fmt: skip

    step = pipe(train_step, grad(), apply(), hook("a"), hook("b"))
    ended = step.finish(step.start(created()))
    assert seen == ["start a", "start b", "finish a 0 0", "finish b 0 1"]
    assert ended.history[0].metrics == {"a": 1.0, "b": 1.0}


def test_a_monitor_that_nothing_yields_is_an_error_before_the_first_step():
    """Only names that a combinator of the pipe yields, or the history holds, can be monitored."""
    stopping = Combinator("stopping", lambda step: step, "step", "step", requires=patience("val/loss", 3).monitors)
    step = pipe(train_step, grad(), apply(), stopping)
    with pytest.raises(
        MonitorError,
        match=r"stopping monitors 'val/loss', but this run does not record it, so it would have no effect; .*add evaluate_every",
    ):
        step.start(created())
    assert step.start(created().recorded({"val/loss": 1.0})).progress.step == 0
