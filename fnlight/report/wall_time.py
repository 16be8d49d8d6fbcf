"""Where the time of a training went, as a table: throughput, time by cause, goodput, and the share of the device's peak."""

from typing import Any

import attrs

from fnlight.data import Item
from fnlight.report.flops import device_name, flops, peak_flops
from fnlight.state import TrainState

_SAYS = {
    "step": "steps",
    "start": "start-up",
    "data": "waiting for data",
    "evaluate": "evaluation",
    "log": "logging",
    "save": "saving",
    "stall": "waiting for a save",
    "lost": "lost to restarts",
}


@attrs.frozen
class RunReport:
    """What `times` found; it prints as a table.

    Args:
        steps: Completed steps.
        samples: Samples seen.
        runs: Runs that it took.
        seconds: Seconds of wall time by cause, the steps first.
        flops: Floating-point operations a sample; None where no batch was given.
        device: The name of the device.
        precision: What was computed in, as the caller says.
        peak: FLOP/s of the device at most; None where that is not known.

    Example:
        >>> print(RunReport(100, 1000, 1, {"step": 8.0, "start": 2.0}, 5_000_000, "NVIDIA T4", "fp16", 65e12))
        100 steps and 1,000 samples in 10.0 s of 1 run, 100 samples/s
        steps     8.0 s   80.0 %  (goodput)
        start-up  2.0 s   20.0 %
        <BLANKLINE>
        5 MFLOP a sample, 625 MFLOP/s within steps: 0.00 % of the peak of NVIDIA T4 in fp16
    """

    steps: int
    samples: int
    runs: int
    seconds: dict[str, float]
    flops: float | None
    device: str
    precision: str
    peak: float | None

    @property
    def total(self) -> float:
        """Seconds of wall time."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the time in which steps were made, in 0..1."""
        return self.seconds["step"] / self.total if self.total else 0.0

    @property
    def samples_per_second(self) -> float:
        """Samples a second of all of the time."""
        return self.samples / self.total if self.total else 0.0

    @property
    def flops_per_second(self) -> float | None:
        """FLOP/s within steps; None where no batch was given."""
        return None if self.flops is None or not self.seconds["step"] else self.flops * self.samples / self.seconds["step"]

    @property
    def utilisation(self) -> float | None:
        """The share of the device's peak that the model's operations come to within steps; None where either is not known."""
        found = self.flops_per_second
        return None if found is None or self.peak is None else found / self.peak

    def __str__(self) -> str:
        runs = f"{self.runs} run{'' if self.runs == 1 else 's'}"
        head = (
            f"{self.steps:,} steps and {self.samples:,} samples in {self.total:,.1f} s of {runs}, {self.samples_per_second:,.0f} samples/s"
        )
        shown = {_SAYS[cause]: taken for cause, taken in self.seconds.items() if taken or cause == "step"}
        width, digits = max(map(len, shown)), max(len(f"{taken:,.1f}") for taken in shown.values())
        lines = [
            f"{name.ljust(width)}  {f'{taken:,.1f}'.rjust(digits)} s  {100 * taken / (self.total or 1):5.1f} %"
            for name, taken in shown.items()
        ]
        lines[0] += "  (goodput)"
        return "\n".join([head, *lines, *self._work()])

    def _work(self) -> list[str]:
        rate = self.flops_per_second
        if self.flops is None or rate is None:
            return []
        text = f"{_short(self.flops)}FLOP a sample, {_short(rate)}FLOP/s within steps"
        if self.utilisation is None:
            return ["", f"{text}; the peak of {self.device} in {self.precision} is not known"]
        return ["", f"{text}: {self.utilisation:.2%} of the peak of {self.device} in {self.precision}".replace("%", " %")]


def _short(number: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "


def wall_time(state: TrainState, batch: Any = None, *, precision: str = "fp32") -> RunReport:
    """Say where the time of a training went, over all runs that it took.

    Args:
        state: Where training stands.
        batch: One batch, of which the operations are counted; None leaves out what the model computes.
        precision: What the run computed in: as ``FitConfig(precision=...)``, or ``"tf32"``; the device's peak depends on it.

    Returns:
        The report; ``print`` shows the table.

    Raises:
        ConfigError: If there is no such precision.
        DonatedStateError: If the state was given to a later step.

    Example:
        >>> from fnlight.testing import tiny_batches, tiny_task
        >>> from fnlight.step import update
        >>> state, _ = update(TrainState.create(tiny_task()), tiny_batches()[0])
        >>> wall_time(state).total  # no run, no time
        0.0
    """
    spent, device = state.wall_time, device_name(state.device)
    item = None if batch is None else Item.of(batch, state=state)
    counted = None if item is None else flops(state, item) / max(1, item.samples)
    at = state.progress
    return RunReport(
        steps=at.step,
        samples=at.samples,
        runs=spent.runs,
        seconds=spent.seconds(),
        flops=counted,
        device=device,
        precision=precision,
        peak=peak_flops(state.device, precision),
    )
