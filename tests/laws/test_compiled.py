"""Law 8: a traced step is the eager one, bitwise, with every combinator beside it; what is no part of a graph says so."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fnlight import FitConfig, Last, Max, Mean, Min, Pipe, Sum, Task, TensorLoader, TrainState, compile, fit, pipe, run, steps  # noqa: A004  # what everybody in this field calls it
from fnlight.errors import CompileWarning
from fnlight.testing import assert_trees_equal
from tests.laws.combinators import ENTRIES, pipe_with
from tests.laws.tasks import TASKS

CASE = TASKS["mlp with BatchNorm and dropout"]
WITHOUT = {
    "recompute": "fnlight/gradients/recompute.py",
    "exact_ranks": "the step seeds the generators with something else than its key",
    "microbatch auto": "repeats a step that runs out of memory",
    "loss_scale": "must read after every step whether it was skipped",
    "autocast fp16": "must read after every step whether it was skipped",
}
"""Combinators that run without a graph, with the reason in the warning."""
CHOICES = [name for name in ENTRIES if name not in ("compile", "debug_bundle", "profile")]
"""Bundles hold what an eager step repeats, and only one run of a process is profiled at a time."""


def compiled(whole: Pipe, choice: str) -> Pipe:
    """The same pipe with its update in a graph."""
    parts = list(whole.combinators)
    at = 1 + max(i for i, part in enumerate(parts) if part.gives == "step" and part.takes != "step")
    base = CASE.make().train_step
    for name in (choice, *ENTRIES[choice].needs):
        base = ENTRIES[name].base(base)
    return pipe(base, *parts[:at], compile("trace"), *parts[at:])


@pytest.mark.parametrize("choice", [name for name in CHOICES if name != "manual"])
def test_a_traced_step_is_the_eager_one_with_every_combinator(choice: str, tmp_path: Path) -> None:
    """Weights, buffers, slots, memory, progress and history after two epochs are bitwise those of the eager step."""
    ends, said = [], []
    for place in ("eager", "traced"):
        whole = pipe_with(choice, CASE.make(), tmp_path / place, CASE.batches(2))
        step = whole if place == "eager" else compiled(whole, choice)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", CompileWarning)
            state = TrainState.create(CASE.make(), seed=3)
            for state, _ in run(step, state, CASE.batches()):
                if state.progress.epoch == 2:
                    break
        ends.append(state)
        said.append([str(w.message) for w in found if w.category is CompileWarning])
    for name in ("params", "buffers", "opt_state", "history"):
        assert_trees_equal(getattr(ends[0], name), getattr(ends[1], name))
    assert ends[0].progress == ends[1].progress
    assert not said[0]
    assert [WITHOUT.get(choice, "nothing") in text for text in said[1]] == [True] * (choice in WITHOUT)


def test_four_updates_in_a_call_log_what_four_calls_do() -> None:
    """Numbers, means, sums, extremes and last values, by the window, by the epoch and in the history: those of single updates, within 1e-5."""

    def train_step(model: nn.Module, batch: Any) -> Any:
        x, y = batch
        logits = model(x)
        loss, hits = F.cross_entropy(logits, y), (logits.argmax(-1) == y).float()
        one = loss.detach()
        return loss, {
            "acc": hits.mean(),
            "mean": Mean(hits.sum(), len(y)),
            "sum": Sum(hits.sum()),
            "max": Max(one),
            "min": Min(one),
            "last": Last(one),
        }

    gen = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=gen)
    data = TensorLoader((x, (x[:, 0] > 0).long()), batch_size=10, shuffle=True)
    logs: list[list[Any]] = [[], []]
    ends = []
    for log, unroll in zip(logs, (1, 4), strict=True):
        torch.manual_seed(0)
        task = Task(nn.Linear(8, 2), train_step, configure_optimizers=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2))
        config = FitConfig(max_epochs=2, log_every=steps(4), sinks=(log.append,), progress=False, compile="trace", unroll=unroll)
        ends.append(fit(TrainState.create(task, seed=0), data, config))
    assert [(r.step, r.epoch) for r in logs[0]] == [(r.step, r.epoch) for r in logs[1]]
    assert len(logs[0]) >= 10
    for one, four in zip([*logs[0], *ends[0].history], [*logs[1], *ends[1].history], strict=True):
        assert set(one.metrics) == set(four.metrics)
        assert {"train/last", "train_epoch/last"} & set(one.metrics)
        for name, value in one.metrics.items():
            if name.startswith("train"):
                assert four.metrics[name] == pytest.approx(value, rel=1e-5), name
