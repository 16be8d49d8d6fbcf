"""CUDA graphs: without a device with a fake capture function; with a CUDA device the real capture."""

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

import fnlight as fl
from fnlight.compile.capture import Captured
from fnlight.testing import assert_trees_equal
from tests.compile.test_compiled_steps import OPTIMIZERS, apart, batches_of, task_of, trained

HAS_CUDA = torch.cuda.is_available()


@attrs.define
class Device:
    """Captures as a device does: what is launched works on the tensors of then, and writes its results where they were."""

    captures: int = 0
    launches: int = 0

    def capture(self, fn: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Nothing runs while a device captures, so what there is holds nothing yet."""
        self.captures += 1
        found: list[Tensor] = [torch.full((), torch.nan)]

        def launch() -> None:
            self.launches += 1
            for place, value in zip(found, fn(), strict=True):
                place.copy_(value)

        return launch, found


def decayed(weight: Tensor, rate: Tensor, x: Tensor) -> list[Tensor]:
    """An update in place, and a loss."""
    weight.mul_(1 - rate).add_(x)
    return [weight.sum()]


def test_every_call_is_one_update_with_its_own_batch() -> None:
    """The first runs the operations, the second captures and launches, and so on; results stay what they were."""
    device, weight, rate = Device(), torch.zeros(3), torch.zeros((), dtype=torch.float64)
    captured, plain, found, losses = Captured(decayed, 2, device.capture), torch.zeros(3), list[Tensor](), list[Tensor]()
    for step in range(6):
        rate.fill_(0.1 * step)
        x = torch.full((3,), float(step))
        found += captured([weight, rate, x])
        losses += decayed(plain, rate, x)
    assert (device.captures, device.launches) == (1, 5)
    assert_trees_equal([weight, found], [plain, losses])


def test_tensors_that_lie_elsewhere_are_captured_anew() -> None:
    """Another store has other tensors; the same ones, looked up again, do not."""
    device, rate = Device(), torch.zeros(())
    captured = Captured(decayed, 2, device.capture)
    one, two = torch.zeros(3), torch.ones(3)
    for weight in (one, one, one.detach(), two, two):
        captured([weight, rate, torch.ones(3)])
    assert device.captures == 2
    assert (one.tolist(), two.tolist()) == ([3.0] * 3, [3.0] * 3)


def test_what_cannot_be_captured_goes_on_without() -> None:
    """A warning says why, once, and every update is made."""

    def refusing(fn: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    captured, weight = Captured(decayed, 1, refusing), torch.zeros(1)
    captured([weight, torch.zeros(()), torch.ones(1)])
    with pytest.warns(fl.errors.CompileWarning, match="at level 'graph': operation not permitted when stream is capturing; continuing"):
        captured([weight, torch.zeros(()), torch.ones(1)])
    captured([weight, torch.zeros(()), torch.ones(1)])
    assert weight.tolist() == [3.0]


def test_other_devices_are_refused_before_any_work() -> None:
    """The message says what to take instead, from `fit` as from a step by hand."""
    state = fl.TrainState.create(task_of())
    with pytest.raises(fl.errors.ConfigError, match="this training is on the device cpu; use 'step' or 'trace'"):
        fl.fit(state, batches_of(), fl.FitConfig(max_steps=2, compile="graph", device="cpu", progress=False))
    step = fl.pipe(state.task.train_step, fl.grad(), fl.apply(), fl.compile("graph"))
    with pytest.raises(fl.errors.ConfigError, match="this training is on the device cpu"):
        step(state.copy(), batches_of()[0])


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("name", ["SGD with momentum", "AdamW"])
def test_a_captured_step_is_the_eager_one_up_to_rounding(name: str, unroll: int) -> None:
    """On a device: the same training, clipped, averaged, with a schedule."""
    task = task_of(OPTIMIZERS[name])
    data = [(x.cuda(), y.cuda()) for x, y in batches_of((6,) * 6)]
    one, _ = trained(task, data=data, device="cuda")
    two, _ = trained(task, fl.compile("graph", unroll=unroll), data=data, device="cuda")
    assert apart(one, two) < 1e-4
    assert one.progress == two.progress
