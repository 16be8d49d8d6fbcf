"""Laws of machine code: it computes what its graph computes, numbers once, and without what torch writes around it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import compile_fx
from torch.fx.experimental.proxy_tensor import make_fx

from fnlight.compile.lower import lower


def powers(x: Tensor, one: Tensor, two: Tensor) -> list[Tensor]:
    """A tensor divided by two numbers that follow from counts, and multiplied by one that follows from itself."""
    return [x / (1 - 0.9**one), x / (1 - 0.9**two), x * 0.5 ** x.mean()]


def test_a_power_of_a_count_is_computed_once() -> None:
    """What a tensor is divided by comes out of a loop of its own, or every vector of the tensor would compute it again; counts come first."""
    inputs = [torch.ones(4096), torch.tensor(3.0, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)]
    graph = make_fx(powers)(*inputs)
    seen: list[Any] = []

    def keep(graph: Any, *_: Any, **__: Any) -> Any:
        seen.append([str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function"])
        return made(graph, *_, **__)

    made = compile_fx.compile_fx_inner
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_fx, "compile_fx_inner", keep)
        call = lower(graph, inputs)
    joined = ["unsqueeze", "unsqueeze", "cat", "realize", "select", "select"]
    alone = ["mean", "pow", "unsqueeze", "cat", "realize", "select"]
    assert seen == [["pow", "sub", "pow", "sub", *joined, "div", "div", *alone, "mul"]]
    x, one, two = torch.full((4096,), 3.0), torch.tensor(2.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)
    for found, wanted in zip(call([x, one, two]), powers(x, one, two), strict=True):
        assert torch.allclose(found, wanted)


def test_inputs_are_given_to_machine_code_as_they_are() -> None:
    """Nobody looks at each of them again, and they are let go of."""
    given = [torch.ones(8)]
    call = lower(make_fx(lambda x: [x + 1, x.sum()])(*given), given)
    assert call.__code__.co_filename.endswith("_private_torch.py")
    more, total = call(given)
    assert (more.tolist(), total.item(), given) == ([2.0] * 8, 8.0, [])


def test_a_tensor_within_the_graph_is_given_to_machine_code_too() -> None:
    """It comes behind the inputs, from what torch writes around the code, which then stays there."""
    inside = torch.arange(8.0)
    call = lower(make_fx(lambda x: [x + inside])(torch.ones(8)), [torch.ones(8)])
    assert call([torch.ones(8)])[0].tolist() == (inside + 1).tolist()


def test_a_number_is_read_before_it_is_written_back() -> None:
    """What is computed first is not written first, where it is still read as it was."""

    def decaying(x: Tensor, rate: Tensor) -> list[Tensor]:
        out = [x * rate, x * 0.5**rate]
        rate.copy_(0.9**rate)
        return out

    graph = make_fx(decaying)(torch.ones(64), torch.tensor(2.0))
    x, rate = torch.ones(64), torch.tensor(3.0)
    once, powered = lower(graph, [torch.ones(64), torch.tensor(2.0)])([x, rate])
    assert (once[0].item(), powered[0].item()) == (3.0, 0.125)
    assert rate.item() == pytest.approx(0.9**3)
