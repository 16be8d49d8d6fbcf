"""Laws of schedules in a run: their counts, the groups and options that they change, and their log entries."""

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
    """The value of an option in each group at each step of a run."""
    seen = []
    step = fl.pipe(loss, fl.grad(), fl.apply(), fl.stop_when(fl.max_steps(steps)))
    for state, _ in fl.run(step, fl.TrainState.create(task(configure)), BATCHES, shuffle=False):
        seen.append([group[key] for group in state.live.optim.optimizer.param_groups])
    return seen


def test_a_schedule_can_count_samples() -> None:
    """With interval="samples" a schedule gets the number of samples seen, for any batch sizes."""
    found = courses(lambda m: fl.Optim(torch.optim.SGD(m.parameters(), lr=1.0), lambda n: 1 / (1 + n), interval="samples"), 5)
    assert [lr for (lr,) in found] == [1 / (1 + n) for n in (0, 4, 8, 10, 14)]


@pytest.mark.parametrize(
    "interval, counts", [("step", [0, 0, 1, 1, 2, 2, 3]), ("epoch", [0, 0, 0, 0, 0, 0, 1]), ("samples", [0, 2, 4, 5, 7, 9, 10])]
)
def test_a_schedule_changes_at_its_frequency(interval: Any, counts: list[int]) -> None:
    """With frequency=2 a schedule gets half of the completed count, rounded down."""
    made = lambda m: fl.Optim(torch.optim.SGD(m.parameters(), lr=1.0), lambda n: 1.0 + n, interval=interval, frequency=2)
    assert [lr - 1 for (lr,) in courses(made, 7)] == counts


def test_each_group_can_have_its_own_schedule() -> None:
    """A mapping gives each named group its schedule; ``"*"`` is for all others, and without it the others do not change."""
    step = lambda n: 0.5**n
    own = courses(lambda m: fl.Optim(torch.optim.SGD(groups(m)), {"trunk": step}), 3)
    assert own == [[0.5, 0.25], [0.25, 0.25], [0.125, 0.25]]
    both = courses(lambda m: fl.Optim(torch.optim.SGD(groups(m)), {"trunk": step, "*": lambda n: 2.0}), 3)
    assert both == [[0.5, 0.5], [0.25, 0.5], [0.125, 0.5]]


def test_groups_without_a_name_have_their_index_as_name() -> None:
    """Groups without names are scheduled by their index."""
    made = lambda m: torch.optim.SGD([{"params": m["trunk"].parameters()}, {"params": m["head"].parameters()}], lr=1.0)
    assert courses(lambda m: fl.Optim(made(m), {"1": lambda n: 0.5**n}), 3) == [[1.0, 1.0], [1.0, 0.5], [1.0, 0.25]]


def test_weight_decay_and_momentum_can_be_scheduled() -> None:
    """The factor multiplies the configured value of each group, as for the learning rate."""
    made = lambda m: fl.Optim(
        torch.optim.SGD(fl.param_groups(m, fl.no_decay(), lr=0.1, weight_decay=0.5, momentum=0.8)),
        schedules={"weight_decay": lambda n: 1 + n, "momentum": {"rest": lambda n: 0.5**n}},
    )
    assert courses(made, 3, "weight_decay") == [[0.5, 0.0], [1.0, 0.0], [1.5, 0.0]]
    assert courses(made, 3, "momentum") == [[0.8, 0.8], [0.4, 0.8], [0.2, 0.8]]
    assert courses(made, 3) == [[0.1, 0.1]] * 3


def test_the_momentum_of_adam_is_its_first_beta() -> None:
    """If an optimizer has betas, a schedule of the momentum changes only the first one."""
    made = lambda m: fl.Optim(torch.optim.AdamW(m.parameters(), betas=(0.8, 0.99)), schedules={"momentum": lambda n: 0.5**n})
    assert courses(made, 3, "betas") == [[(0.8, 0.99)], [(0.4, 0.99)], [(0.2, 0.99)]]


def test_a_plateau_can_be_combined_with_another_schedule() -> None:
    """One group follows the metric, the other one the steps."""
    optim = prepare(
        fl.Optim(
            torch.optim.SGD(groups(model := net())), {"trunk": fl.plateau(0.5, patience=0), "head": lambda n: 0.5**n}, monitor="val/loss"
        ),
        model,
    )
    history = fl.state.History().add(fl.state.Record(1, 0, {"val/loss": 1.0})).add(fl.state.Record(2, 0, {"val/loss": 1.0}))
    set_lr(optim, fl.state.Progress(step=2), history)
    assert [g["lr"] for g in optim.optimizer.param_groups] == [0.25, 0.0625]


def test_a_tensor_learning_rate_of_a_group_is_filled_in_place() -> None:
    """A scheduled tensor is filled and never replaced, in any group."""
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


def test_a_run_resumed_at_any_step_is_bit_identical(tmp_path: Any) -> None:
    """With schedules of groups and options, a resumed run ends with bit-identical weights."""
    made, step = task(scheduled), fl.pipe(loss, fl.grad(), fl.apply(), fl.stop_when(fl.max_steps(9)))
    states = [state.copy() for state, _ in fl.run(step, fl.TrainState.create(made), BATCHES)]
    for state in states[:-1]:
        loaded = fl.load(fl.save(state, tmp_path / str(state.progress.step)), made)
        *_, (end, _) = fl.run(step, loaded, BATCHES)
        fl.testing.assert_trees_equal(dict(end.params), dict(states[-1].params))
        assert [g["weight_decay"] for g in end.live.optim.optimizer.param_groups] == [
            g["weight_decay"] for g in states[-1].live.optim.optimizer.param_groups
        ]


def test_a_log_shows_the_learning_rate_of_each_group_and_scheduled_options() -> None:
    """Records have ``lr/NAME`` of each group, and other options with a schedule."""
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
        r"schedule of 'lr' is for the groups \['haed'\], .* has the groups \['trunk', 'head'\]",
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
        r"multiplies 'decay', but in group 'trunk' .* options with a number are \['lr'",
    ),
    (lambda m: fl.Optim(torch.optim.SGD(groups(m)), schedules=fl.constant()), r"schedules must map options to schedules, .* got constant"),
    (lambda m: fl.Optim(torch.optim.SGD(groups(m)), schedules={"momentum": fl.plateau()}), r"needs the name of a metric"),
    (
        lambda m: fl.Optim(torch.optim.SGD(groups(m)), fl.constant(), frequency=0),
        r"frequency must be a whole number of at least 1, but got 0",
    ),
    (
        lambda m: fl.Optim(torch.optim.SGD(groups(m)), {"head": fl.from_torch(lambda o: OneCycleLR(o, 0.1, 5))}),
        r"schedule\['head'\]=from_torch\(<lambda>\) changes all groups and options itself; pass it alone, as schedule=...",
    ),
    (
        lambda m: torch.optim.SGD(
            [{"params": m["trunk"].parameters(), "name": "a"}, {"params": m["head"].parameters(), "name": "a"}], lr=1
        ),
        r"two groups of the optimizer have the name 'a'; .* the names are \['a', 'a'\]",
    ),
]


@pytest.mark.parametrize("configure, message", REFUSED)
def test_a_schedule_of_a_missing_group_or_option_is_refused(configure: Callable[[nn.Module], Any], message: str) -> None:
    """Missing groups, missing options and functions that do not return a number are errors before any work."""
    with pytest.raises(OptimizerError, match=message):
        fl.TrainState.create(task(configure))


def test_total_steps_counts_the_steps_of_a_run() -> None:
    """The count equals the steps of the run, with accumulation, limits and both bounds."""
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


def test_total_steps_is_an_error_if_the_end_is_unknown() -> None:
    """The error says why the end is unknown."""
    with pytest.raises(
        ConfigError, match=r"total number of steps of this run is unknown: its training loader has no length; give FitConfig\(max_steps"
    ):
        fl.total_steps(fl.FitConfig(max_epochs=2), iter(BATCHES))
    with pytest.raises(ConfigError, match="it has neither max_epochs nor max_steps"):
        fl.total_steps(fl.FitConfig(max_time=5.0), BATCHES)


def test_a_run_longer_than_its_schedule_is_warned_of_if_the_last_factor_is_zero() -> None:
    """There is a warning before the first step if the learning rate stays close to 0 after the end; otherwise there is none."""
    config = fl.FitConfig(max_epochs=4, progress=False)
    made = task(lambda m: fl.Optim(torch.optim.SGD(m.parameters(), lr=0.1), fl.cosine(6)))
    with pytest.warns(OptimizerWarning, match=r"cosine\(6, final=0.0\), ends at step 6, but the run has 12: .* nothing is learned"):
        end = fl.fit(fl.TrainState.create(made), BATCHES, config)
    assert end.live.optim.optimizer.param_groups[0]["lr"] == 0.0
    for schedule in (fl.cosine(6, final=0.1), fl.warmup(2), fl.linear(0, 1, 4), fl.cosine(12)):
        fine = task(lambda m, schedule=schedule: fl.Optim(torch.optim.SGD(m.parameters(), lr=0.1), schedule))
        fl.fit(fl.TrainState.create(fine), BATCHES, config)


def test_a_torch_scheduler_that_would_fail_during_the_run_is_refused_before_it() -> None:
    """OneCycleLR raises an error after its end; a longer run does not start, and a run of the right length completes."""

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
