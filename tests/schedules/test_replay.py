"""Laws of `fnlight.schedules.replay`: parity with every torch scheduler, and results that depend on arguments alone."""

import copy
import inspect
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

from fnlight.errors import ConfigError
from fnlight.schedules import Plateau, TorchSchedule, from_torch, plateau
from fnlight.tensors import tree

STEPS = 24
VALUES = [3.0, 2.0, 2.5, 2.4, 2.6, 1.0, float("nan"), 1.0, 1.0, 1.0, 1.0, 0.5] * 2

MAKERS: dict[str, Callable[[Any], Any]] = {
    "ConstantLR": lambda o: ConstantLR(o, factor=0.5, total_iters=5),
    "LinearLR": lambda o: LinearLR(o, 0.1, 1.0, total_iters=7),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=9, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, T_0=4, T_mult=2),
    "CyclicLR": lambda o: CyclicLR(o, base_lr=[0.01, 0.02, 0.03], max_lr=0.3, step_size_up=4, mode="exp_range", gamma=0.9),
    "ExponentialLR": lambda o: ExponentialLR(o, gamma=0.8),
    "LambdaLR": lambda o: LambdaLR(o, [lambda n: 0.9**n, lambda n: 1 / (n + 1), lambda n: 1.0 - n % 3 / 10]),
    "MultiplicativeLR": lambda o: MultiplicativeLR(o, lambda n: 0.9 if n % 2 else 1.05),
    "MultiStepLR": lambda o: MultiStepLR(o, milestones=[3, 3, 8], gamma=0.3),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=[0.1, 0.2, 0.3], total_steps=STEPS, three_phase=True),
    "PolynomialLR": lambda o: PolynomialLR(o, total_iters=11, power=1.7),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=1, cooldown=1, min_lr=[0.01, 0.0, 0.2]),
    "SequentialLR": lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, 1.0, total_iters=4), OneCycleLR(o, 0.5, total_steps=30), ExponentialLR(o, 0.9)], milestones=[4, 13]
    ),
    "ChainedScheduler": lambda o: ChainedScheduler([ConstantLR(o, 0.1, total_iters=4), ExponentialLR(o, 0.9)]),
    "StepLR": lambda o: StepLR(o, step_size=3, gamma=0.7),
    "SWALR": lambda o: SWALR(o, swa_lr=[0.05, 0.02, 0.01], anneal_epochs=6),
}


def optimizer(kind: str = "SGD", lr: Any = 0.1) -> Any:
    """An optimizer with three groups that differ in their options."""
    params = [[nn.Parameter(torch.zeros(2))] for _ in range(3)]
    if kind == "SGD":
        groups = [{"params": params[0]}, {"params": params[1], "lr": 0.5, "momentum": 0.5}, {"params": params[2], "weight_decay": 0.1}]
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    groups = [{"params": params[0]}, {"params": params[1], "lr": 0.5, "betas": (0.5, 0.9)}, {"params": params[2]}]
    return torch.optim.AdamW(groups, lr=lr)


def options(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the groups hold, but the parameters and the schedulers' own notes."""
    known = ("lr", "momentum", "betas", "weight_decay", "nesterov", "eps", "amsgrad")
    return [{k: copy.deepcopy(g[k]) for k in known if k in g} for g in groups]


def configured(made: Any) -> list[dict[str, Any]]:
    """The groups as `prepare` keeps them."""
    return [{**{k: copy.deepcopy(v) for k, v in g.items() if k != "params"}, "initial_lr": g["lr"]} for g in made.param_groups]


def plain_loop(make: Callable[[Any], Any], made: Any, steps: int, values: Sequence[float] | None = None) -> list[list[dict[str, Any]]]:
    """What the groups hold before each step of a loop that uses the real scheduler."""
    scheduler, found = make(made), []
    for i in range(steps):
        found.append(options(made.param_groups))
        made.step()
        if i + 1 < steps:
            scheduler.step(*(() if values is None else (values[i],)))
    return found


def replayed(
    schedule: TorchSchedule, held: list[dict[str, Any]], count: int, values: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """What the groups hold when a schedule has been asked at one count only."""
    return [options([{**group, **found}])[0] for group, found in zip(held, schedule.groups(held, count, values), strict=True)]


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    """No scheduler that torch has, now or in a later version, goes untested."""
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, LRScheduler) and not name.startswith("_") and kind is not LRScheduler
    }
    assert found == set(MAKERS)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_replayed_scheduler_equals_the_real_one_in_a_plain_loop_bitwise(name: str, kind: str) -> None:
    """At every count each group holds exactly what the real scheduler would have put there, momentum and betas too."""
    values = VALUES if name == "ReduceLROnPlateau" else None
    truth = plain_loop(MAKERS[name], optimizer(kind), STEPS, values)
    made = optimizer(kind)
    held, schedule = configured(made), from_torch(MAKERS[name]).resolved(made.param_groups)
    assert schedule.monitored == (values is not None)
    found = [replayed(schedule, held, n, values and values[:n]) for n in range(STEPS)]
    assert found == truth


@pytest.mark.parametrize("name", MAKERS)
def test_what_a_replay_gives_does_not_depend_on_what_was_asked_before(name: str) -> None:
    """Asked in any order, also for other groups in between, a schedule gives what a fresh one gives."""
    made = optimizer()
    held, other = configured(made), configured(optimizer("AdamW", lr=0.3))
    schedule = from_torch(MAKERS[name]).resolved(made.param_groups)
    order = [*range(STEPS), *range(STEPS)]
    random.Random(0).shuffle(order)
    for n in order[:12]:
        for groups in (held, other):
            fresh = from_torch(MAKERS[name], monitored=schedule.monitored)
            assert schedule.groups(groups, n, VALUES[:n]) == fresh.groups(groups, n, VALUES[:n])


def test_an_option_that_stands_again_as_at_first_is_given_back_too() -> None:
    """What the scheduler has ever changed is in the result, so that nothing stale stays in a group."""
    schedule = from_torch(lambda o: CyclicLR(o, 0.1, 0.3, step_size_up=2, base_momentum=0.7, max_momentum=0.9))
    held = configured(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9))
    assert [schedule.groups(held, n)[0] for n in (2, 4)] == [
        {"lr": pytest.approx(0.3), "momentum": pytest.approx(0.7)},
        {"lr": pytest.approx(0.1), "momentum": pytest.approx(0.9)},
    ]


def test_a_history_that_differs_from_the_last_one_is_replayed_from_its_start() -> None:
    """A monitored schedule looks at the values themselves, not at how many there are."""
    schedule = from_torch(MAKERS["ReduceLROnPlateau"], monitored=True)
    held = configured(optimizer())
    worse, better = [1.0] * 6, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    first = schedule.groups(held, 0, worse)
    assert first[1]["lr"] < 0.5
    assert schedule.groups(held, 0, better)[1]["lr"] == 0.5
    assert schedule.groups(held, 0, worse) == first


def test_a_replay_draws_no_random_numbers_and_leaves_the_groups_alone() -> None:
    """Replaying changes neither the global generators nor what it was given."""
    held = configured(optimizer())
    before, state, python = copy.deepcopy(held), torch.get_rng_state(), random.getstate()
    from_torch(MAKERS["OneCycleLR"]).groups(held, 10)
    assert tree.equal(held, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python


def test_the_scheduler_never_sees_the_real_optimizer() -> None:
    """The optimizer itself is not patched, and its groups keep what they held."""
    made = optimizer()
    before = options(made.param_groups)
    schedule = from_torch(MAKERS["OneCycleLR"]).resolved(made.param_groups)
    schedule.groups(configured(made), 5)
    assert "step" not in vars(made)
    assert options(made.param_groups) == before
    assert "initial_lr" not in made.param_groups[0]


def test_a_learning_rate_that_is_a_tensor_stays_one() -> None:
    """A tensor learning rate is replayed in its own precision and never shared with the replay."""
    made = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.1))
    truth = plain_loop(MAKERS["ExponentialLR"], torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.1)), 9)
    held, schedule = configured(made), from_torch(MAKERS["ExponentialLR"])
    third = schedule.groups(held, 3)[0]["lr"]
    kept = third.clone()
    assert [schedule.groups(held, n)[0]["lr"].item() for n in range(9)] == [groups[0]["lr"].item() for groups in truth]
    assert torch.equal(third, kept)


def test_a_copy_of_a_schedule_gives_the_same() -> None:
    """A deep copy, made half-way, agrees with the schedule and with a fresh one afterwards."""
    schedule, held = from_torch(MAKERS["CyclicLR"]), configured(optimizer())
    schedule.groups(held, 7)
    twin = copy.deepcopy(schedule)
    assert twin.groups(held, 9) == schedule.groups(held, 9) == from_torch(MAKERS["CyclicLR"]).groups(held, 9)
    assert twin.groups(held, 3) == from_torch(MAKERS["CyclicLR"]).groups(held, 3)


def test_threads_may_share_a_schedule() -> None:
    """Asked from several threads at once, a schedule gives each what it asked for."""
    schedule, held = from_torch(MAKERS["ExponentialLR"]), configured(optimizer())
    wrong: list[int] = []

    def ask(start: int) -> None:
        wrong.extend(n for n in range(start, 60, 4) if schedule.groups(held, n)[0]["lr"] != pytest.approx(0.1 * 0.8**n))

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_after_a_failure_of_the_scheduler_the_replay_starts_again() -> None:
    """A scheduler that refuses a step, as OneCycleLR does past its end, leaves no half-way replay behind."""
    schedule, held = from_torch(lambda o: OneCycleLR(o, 0.1, total_steps=5)), configured(optimizer())
    schedule.groups(held, 3)
    with pytest.raises(
        ConfigError, match=r"OneCycleLR, replayed by from_torch, refuses its step 6: Tried to step 6 times.*; train no longer"
    ):
        schedule.groups(held, 7)
    assert schedule.groups(held, 4) == from_torch(lambda o: OneCycleLR(o, 0.1, total_steps=5)).groups(held, 4)


def test_a_scheduler_with_an_end_says_where_it_is() -> None:
    """The last count that OneCycleLR has a value for is known beforehand, and is the last one that it gives."""
    schedule, held = from_torch(lambda o: OneCycleLR(o, 0.1, total_steps=5)), configured(optimizer())
    last = schedule.last(held)
    assert last == 5
    schedule.groups(held, last)
    with pytest.raises(ConfigError, match="refuses its step 6"):
        schedule.groups(held, last + 1)
    assert from_torch(MAKERS["CyclicLR"]).last(held) is None


def test_a_scheduler_of_the_user_is_replayed_like_one_of_torch() -> None:
    """Any object with ``step`` works, and one whose step wants a value is found to be monitored."""

    class Halve:
        def __init__(self, made: Any) -> None:
            self.made = made

        def step(self, value: float) -> None:
            for group in self.made.param_groups:
                group["lr"] *= 0.5 if value > 1 else 1.0

    made = optimizer()
    schedule = from_torch(Halve).resolved(made.param_groups)
    assert schedule.monitored
    assert repr(schedule) == "from_torch(Halve, monitored=True)"
    assert schedule.groups(configured(made), 0, [2.0, 0.0, 3.0])[0]["lr"] == 0.025


def test_make_must_return_a_scheduler() -> None:
    """A factory that forgets its return is refused with what to look for."""
    with pytest.raises(ConfigError, match=r"must return a scheduler, but returned None; is a `return` missing\?"):
        from_torch(lambda o: None).groups(configured(optimizer()), 0)


def test_make_must_use_the_optimizer_that_it_is_given() -> None:
    """A factory that closes over the real optimizer is refused, since it would change it."""
    made = optimizer()
    with pytest.raises(ConfigError, match="must use the optimizer that it is given, but its StepLR changes another one"):
        from_torch(lambda o: StepLR(made, 3)).groups(configured(made), 0)


@given(
    values=st.lists(st.one_of(st.floats(-2, 2), st.sampled_from([1.0, 0.5, float("nan"), float("inf")])), max_size=40),
    factor=st.floats(0.05, 0.95),
    patience=st.integers(0, 4),
    threshold=st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
    mode=st.sampled_from(["min", "max"]),
    cooldown=st.integers(0, 3),
    floor=st.sampled_from([0.0, 0.01, 0.3]),
    threshold_mode=st.sampled_from(["rel", "abs"]),
)
def test_plateau_decides_as_torch_does(
    values: list[float], factor: float, patience: int, threshold: float, mode: Any, cooldown: int, floor: float, threshold_mode: Any
) -> None:
    """Over any values the factor is what ReduceLROnPlateau makes of a learning rate of 1."""
    made = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    real = ReduceLROnPlateau(made, mode, factor, patience, threshold, threshold_mode, cooldown, min_lr=floor, eps=0.0)
    ours = plateau(factor, patience, threshold, mode, cooldown, floor, threshold_mode)
    for n, value in enumerate(values):
        assert ours.over(values[:n]) == made.param_groups[0]["lr"]
        real.step(value)
    assert ours.over(values) == made.param_groups[0]["lr"]


def test_a_plateau_prints_as_the_code_that_makes_it() -> None:
    """What a plateau prints makes an equal one."""
    ours = plateau(factor=0.3, mode="max", threshold_mode="abs")
    assert eval(repr(ours), {"plateau": plateau}) == ours  # the law is about the code that is printed
    assert ours != plateau()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"factor": 1.0}, r"plateau\(factor\) must be below 1, but got 1.0, which changes nothing"),
        ({"factor": -0.1}, r"plateau\(factor\) must be a finite number from 0 to 1, but got -0.1"),
        ({"threshold": float("inf")}, r"plateau\(threshold\) must be a finite number from 0 to inf, but got inf"),
        ({"min_factor": 2.0}, r"plateau\(min_factor\) must be a finite number from 0 to 1, but got 2.0"),
        ({"patience": -1}, r"plateau\(patience\) must be a whole number of at least 0, but got -1"),
        ({"cooldown": 1.5}, r"plateau\(cooldown\) must be a whole number of at least 0, but got 1.5"),
        ({"mode": "least"}, r"plateau\(mode\) must be one of \('min', 'max'\), but got 'least'"),
        ({"threshold_mode": "both"}, r"plateau\(threshold_mode\) must be one of \('rel', 'abs'\), but got 'both'"),
    ],
)
def test_a_bad_argument_of_plateau_is_refused(given: dict[str, Any], message: str) -> None:
    """Every argument is checked when the plateau is made."""
    with pytest.raises(ConfigError, match=message):
        Plateau(**given)
