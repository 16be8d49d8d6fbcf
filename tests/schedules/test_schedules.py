"""Laws of `fnlight.schedules`: parity with torch, pureness, and clear refusals."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from fnlight import schedules
from fnlight.errors import ConfigError
from fnlight.schedules import (
    constant,
    cosine,
    cosine_restarts,
    cyclic,
    exponential,
    join,
    linear,
    one_cycle,
    polynomial,
    step_decay,
    warmup,
    warmup_cosine,
    wsd,
)

PAIRS: dict[str, tuple[Callable[[int], float], Callable[[Any], Any], int]] = {
    "ConstantLR": (
        join([constant(0.25), constant()], [7]),
        lambda o: lr_scheduler.ConstantLR(o, factor=0.25, total_iters=7),
        20,
    ),
    "LinearLR up": (linear(0.25, 1.0, 9), lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, total_iters=9), 20),
    "LinearLR down": (linear(1.0, 0.1, 9), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=9), 20),
    "CosineAnnealingLR": (cosine(30), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=30), 31),
    "CosineAnnealingLR with a floor": (
        cosine(30, final=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=30, eta_min=0.1),
        31,
    ),
    "StepLR": (step_decay(3, 0.5), lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5), 30),
    "ExponentialLR": (exponential(0.9), lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9), 40),
    "PolynomialLR": (polynomial(25), lambda o: lr_scheduler.PolynomialLR(o, total_iters=25), 40),
    "PolynomialLR squared": (polynomial(25, power=2.0), lambda o: lr_scheduler.PolynomialLR(o, total_iters=25, power=2.0), 40),
    "OneCycleLR": (one_cycle(50), lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=50), 50),
    "OneCycleLR linear": (
        one_cycle(33, up_fraction=0.2, start_div=10.0, final_div=100.0, anneal="linear"),
        lambda o: lr_scheduler.OneCycleLR(
            o, max_lr=1.0, total_steps=33, pct_start=0.2, div_factor=10.0, final_div_factor=100.0, anneal_strategy="linear"
        ),
        33,
    ),
    "OneCycleLR without a rise": (
        one_cycle(12, up_fraction=0.0),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=12, pct_start=0.0),
        12,
    ),
    "CosineAnnealingWarmRestarts": (
        cosine_restarts(7, final=0.1),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=7, eta_min=0.1),
        40,
    ),
    "CosineAnnealingWarmRestarts, longer each time": (
        cosine_restarts(3, mult=2),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
        60,
    ),
    "CyclicLR": (
        cyclic(4, down=6, low=0.2),
        lambda o: lr_scheduler.CyclicLR(o, 0.2, 1.0, step_size_up=4, step_size_down=6, cycle_momentum=False),
        45,
    ),
    "CyclicLR triangular2": (
        cyclic(5, low=0.1, mode="triangular2"),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, step_size_up=5, mode="triangular2", cycle_momentum=False),
        45,
    ),
    "CyclicLR exp_range": (
        cyclic(3, low=0.0, mode="exp_range", gamma=0.95),
        lambda o: lr_scheduler.CyclicLR(o, 0.0, 1.0, step_size_up=3, mode="exp_range", gamma=0.95, cycle_momentum=False),
        45,
    ),
    "SequentialLR": (
        join([linear(0.1, 1.0, 5), exponential(0.9), cosine(10)], [5, 12]),
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=5),
                lr_scheduler.ExponentialLR(o, gamma=0.9),
                lr_scheduler.CosineAnnealingLR(o, T_max=10),
            ],
            milestones=[5, 12],
        ),
        22,
    ),
}

EVERY = {
    "constant": constant(0.5),
    "linear": linear(0.0, 1.0, 10),
    "cosine": cosine(10, final=0.1),
    "warmup": warmup(4, then=exponential(0.5)),
    "warmup_cosine": warmup_cosine(warmup=3, total=10),
    "step_decay": step_decay(3),
    "exponential": exponential(0.5),
    "polynomial": polynomial(10, power=0.5, final=0.2),
    "one_cycle": one_cycle(10, anneal="linear"),
    "cosine_restarts": cosine_restarts(3, mult=2, final=0.1),
    "cyclic": cyclic(2, down=3, low=0.2, mode="triangular2"),
    "wsd": wsd(warmup=2, total=10, decay=4, final=0.1, shape="sqrt"),
    "join": join([warmup(2), cosine(5)], [2]),
}


def torch_factors(make: Callable[[Any], Any], steps: int) -> list[float]:
    """What a plain loop sees, with a base learning rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0, momentum=0.9)
    scheduler, found = make(optimizer), []
    for i in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if i + 1 < steps:
            scheduler.step()
    return found


@pytest.mark.parametrize("name", PAIRS)
def test_a_schedule_equals_torch_s_scheduler_at_every_step(name: str) -> None:
    """Where torch has the same schedule, the factors agree to 1e-12 at every count."""
    schedule, make, steps = PAIRS[name]
    assert [schedule(count) for count in range(steps)] == pytest.approx(torch_factors(make, steps), rel=1e-12, abs=1e-12)


@given(
    total=st.integers(2, 60),
    warm=st.floats(0.05, 0.95),
    start_div=st.floats(1.5, 100.0),
    final_div=st.floats(1.5, 1e5),
    anneal=st.sampled_from(["cos", "linear"]),
)
def test_one_cycle_equals_torch_s_for_any_arguments(total: int, warm: float, start_div: float, final_div: float, anneal: Any) -> None:
    """One cycle agrees with OneCycleLR to 1e-9 for any length, rise, divisors and form."""
    assume(warm * total != 1.0)  # torch divides by zero there
    ours = one_cycle(total, warm, start_div, final_div, anneal)
    options = {"pct_start": warm, "div_factor": start_div, "final_div_factor": final_div, "anneal_strategy": anneal}
    theirs = torch_factors(lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=total, **options), total)
    assert [ours(count) for count in range(total)] == pytest.approx(theirs, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_a_schedule_prints_as_the_code_that_makes_it(name: str) -> None:
    """Evaluating what a schedule prints gives the same schedule."""
    schedule = EVERY[name]
    again = eval(repr(schedule), vars(schedules))  # the law is about the code that is printed
    assert [again(count) for count in range(30)] == [schedule(count) for count in range(30)]
    assert repr(schedule).startswith(f"{name}(")


@pytest.mark.parametrize("name", EVERY)
def test_a_schedule_is_pure(name: str) -> None:
    """Asked in any order and as often as one likes, a schedule gives the same factor."""
    schedule = EVERY[name]
    forward = [schedule(count) for count in range(25)]
    assert [schedule(count) for count in reversed(range(25))] == forward[::-1]
    assert all(isinstance(factor, float) for factor in forward)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "warmup_cosine", "polynomial", "one_cycle", "wsd", "join"])
def test_past_its_end_a_schedule_holds_its_last_value(name: str) -> None:
    """A schedule with an end gives its last factor for ever."""
    schedule = EVERY[name]
    assert {schedule(count) for count in (10, 11, 50, 10**9)} == {schedule(10)}


@pytest.mark.parametrize("name", EVERY)
def test_a_schedule_knows_where_it_ends(name: str) -> None:
    """From `total` on the factor is the same for ever, and not from any count before; without an end there is no total."""
    schedule = EVERY[name]
    if schedule.total is None:
        assert name in ("constant", "warmup", "step_decay", "exponential", "cyclic", "cosine_restarts")
        return
    assert {schedule(count) for count in range(schedule.total, schedule.total + 40)} == {schedule(schedule.total)}
    assert schedule(schedule.total - 1) != schedule(schedule.total)


def test_schedules_in_a_row_end_where_the_last_one_does() -> None:
    """The end of a warm-up is that of what follows; a function of the user's own has no known end."""
    assert (warmup(5).total, warmup(5, then=cosine(10)).total, warmup(5, then=exponential(0.5)).total) == (5, 15, None)
    assert (join([constant(), cosine(10)], [7]).total, join([constant(), lambda count: 1.0], [7]).total) == (17, None)


@pytest.mark.parametrize("shape, middle", [("linear", 0.5), ("cos", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_a_wsd_rises_stays_and_falls_over_its_last_steps(shape: Any, middle: float) -> None:
    """Before the fall the factor is 1, half-way through it that of its form, at the end the last one."""
    course = wsd(warmup=4, total=100, decay=20, shape=shape)
    assert [course(count) for count in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert {course(count) for count in range(4, 81)} == {1.0}
    assert course(90) == pytest.approx(middle)
    assert course(100) == 0.0


def test_a_stable_part_may_be_prolonged_without_another_start() -> None:
    """Two courses that differ in their total agree until the first one falls: a checkpoint of the plain serves both."""
    short, long = wsd(warmup=4, total=50, decay=10), wsd(warmup=4, total=90, decay=10)
    assert [short(count) for count in range(41)] == [long(count) for count in range(41)]


def test_the_first_step_of_a_warm_up_learns() -> None:
    """The factors of a rise over n steps are 1/n, 2/n, ..., 1, never 0."""
    assert [warmup(5)(count) for count in range(7)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
    assert warmup(0)(0) == 1.0


def test_what_follows_a_warm_up_counts_from_its_end() -> None:
    """The schedule behind a warm-up starts at its own count 0."""
    asked: list[int] = []
    schedule = warmup(3, then=lambda count: asked.append(count) or 0.5)
    assert [schedule(count) for count in range(3, 6)] == [0.5, 0.5, 0.5]
    assert asked == [0, 1, 2]


def test_warmup_cosine_is_a_warm_up_followed_by_a_cosine() -> None:
    """`warmup_cosine` is the join of its two parts, and `total` counts both."""
    whole, rise, wave = warmup_cosine(warmup=10, total=100, final=0.1), warmup(10), cosine(90, final=0.1)
    assert [whole(c) for c in range(150)] == [rise(c) if c < 10 else wave(c - 10) for c in range(150)]
    assert whole(100) == pytest.approx(0.1)


def test_each_joined_schedule_counts_from_its_boundary() -> None:
    """At a boundary the next schedule takes over at its own count 0."""
    schedule = join([lambda c: c, lambda c: 100 + c, lambda c: 200 + c], [2, 5])
    assert [schedule(count) for count in range(8)] == [0, 1, 100, 101, 102, 200, 201, 202]


def test_a_function_of_the_user_is_shown_by_its_name() -> None:
    """A schedule made of the user's function prints that function's name, not its address."""

    def dip(count: int) -> float:
        return 0.5 if count == 3 else 1.0

    assert repr(warmup(2, then=dip)) == "warmup(2, then=dip)"
    assert repr(join([constant(), dip], [4])) == "join([constant(1.0), dip], [4])"


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: constant(-1.0), r"constant\(factor\) must be a finite number, at least 0, but got -1.0"),
    (lambda: constant(math.nan), r"constant\(factor\) must be a finite number, at least 0, but got nan"),
    (lambda: constant(True), r"constant\(factor\) must be a finite number, at least 0, but got True"),
    (lambda: linear(0.0, math.inf, 5), r"linear\(end\) must be a finite number, at least 0, but got inf"),
    (lambda: linear(0.0, 1.0, 0), r"linear\(total\) must be a whole number of at least 1, but got 0"),
    (lambda: cosine(2.5), r"cosine\(total\) must be a whole number of at least 1, but got 2.5"),
    (lambda: cosine(5, final=-0.1), r"cosine\(final\) must be a finite number, at least 0, but got -0.1"),
    (lambda: warmup(-1), r"warmup\(warmup\) must be a whole number of at least 0, but got -1"),
    (lambda: warmup(3, then=0.5), r"warmup\(then\) must be a schedule, .* but got 0.5; write constant"),
    (lambda: warmup_cosine(5, 5), r"total counts all steps and must be above warmup, but got warmup=5, total=5"),
    (lambda: step_decay(0), r"step_decay\(period\) must be a whole number of at least 1, but got 0"),
    (lambda: exponential(-0.1), r"exponential\(rate\) must be a finite number, at least 0, but got -0.1"),
    (lambda: polynomial(5, power=0.0), r"polynomial\(power\) must be a finite number, above 0, but got 0.0"),
    (lambda: one_cycle(5, up_fraction=1.5), r"one_cycle\(up_fraction\) must be a finite number, at least 0 and at most 1, but got 1.5"),
    (lambda: one_cycle(5, start_div=0.0), r"one_cycle\(start_div\) must be a finite number, above 0, but got 0.0"),
    (lambda: one_cycle(5, anneal="exp"), r"one_cycle\(anneal\) must be one of \['cos', 'linear'\], but got 'exp'"),
    (lambda: cyclic(0), r"cyclic\(up\) must be a whole number of at least 1, but got 0"),
    (lambda: cyclic(2, down=0), r"cyclic\(down\) must be a whole number of at least 1, but got 0"),
    (lambda: cyclic(2, low=2.0), r"cyclic\(low\) must be a finite number, at least 0 and at most 1, but got 2.0"),
    (lambda: cyclic(2, mode="square"), r"cyclic\(mode\) must be one of \['exp_range', .*\], but got 'square'"),
    (
        lambda: cyclic(2, gamma=0.9),
        r"cyclic\(gamma=0.9\) shrinks cycles of mode=\"exp_range\", but the mode is 'triangular'; leave gamma out",
    ),
    (lambda: cosine_restarts(0), r"cosine_restarts\(period\) must be a whole number of at least 1, but got 0"),
    (lambda: cosine_restarts(5, mult=0), r"cosine_restarts\(mult\) must be a whole number of at least 1, but got 0"),
    (lambda: wsd(60, 100, 50), r"rise and fall must fit into total, but got warmup=60, decay=50, total=100"),
    (lambda: wsd(6, 100, 50, shape="exp"), r"wsd\(shape\) must be one of \['cos', 'linear', 'sqrt'\], but got 'exp'"),
    (lambda: join([constant()], [3]), r"one boundary fewer than schedules, but got 1 schedules and 1 boundaries"),
    (lambda: join([], []), r"one boundary fewer than schedules, but got 0 schedules"),
    (lambda: join([constant(), 0.5], [3]), r"join\(schedules\)\[1\] must be a schedule"),
    (lambda: join([constant()] * 3, [5, 5]), r"join\(boundaries\) must rise, but got \[5, 5\]"),
    (lambda: join([constant()] * 2, [0]), r"join\(boundaries\) must be a whole number of at least 1, but got 0"),
]


@pytest.mark.parametrize("make, message", REFUSED)
def test_a_bad_argument_is_refused_with_what_was_expected_and_what_came(make: Callable[[], Any], message: str) -> None:
    """Every argument is checked when the schedule is made, before any training."""
    with pytest.raises(ConfigError, match=message):
        make()
