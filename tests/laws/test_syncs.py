"""Law 9: between two ticks no step waits for the device: nothing that a combinator does at every step brings a number to the host."""

import warnings
from itertools import islice
from pathlib import Path
from typing import Self

import attrs
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fnlight import (
    Task,
    TrainState,
    check_finite,
    checkpoint_every,
    evaluate_every,
    log_to,
    pipe,
    rollback,
    run,
    skip_nonfinite,
    skip_spikes,
    steps,
)
from fnlight.errors import MemoryWarning
from fnlight.testing import RecordingSink
from tests.laws.combinators import ENTRIES, pipe_with

WAITING = {
    *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__"),
    *("nonzero", "equal", "allclose", "is_nonzero", "unique", "masked_select"),
}
"""What makes the host wait where a tensor is on an accelerator."""

NEVER = steps(1000)
SELDOM = {
    "check_finite": lambda folder, val: check_finite(every=NEVER),
    "rollback": lambda folder, val: rollback(folder, every=NEVER),
    "skip_nonfinite": lambda folder, val: skip_nonfinite(max_consecutive=1000),
    "skip_spikes": lambda folder, val: skip_spikes(sigma=0.5, window=2, max_consecutive=1000),
    "evaluate_every": lambda folder, val: evaluate_every(val, every=NEVER),
    "log_to": lambda folder, val: log_to(RecordingSink(), every=NEVER),
    "checkpoint_every": lambda folder, val: checkpoint_every(folder, every=NEVER),
    "checkpoint_every in the foreground": lambda folder, val: checkpoint_every(folder, every=NEVER, background=False),
}
"""The entries of the laws that have a tick at almost every step, as they are used."""

WAITS = {
    "compile": "a graph of operations takes learning rates as numbers",
    "debug_bundle": "it writes what it sees to a file",
    "manual": "it is whatever a user writes",
    "loss_scale": "the host counts the steps that made an update, as torch's own GradScaler does",
    "autocast fp16": "it needs loss_scale",
}
"""Entries that may wait, and why."""


class Waits(TorchFunctionMode):
    """Take down every call that makes the host wait, from Python and from within torch."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._below = _Below(self.found)

    def __enter__(self) -> Self:
        self._below.__enter__()
        TorchFunctionMode.__enter__(self)
        return self

    def __exit__(self, *error: object) -> None:
        TorchFunctionMode.__exit__(self, *error)
        self._below.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in WAITING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class _Below(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        TorchDispatchMode.__init__(self)
        self.heard = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.nonzero.default:
            self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


def make(train_step=None):
    def loss_of(model, batch):
        x, y = batch
        return F.cross_entropy(model(x), y)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 3))
    return Task(
        model,
        train_step or loss_of,
        lambda model, batch: {"loss": loss_of(model, batch)},
        configure_optimizers=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    )


def batches(n):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=g), torch.randint(3, (8,), generator=g)) for _ in range(n)]


def waits_of(step, task):
    """What makes the host wait in four steps, between the first four and the end of the epoch."""
    found = run(step, TrainState.create(task), batches(30))
    list(islice(found, 4))
    with Waits() as waits:
        list(islice(found, 4))
    return waits.found


@pytest.mark.parametrize("choice", [name for name in ENTRIES if name not in WAITS])
def test_no_step_waits_for_the_device_between_two_ticks(choice, tmp_path, monkeypatch):
    """Four steps with each combinator, without a tick that is due, bring nothing to the host."""
    for name in {choice, *ENTRIES[choice].needs} & SELDOM.keys():
        monkeypatch.setitem(ENTRIES, name, attrs.evolve(ENTRIES[name], build=SELDOM[name]))
    task = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MemoryWarning)
        step = pipe_with(choice, task, Path(tmp_path), batches(2))
        assert waits_of(step, task) == []


@pytest.mark.parametrize("wait", [lambda x: x.item(), lambda x: x.tolist(), float, bool, lambda x: x.cpu(), lambda x: torch.full((), x)])
def test_a_step_that_waits_is_found(wait):
    """Whatever brings a number to the host is seen, whether Python or torch asks for it."""

    def waiting(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        wait(loss.detach())
        return loss

    task = make(waiting)
    assert len(waits_of(pipe(task.train_step, *(ENTRIES[name].build(Path(), None) for name in ("grad", "apply"))), task)) >= 4


def test_a_tick_brings_all_that_is_pending_to_the_host_at_once(tmp_path):
    """A log of many steps and several metrics waits once for all of it, however many steps there were."""

    def with_metrics(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss, {f"metric{i}": loss.detach() * i for i in range(5)}

    counts = []
    for n in (5, 20):
        task, sink = make(with_metrics), RecordingSink()
        parts = [ENTRIES[name].build(tmp_path, None) for name in ("grad", "apply")]
        found = run(pipe(task.train_step, *parts, log_to(sink, every=steps(n))), TrainState.create(task), batches(50))
        with Waits() as waits:
            list(islice(found, n))
        counts.append(len(waits.found))
        assert len(sink.records) == 1
    assert counts[0] == counts[1] == 1


def test_the_names_of_exceptions_are_those_of_entries():
    """What is excepted exists."""
    assert WAITS.keys() | SELDOM.keys() <= ENTRIES.keys()
