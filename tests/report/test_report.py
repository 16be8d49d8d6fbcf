"""`summary`, `flops` and `wall_time`: correct counts and shapes; the caller's model does not change."""

import copy
import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console as Screen
from torch import nn

from fnlight.data import Item
from fnlight.errors import ConfigError, DonatedStateError
from fnlight.gradients import grad
from fnlight.loop import run, stop_when
from fnlight.pipe import pipe
from fnlight.report import PEAKS, ModelSummary, RunReport, flops, peak_flops, summary, wall_time
from fnlight.state import Task, TrainState
from fnlight.step import apply
from fnlight.tensors import equal
from fnlight.triggers import max_steps


class Tied(nn.Module):
    """A language model whose output layer shares the weight of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 10, bias=True)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.embed(x)))


def mlp() -> nn.Sequential:
    """A model with buffers and dropout."""
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def named(found: ModelSummary) -> dict[str, Any]:
    """The rows by name."""
    return {row.name: row for row in found.rows}


def loss_of(model: Any, batch: Any) -> Any:
    """A train_step."""
    return model(batch).sum()


def sgd(model: Any) -> Any:
    """A configure_optimizers."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_the_summary_of_an_mlp() -> None:
    """Names, types, parameters, shapes, modes, buffers and bytes of an MLP, counted by hand, and its table."""
    model = mlp()
    model[1].eval()
    found = summary(model, torch.zeros(5, 8))
    assert [(row.name, row.type, row.trainable, row.frozen, row.output, row.training) for row in found.rows] == [
        ("", "Sequential", 227, 0, "[5, 3]", True),
        ("0", "Linear", 8 * 16 + 16, 0, "[5, 16]", True),
        ("1", "BatchNorm1d", 32, 0, "[5, 16]", False),
        ("2", "ReLU", 0, 0, "[5, 16]", True),
        ("3", "Dropout", 0, 0, "[5, 16]", True),
        ("4", "Linear", 16 * 3 + 3, 0, "[5, 3]", True),
    ]
    assert (found.trainable, found.frozen, found.parameters, found.buffers) == (227, 0, 227, 33)
    assert found.num_bytes == (227 + 32) * 4 + 8, "the counter of batches is an int64"
    assert str(found) == (
        "name     type         parameters  output   mode\n"
        "(model)  Sequential          227  [5, 3]   train\n"
        "0        Linear              144  [5, 16]  train\n"
        "1        BatchNorm1d          32  [5, 16]  eval\n"
        "2        ReLU                  0  [5, 16]  train\n"
        "3        Dropout               0  [5, 16]  train\n"
        "4        Linear               51  [5, 3]   train\n"
        "\n"
        "227 parameters: 227 trainable, 0 frozen; 33 in buffers; 0.00104 MB"
    )


def test_tied_weights_count_once() -> None:
    """A tied weight is counted at its first module and shown as shared at the other; the rows add up to the total."""
    found = summary(Tied(), torch.zeros(2, 3, dtype=torch.int64))
    rows = named(found)
    assert found.trainable == 10 * 4 + 8 + 10
    assert (rows["embed"].trainable, rows["embed"].shared) == (40, 0)
    assert (rows["out"].trainable, rows["out"].shared, rows["out"].output) == (10, 40, "[2, 3, 10]")
    assert sum(row.trainable for row in found.rows if row.name) == found.trainable == rows[""].trainable
    assert found.num_bytes == 58 * 4
    assert "10 (40 shared)" in str(found)


def test_a_module_with_two_names_is_listed_twice_and_counted_once() -> None:
    """Both names are in the table; all parameters of the second row are shared."""
    shared = nn.Linear(3, 3)
    found = summary(nn.Sequential(shared, nn.ReLU(), shared), torch.zeros(1, 3))
    rows = named(found)
    assert [rows[name].trainable for name in ("", "0", "1", "2")] == [12, 12, 0, 0]
    assert (rows["2"].shared, rows["2"].output, found.parameters) == (12, "[1, 3]", 12)


def test_frozen_parts_are_marked() -> None:
    """Frozen parameters are counted separately, also if a module has both kinds."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    found = summary(model)
    assert [(row.trainable, row.frozen) for row in found.rows] == [(4, 8), (0, 6), (4, 2)]
    assert (found.trainable, found.frozen, found.parameters) == (4, 8, 12)
    table = str(found)
    assert (
        "(model)  Sequential  4 8 frozen  train\n0        Linear        6 frozen  train\n1        Linear      4 2 frozen  train\n" in table
    )
    assert "12 parameters: 4 trainable, 8 frozen; 0 in buffers" in table


@pytest.mark.parametrize(
    "depth, names",
    [
        (0, [""]),
        (1, ["", "0", "1"]),
        (2, ["", "0", "0.0", "0.1", "1"]),
        (9, ["", "0", "0.0", "0.0.0", "0.1", "1"]),
    ],
)
def test_deeper_modules_are_counted_in_their_listed_parent(depth: int, names: list[str]) -> None:
    """Each depth lists its names; the depth changes neither a total nor the count of a listed module."""
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 3)), nn.Linear(3, 4)), nn.Linear(4, 5))
    counts = {"": 50, "0": 25, "0.0": 9, "0.0.0": 9, "0.1": 16, "1": 25}
    found = summary(model, torch.zeros(1, 2), depth=depth)
    assert {row.name: row.trainable for row in found.rows} == {name: counts[name] for name in names}
    assert found.parameters == 50
    assert named(found)[""].output == "[1, 5]"


def test_the_size_depends_on_the_dtypes() -> None:
    """Each element counts with the bytes of its dtype."""
    model = nn.Sequential(nn.Linear(10, 10, bias=False).bfloat16(), nn.Linear(10, 10, bias=False).double())
    model.register_buffer("steps", torch.zeros(3, dtype=torch.uint8), persistent=False)
    found = summary(model)
    assert (found.num_bytes, found.buffers) == (100 * 2 + 100 * 8 + 3, 3)
    assert found.megabytes == pytest.approx(1003 / 1e6)


def test_outputs_of_any_shape_are_described() -> None:
    """Up to three tensors are listed; an output without tensors shows its type; a module that was not called has a dash."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.many, self.none, self.unused = nn.LSTM(3, 4), nn.Identity(), nn.Identity(), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            self.none("text")
            self.many([x, x, x, x])
            self.many(x[0])
            return {"out": self.rnn(x)[0]}

    rows = named(summary(Odd(), torch.zeros(5, 2, 3)))
    assert rows[""].output == "[5, 2, 4]"
    assert rows["rnn"].output == "[5, 2, 4], [1, 2, 4], [1, 2, 4]"
    assert rows["many"].output == "[5, 2, 3], [5, 2, 3], [5, 2, 3], ...", "the first call counts"
    assert (rows["none"].output, rows["unused"].output) == ("str", None)
    assert str(summary(Odd(), torch.zeros(5, 2, 3))).splitlines()[5].split() == ["unused", "Linear", "6", "-", "train"]


def test_without_a_batch_there_are_no_shapes() -> None:
    """The model does not run, and the table has no output column."""
    found = summary(mlp())
    assert {row.output for row in found.rows} == {None}
    assert "output" not in str(found)


def test_a_task_is_run_with_its_predict_step_if_it_has_one() -> None:
    """The model runs in predict_step if there is one, else eval_step, else train_step; in eval mode and without gradients."""
    seen: list[tuple[str, bool, bool]] = []

    def step(name: str) -> Any:
        def call(model: Any, batch: Any) -> Any:
            seen.append((name, model.training, torch.is_grad_enabled()))
            return model(batch["x"]).sum()

        return call

    batch = {"x": torch.zeros(2, 8)}
    for given in ({"eval_step": step("eval"), "predict_step": step("predict")}, {"eval_step": step("eval")}, {}):
        task = Task(mlp(), step("train"), **given, configure_optimizers=sgd)
        for model in (task, TrainState.create(task)):
            assert summary(model, batch).rows[0].output == "[2, 3]"
    assert seen == [(name, False, False) for name in ("predict", "predict", "eval", "eval", "train", "train")]


def test_a_summary_does_not_change_the_model_the_batch_or_the_generators() -> None:
    """Weights, buffers, modes, hooks, gradients, the batch and all generators stay the same, even if the step changes them."""

    def rude(model: Any, batch: Any) -> Any:
        model.train()
        out = model(batch)
        batch.zero_()
        with torch.no_grad():
            model[0].weight.zero_()
        random.random()
        np.random.rand()  # noqa: NPY002  # the test is about the global generator
        return out + torch.rand(3)

    model, batch = mlp(), torch.ones(4, 8, requires_grad=True)
    model[1].eval()
    state = TrainState.create(Task(model, rude, configure_optimizers=sgd))
    live = state.live.module
    before = copy.deepcopy((model.state_dict(), live.state_dict(), batch.detach()))
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002  # as above
    for whole in (state, state.task, model):
        summary(whole, batch)
    after = model.state_dict(), live.state_dict(), batch.detach()
    assert equal(before, after)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert np.array_equal(np.random.get_state()[1], generators[2])  # noqa: NPY002  # as above
    for module in (model, live):
        assert [m.training for m in module.modules()] == [True, True, False, True, True, True]
        assert not any(m._forward_hooks for m in module.modules())
        assert all(p.grad is None for p in module.parameters())
    assert torch.is_grad_enabled()


def test_lazy_parameters_are_marked_until_a_batch_gives_them_a_shape() -> None:
    """Without a batch they count as 0 and are marked; with a batch they are counted on the copy, and the model stays lazy."""
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    found = summary(model)
    assert (found.parameters, found.rows[1].lazy, found.rows[2].lazy) == (8, True, False)
    assert "0 + lazy" in str(found)
    assert summary(model, torch.zeros(1, 5)).parameters == 5 * 3 + 3 + 8
    assert nn.parameter.is_lazy(model[0].weight)


def test_a_model_without_parameters_has_a_summary() -> None:
    """The counts are 0, and the table is printed."""
    assert str(summary(nn.Identity())).startswith(
        "name     type      parameters  mode\n(model)  Identity           0  train\n\n0 parameters"
    )


def test_an_error_in_forward_has_a_note_about_summary() -> None:
    """The error of the model is raised with a note about summary and the step function; the hooks are removed."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        summary(Task(mlp(), loss_of, predict_step=lambda model, batch: model(batch)), torch.zeros(2, 9))
    assert any("summary(...) ran predict_step on the batch" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("depth", [-1, 1.5, True, None])
def test_a_wrong_depth_is_refused(depth: Any) -> None:
    """The depth must be a whole number of at least 0."""
    with pytest.raises(ConfigError, match=r"summary\(depth=...\) must be a whole number of at least 0, but got"):
        summary(mlp(), depth=depth)


def test_an_object_without_a_model_is_refused() -> None:
    """A class is not a model."""
    with pytest.raises(TypeError, match=r"summary takes a Task, a TrainState or an nn.Module, but got type"):
        summary(nn.Linear)  # pyright: ignore[reportArgumentType]


def test_a_donated_state_has_no_summary() -> None:
    """A state whose tensors were overwritten raises an error instead of showing wrong numbers."""
    state = TrainState.create(Task(mlp(), loss_of, configure_optimizers=sgd))
    pipe(loss_of, grad(), apply())(state, torch.ones(2, 8))
    with pytest.raises(DonatedStateError, match="was donated to a later step"):
        summary(state)


def test_rich_prints_the_same_cells() -> None:
    """``rich.print`` gets a table with the same cells and totals."""
    stream = io.StringIO()
    found = summary(Tied(), torch.zeros(2, 3, dtype=torch.int64))
    Screen(file=stream, width=120).print(found)
    text = stream.getvalue()
    for line in str(found).splitlines()[:-2]:
        assert any(line.split() == shown.split() for shown in text.splitlines()), line
    assert "58 parameters: 58 trainable, 0 frozen; 0 in buffers; 0.000232 MB" in text


def convolving() -> Task:
    """A convolution and a linear layer, whose operations can be counted by hand."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    return Task(model, lambda m, b: m(b).square().mean(), configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))


def test_forward_and_backward_operations_are_counted() -> None:
    """Each product counts in forward, for the weight gradients, and for input gradients if they are needed; an addition is one operation."""
    state = TrainState.create(convolving())
    conv, linear = 2 * 4 * 3 * 8 * 8 * 2 * 3 * 3, 2 * 4 * 3 * 8 * 8 * 5
    assert flops(state, torch.randn(4, 2, 8, 8)) == 2 * conv + 3 * linear
    assert state.progress.step == 0


def test_both_batches_of_a_step_are_counted() -> None:
    """An item of several batches is one step with the operations of all."""
    state, batch = TrainState.create(convolving()), torch.randn(4, 2, 8, 8)
    assert flops(state, Item.of(batch, batch, state=state)) == 2 * flops(state, batch)


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-40GB", "tf32", 156e12),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA L4", "fp16-true", 121e12),
        ("NVIDIA L40", "fp16", None),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla T4", "fp32", 8.1e12),
        ("NVIDIA A100-SXM4-40GB", "fp64", None),
        ("NVIDIA GeForce RTX 9999", "fp32", None),
    ],
)
def test_only_known_devices_have_a_peak_rate(name: str, precision: str, peak: float | None) -> None:
    """A similar name does not match."""
    assert peak_flops(name, precision) == (peak and pytest.approx(peak))


def test_every_peak_rate_has_a_source_and_is_plausible() -> None:
    """Fewer bits are never slower, and every entry names its datasheet."""
    for device in PEAKS:
        assert device.source
        assert device.fp32 < (device.tf32 or device.fp16) <= device.fp16


def test_an_unknown_precision_is_refused() -> None:
    """The error lists the valid precisions."""
    with pytest.raises(ConfigError, match="must be one of 'fp32', 'tf32', .* but got 'fp8'"):
        peak_flops("NVIDIA L4", "fp8")


def test_a_run_report_has_throughput_causes_and_operations() -> None:
    """Throughput, times by cause and operations are computed from the state and one batch."""
    state, batch = TrainState.create(convolving()), torch.randn(4, 2, 8, 8)
    clock = iter(float(n) for n in range(100))
    step = pipe(state.task.train_step, grad(), apply(), stop_when(max_steps(3)))
    state, _ = list(run(step, state, [batch], clock=lambda: next(clock)))[-1]
    found = wall_time(state, batch)
    assert (found.steps, found.samples, found.runs) == (3, 12, 1)
    assert found.total == state.wall_time.total > 0
    assert found.flops == flops(state, batch) / 4
    assert found.flops_per_second == found.flops * 12 / found.seconds["step"]
    assert found.utilisation is None
    assert "the peak of cpu in fp32 is not known" in str(found)
    assert "FLOP" not in str(wall_time(state))


def test_utilisation_is_the_fraction_of_the_peak_rate_during_steps() -> None:
    """Time outside of steps does not reduce the utilisation."""
    found = RunReport(10, 100, 1, {"step": 2.0, "data": 2.0}, 1e12, "NVIDIA L4", "bf16", 100e12)
    assert found.utilisation == 0.5
    assert found.goodput == 0.5
    assert "1 TFLOP per sample, 50 TFLOP/s during steps: 50.00 % of the peak of NVIDIA L4 in bf16" in str(found)
