"""Laws of large matrix products: another library computes them, and nothing else changes."""

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fnlight as fl
from fnlight.compile.products import biases_apart, by_onednn, prefers_onednn
from fnlight.testing import assert_trees_equal

AMD = "vendor_id : AuthenticAMD"


def targets(fn: Any, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[str]:
    """What a graph calls once products were given to oneDNN."""
    graph = make_fx(fn, tracing_mode="fake")(*(torch.zeros(shape, dtype=dtype) for shape in shapes))
    by_onednn(graph)
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def trained(monkeypatch: pytest.MonkeyPatch, onednn: bool | None, batch: int = 64) -> fl.TrainState:
    """Six steps of a model whose products are large; None is the eager step."""
    monkeypatch.setattr(sys.modules["fnlight.compile.lower"], "prefers_onednn", lambda: onednn)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256, bias=False), nn.Tanh(), nn.Linear(256, 3))

    def train_step(model: nn.Module, given: Any) -> Any:
        return F.cross_entropy(model(given[0]), given[1])

    task = fl.Task(model, train_step, configure_optimizers=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3))
    parts = () if onednn is None else (fl.compile("step"),)
    step = fl.pipe(train_step, fl.grad(), fl.apply(), *parts, fl.stop_when(fl.max_steps(6)))
    data = [(torch.randn(batch, 256), torch.randint(0, 3, (batch,))) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", fl.errors.CompileWarning)
        *_, (state, _) = fl.run(step, fl.TrainState.create(task, seed=0), data)
    return state


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_a_step_whose_products_onednn_computes_is_the_eager_one_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a bias, forwards, for the gradients of inputs and of weights; and the same bits every time."""
    states = [trained(monkeypatch, onednn) for onednn in (None, True, True)]
    eager, one, two = (dict(state.params) for state in states)
    for name, value in eager.items():
        assert torch.allclose(value, one[name], rtol=1e-4, atol=1e-5), name
    assert_trees_equal(one, two)


def test_only_large_products_of_float32_are_given_away() -> None:
    """Small and narrow ones cost less where they are, other types have ways of their own, and a bias of two dimensions is none."""
    large, small, narrow = ((256, 256), (256, 64)), ((32, 32), (32, 64)), ((1, 2048), (2048, 2048))
    assert targets(torch.mm, *large) == ["aten.permute.default", "mkldnn._linear_pointwise.default"]
    assert targets(torch.addmm, (64,), *large) == ["aten.permute.default", "mkldnn._linear_pointwise.default"]
    assert targets(torch.mm, *small) == ["aten.mm.default"]
    assert targets(torch.mm, *narrow) == ["aten.mm.default"]
    assert targets(torch.mm, *large, dtype=torch.float64) == ["aten.mm.default"]
    assert targets(torch.addmm, (256, 64), *large) == ["aten.addmm.default"]
    assert targets(lambda bias, a, b: torch.addmm(bias, a, b, beta=2), (64,), *large) == ["aten.addmm.default"]


@pytest.mark.parametrize(
    ("capability", "said", "expected"), [("AVX512", AMD, True), ("AVX2", AMD, False), ("AVX512", "vendor_id : GenuineIntel", False)]
)
def test_onednn_is_preferred_where_mkl_leaves_half_of_the_processor_idle(
    monkeypatch: pytest.MonkeyPatch, capability: str, said: str, expected: bool
) -> None:
    """On processors of AMD with AVX-512."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert prefers_onednn(said) is (expected and both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_bias_is_added_by_the_loop_behind_its_product(dtype: torch.dtype) -> None:
    """Where it would not be rounded once more; the numbers are those of before."""
    given = torch.randn(10, dtype=dtype), torch.randn(32, 64, dtype=dtype), torch.randn(64, 10, dtype=dtype)
    graph = make_fx(lambda bias, a, b: torch.addmm(bias, a, b).relu(), tracing_mode="fake")(*given)
    biases_apart(graph)
    called = [str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function"]
    assert called == (["addmm", "relu"] if dtype == torch.bfloat16 else ["mm", "realize", "add", "relu"])
    torch.testing.assert_close(graph(*given), torch.addmm(*given).relu())


def test_a_bias_of_a_large_product_stays_where_it_is() -> None:
    """There a loop more over the result would cost what the copy of the bias does."""
    given = torch.zeros(128), torch.zeros(256, 128), torch.zeros(128, 128)
    graph = make_fx(torch.addmm, tracing_mode="fake")(*given)
    biases_apart(graph)
    assert [str(node.target) for node in graph.graph.nodes if node.op == "call_function"] == ["aten.addmm.default"]


def test_a_scaled_bias_stays_where_it_is() -> None:
    """Only what a linear layer calls is taken apart."""
    graph = make_fx(lambda bias, a, b: torch.addmm(bias, a, b, beta=0.5), tracing_mode="fake")(*map(torch.zeros, (4, (2, 3), (3, 4))))
    biases_apart(graph)
    assert [str(node.target) for node in graph.graph.nodes if node.op == "call_function"] == ["aten.addmm.default"]
