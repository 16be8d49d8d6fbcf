"""Laws of schedules at work: what they count, which groups and options they change, and what a log shows of it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import fnlight as fl
from fnlight.errors import ConfigError, OptimizerError, OptimizerWarning
from fnlight.optim import prepare, reported, set_lr
from fnlight.testing import RecordingSink

BATCHES = [torch.full((n, 3), float(i)) / 9 for i, n in enumerate((4, 4, 2), 1)]


def net() -> nn.Module:
    """A trunk and a head."""
    return nn.ModuleDict({"trunk": nn.Linear(3, 4), "head": nn.Linear(4, 1)})


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean of the squared outputs."""
    return model["head"](model["trunk"](batch)).square().mean()


def groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """A group for the trunk and one for the head."""
    return fl.param_groups(model, {"trunk": {"lr": 0.5}, "head": {"lr": 0.25}}, **options)


def task(configure: Callable[[nn.Module], Any]) -> fl.Task:
    """A task with that optimizer."""
    torch.manual_seed(0)
    return fl.Task(net(), loss, configure_optimizers=configure)


def courses(configure: Callable[[nn.Module], Any], steps: int, key: str = "lr") -> list[list[Any]]:
    """What the option was in each group at each step of a run."""
    seen = []
    step = fl.pipe(loss, fl.grad(), fl.apply(), fl.stop_when(fl.max_steps(steps)))
    for state, _ in fl.run(step, fl.TrainState.create(task(configure)), BATCHES, shuffle=False):
        seen.append([group[key] for group in state.live.optim.optimizer.param_groups])
    return seen


def test_a_schedule_may_count_samples() -> None:
    """With interval="samples" a schedule maps the samples that were seen, however they fell into batches."""
    found = courses(lambda m: fl.Optim(torch.optim.SGD(m.parameters(), lr=1.0), lambda n: 1 / (1 + n), interval="samples"), 5)
    assert [lr for (lr,) in found] == [1 / (1 + n) for n in (0, 4, 8, 10, 14)]


@pytest.mark.parametrize(
    "interval, counts", [("step", [0, 0, 1, 1, 2, 2, 3]), ("epoch", [0, 0, 0, 0, 0, 0, 1]), ("samples", [0, 2, 4, 5, 7, 9, 10])]
)
def test_a_schedule_moves_on_at_its_frequency(interval: Any, counts: list[int]) -> None:
    """With frequency=2 a schedule is given half of what has been completed, rounded down."""
    made = lambda m: fl.Optim(torch.optim.SGD(m.parameters(), lr=1.0), lambda n: 1.0 + n, interval=interval, frequency=2)
    assert [lr - 1 for (lr,) in courses(made, 7)] == counts


def test_each_group_may_have_a_schedule_of_its_own() -> None:
    """A mapping gives each named group its schedule; ``"*"`` is for all others, and without it the others stay as they are."""
    step = lambda n: 0.5**n
    own = courses(lambda m: fl.Optim(torch.optim.SGD(groups(m)), {"trunk": step}), 3)
    assert own == [[0.5, 0.25], [0.25, 0.25], [0.125, 0.25]]
    both = courses(lambda m: fl.Optim(torch.optim.SGD(groups(m)), {"trunk": step, "*": lambda n: 2.0}), 3)
    assert both == [[0.5, 0.5], [0.25, 0.5], [0.125, 0.5]]


def test_groups_without_a_name_are_called_by_their_number() -> None:
    """Groups that were written by hand are scheduled by their index."""
    made = lambda m: torch.optim.SGD([{"params": m["trunk"].parameters()}, {"params": m["head"].parameters()}], lr=1.0)
    assert courses(lambda m: fl.Optim(made(m), {"1": lambda n: 0.5**n}), 3) == [[1.0, 1.0], [1.0, 0.5], [1.0, 0.25]]


def test_weight_decay_and_momentum_may_be_scheduled() -> None:
    """Other options are multiplied as the learning rate is, from what each group was made with."""
    made = lambda m: fl.Optim(
        torch.optim.SGD(fl.param_groups(m, fl.no_decay(), lr=0.1, weight_decay=0.5, momentum=0.8)),
        schedules={"weight_decay": lambda n: 1 + n, "momentum": {"rest": lambda n: 0.5**n}},
    )
    assert courses(made, 3, "weight_decay") == [[0.5, 0.0], [1.0, 0.0], [1.5, 0.0]]
    assert courses(made, 3, "momentum") == [[0.8, 0.8], [0.4, 0.8], [0.2, 0.8]]
    assert courses(made, 3) == [[0.1, 0.1]] * 3


def test_the_momentum_of_adam_is_its_first_beta() -> None:
    """Where an optimizer has betas, a schedule of the momentum changes the first one only."""
    made = lambda m: fl.Optim(torch.optim.AdamW(m.parameters(), betas=(0.8, 0.99)), schedules={"momentum": lambda n: 0.5**n})
    assert courses(made, 3, "betas") == [[(0.8, 0.99)], [(0.4, 0.99)], [(0.2, 0.99)]]


def test_a_plateau_may_stand_beside_another_schedule() -> None:
    """Each group follows its own: one the metric, the other the steps."""
    optim = prepare(
        fl.Optim(
            torch.optim.SGD(groups(model := net())), {"trunk": fl.plateau(0.5, patience=0), "head": lambda n: 0.5**n}, monitor="val/loss"
        ),
        model,
    )
    history = fl.state.History().add(fl.state.Record(1, 0, {"val/loss": 1.0})).add(fl.state.Record(2, 0, {"val/loss": 1.0}))
    set_lr(optim, fl.state.Progress(step=2), history)
    assert [g["lr"] for g in optim.optimizer.param_groups] == [0.25, 0.0625]


def test_a_tensor_learning_rate_of_a_group_keeps_its_place() -> None:
    """A scheduled tensor is filled, never replaced, in whichever group it is."""
    model = net()
    made = torch.optim.AdamW(
        [{"params": model["trunk"].parameters(), "lr": torch.tensor(0.5)}, {"params": model["head"].parameters()}], lr=torch.tensor(0.25)
    )
    optim = prepare(fl.Optim(made, {"0": lambda n: 0.5**n, "*": lambda n: 1.0 + n}), model)
    held = [g["lr"] for g in made.param_groups]
    set_lr(optim, fl.state.Progress(step=2), ())
    assert made.param_groups[0]["lr"] is held[0]
    assert [lr.item() for lr in held] == [0.125, 0.75]


def scheduled(model: nn.Module) -> fl.Optim:
    """An optimizer with a schedule for each group and for weight decay."""
    made = torch.optim.AdamW(groups(model, weight_decay=0.1))
    return fl.Optim(made, {"trunk": fl.wsd(2, 12, 4), "head": fl.cyclic(3)}, schedules={"weight_decay": fl.cosine(12)})


def test_a_run_that_is_saved_and_loaded_at_any_step_goes_on_bitwise(tmp_path: Any) -> None:
    """With schedules of groups and options, going on from a file ends where the uninterrupted run ends."""
    made, step = task(scheduled), fl.pipe(loss, fl.grad(), fl.apply(), fl.stop_when(fl.max_steps(9)))
    states = [state.copy() for state, _ in fl.run(step, fl.TrainState.create(made), BATCHES)]
    for state in states[:-1]:
        loaded = fl.load(fl.save(state, tmp_path / str(state.progress.step)), made)
        *_, (end, _) = fl.run(step, loaded, BATCHES)
        fl.testing.assert_trees_equal(dict(end.params), dict(states[-1].params))
        assert [g["weight_decay"] for g in end.live.optim.optimizer.param_groups] == [
            g["weight_decay"] for g in states[-1].live.optim.optimizer.param_groups
        ]


def test_a_log_shows_each_group_by_its_name_and_what_is_scheduled() -> None:
    """Records hold ``lr/NAME`` of each group, and other options where they have a schedule."""
    sink = RecordingSink()
    step = fl.pipe(loss, fl.grad(), fl.apply(), fl.log_to(sink, every=fl.steps(1)), fl.stop_when(fl.max_steps(2)))
    for _ in fl.run(step, fl.TrainState.create(task(scheduled)), BATCHES):
        pass
    assert sink.steps("lr/trunk") == {1: 0.25, 2: 0.5}
    assert sink.steps("lr/head") == pytest.approx({1: 0.025, 2: 0.1})
    assert sink.steps("weight_decay/head") == pytest.approx({1: 0.1, 2: 0.1 * fl.cosine(12)(1)})
    single = prepare(fl.Optim(torch.optim.AdamW((model := net()).parameters()), schedules={"momentum": fl.constant(0.5)}), model)
    assert reported(single) == {"lr": 1e-3, "momentum": 0.9}


REFUSED: list[tuple[Callable[[nn.Module], Any], str]] = [
    (
        lambda m: fl.Optim(torch.optim.SGD(groups(m)), {"haed": fl.constant()}),
        r"schedule of 'lr' is for the groups \['haed'\], .* has \['trunk', 'head'\]",
    ),
    (
        lambda m: fl.Optim(torch.optim.SGD(groups(m)), {"head": 0.5}),
        r"schedule\['head'\] must map completed steps to a factor, but got 0.5",
    ),
    (
        lambda m: fl.Optim(torch.optim.SGD(groups(m)), lambda n: None),
        r"schedule of 'lr' must map a count to a finite number, but maps 0 to None",
    ),
    (lambda m: fl.Optim(torch.optim.SGD(groups(m)), lambda n: math.nan), r"must map a count to a finite number, but maps 0 to nan"),
    (
        lambda m: fl.Optim(torch.optim.SGD(groups(m)), schedules={"lr": fl.constant()}),
        r"give the schedule of the learning rate as schedule=",
    ),
    (
        lambda m: fl.Optim(torch.optim.SGD(groups(m)), schedules={"decay": fl.constant()}),
        r"multiplies 'decay', but in group 'trunk' .* numbers are \['lr'",
    ),
    (lambda m: fl.Optim(torch.optim.SGD(groups(m)), schedules=fl.constant()), r"schedules must map options to schedules, .* got constant"),
    (lambda m: fl.Optim(torch.optim.SGD(groups(m)), schedules={"momentum": fl.plateau()}), r"watches a metric: say which"),
    (
        lambda m: fl.Optim(torch.optim.SGD(groups(m)), fl.constant(), frequency=0),
        r"frequency must be a whole number of at least 1, but got 0",
    ),
    (
        lambda m: fl.Optim(torch.optim.SGD(groups(m)), {"head": fl.from_torch(lambda o: OneCycleLR(o, 0.1, 5))}),
        r"schedule\['head'\]=from_torch\(<lambda>\) changes all groups and options by itself; give it as schedule=..., alone",
    ),
    (
        lambda m: torch.optim.SGD(
            [{"params": m["trunk"].parameters(), "name": "a"}, {"params": m["head"].parameters(), "name": "a"}], lr=1
        ),
        r"two groups of the optimizer are called 'a'; .* there are \['a', 'a'\]",
    ),
]


@pytest.mark.parametrize("configure, message", REFUSED)
def test_a_schedule_of_what_is_not_there_is_refused(configure: Callable[[nn.Module], Any], message: str) -> None:
    """Groups and options that do not exist, and functions that give no number, are named before any work."""
    with pytest.raises(OptimizerError, match=message):
        fl.TrainState.create(task(configure))


def test_total_steps_counts_what_a_run_will_do() -> None:
    """The number of steps is that of the run itself, with accumulation, limits and both bounds."""
    made = task(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    for options in (
        {"max_epochs": 3},
        {"max_epochs": 3, "accumulate": 2},
        {"max_epochs": 4, "accumulate": {0: 1, 2: 3}},
        {"max_epochs": 9, "max_steps": 5},
        {"max_epochs": 2, "limit_train": 2},
    ):
        config = fl.FitConfig(progress=False, **options)
        assert fl.fit(fl.TrainState.create(made), BATCHES, config).progress.step == fl.total_steps(config, fl.Loaders(train=BATCHES)), (
            options
        )


def test_total_steps_refuses_to_guess() -> None:
    """Where the end cannot be known it says why."""
    with pytest.raises(
        ConfigError, match=r"total number of steps of this run is unknown: its training loader has no length; give FitConfig\(max_steps"
    ):
        fl.total_steps(fl.FitConfig(max_epochs=2), iter(BATCHES))
    with pytest.raises(ConfigError, match="it has neither max_epochs nor max_steps"):
        fl.total_steps(fl.FitConfig(max_time=5.0), BATCHES)


def test_a_run_past_the_end_of_its_schedule_is_warned_of_where_nothing_would_be_learned() -> None:
    """A learning rate that would stay at nothing is said before the first step; one that stays at something is as asked."""
    config = fl.FitConfig(max_epochs=4, progress=False)
    made = task(lambda m: fl.Optim(torch.optim.SGD(m.parameters(), lr=0.1), fl.cosine(6)))
    with pytest.warns(OptimizerWarning, match=r"cosine\(6, final=0.0\), ends at step 6, but the run has 12: .* nothing is learned"):
        end = fl.fit(fl.TrainState.create(made), BATCHES, config)
    assert end.live.optim.optimizer.param_groups[0]["lr"] == 0.0
    for schedule in (fl.cosine(6, final=0.1), fl.warmup(2), fl.linear(0, 1, 4), fl.cosine(12)):
        fine = task(lambda m, schedule=schedule: fl.Optim(torch.optim.SGD(m.parameters(), lr=0.1), schedule))
        fl.fit(fl.TrainState.create(fine), BATCHES, config)


def test_a_torch_scheduler_that_would_fail_in_the_middle_is_refused_before_the_run() -> None:
    """OneCycleLR raises past its end; the run that would get there does not begin, and one of the right length ends."""

    def one_cycle(total: int) -> fl.Task:
        return task(
            lambda m: fl.Optim(torch.optim.SGD(m.parameters(), lr=0.1), fl.from_torch(lambda o: OneCycleLR(o, 0.1, total_steps=total)))
        )

    config = fl.FitConfig(max_epochs=4, progress=False)
    with pytest.raises(
        ConfigError, match=r"ends at step 9, but the run has 12, so it would raise an error during the run; .*fl.total_steps"
    ):
        fl.fit(fl.TrainState.create(one_cycle(9)), BATCHES, config)
    assert fl.fit(fl.TrainState.create(one_cycle(fl.total_steps(config, BATCHES))), BATCHES, config).progress.step == 12
