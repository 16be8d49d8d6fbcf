"""Matrix products on a CPU: large ones by oneDNN where it is faster; biases of small ones are fused into the loops around them.

With the second, a compiled step of an MLP 32-64-10 takes 0.89 of the time (torch 2.13.0, Intel; ``python tests/benchmarks/kept.py bias``). With
the first, one of a small GPT takes 0.93 on an AMD EPYC with AVX-512; on Intel it would take 1.21, so it is not used there (``kept.py onednn``). Below a
gain of 2 % either is to be deleted.
"""

from pathlib import Path

import torch
from torch import Tensor, fx

from fnlight.compile._private_torch import linear, realized

_LEAST = 1 << 21  # multiplications of a large product, for which the overhead of a oneDNN call pays off
_NARROW = 8  # with fewer rows or columns it does not


def prefers_onednn(cpuinfo: str | None = None) -> bool:
    """Whether oneDNN computes float32 matrix products faster on this processor.

    MKL, which torch calls, uses 256-bit kernels on all AMD processors. On those with AVX-512, oneDNN takes half the time.
    This is a rule and not a measurement, so that a program computes the same bits every time.

    Args:
        cpuinfo: The system's description of the processor; None reads it.

    Returns:
        True on an AMD processor with AVX-512.

    Example:
        >>> prefers_onednn("vendor_id : GenuineIntel")
        False
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    where = Path("/proc/cpuinfo")
    said = cpuinfo if cpuinfo is not None else where.read_text(encoding="utf-8", errors="replace") if where.exists() else ""
    return "AuthenticAMD" in said


def by_onednn(graph: fx.GraphModule) -> None:
    """Let oneDNN compute the large products of a graph.

    Args:
        graph: Changed in place; its nodes know their values (``meta["val"]``).

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(lambda a, b: a @ b, tracing_mode="fake")(torch.zeros(256, 128), torch.zeros(128, 64))
        >>> by_onednn(graph)
        >>> [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        ['aten.permute.default', 'mkldnn._linear_pointwise.default']
    """
    aten, nodes = torch.ops.aten, graph.graph
    for node in list(nodes.nodes):
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, a, b = node.args
        if not _is_large(a.meta["val"], b.meta["val"]) or (bias and bias[0].meta["val"].dim() != 1):
            continue
        with nodes.inserting_before(node):
            turned = nodes.call_function(aten.permute.default, (b, [1, 0]))
            turned.meta["val"] = b.meta["val"].t()
            done = nodes.call_function(linear(), (a, turned, bias[0] if bias else None, "none", [], ""))
        done.meta.update(node.meta)
        node.replace_all_uses_with(done)
        nodes.erase_node(node)
    graph.recompile()


def biases_apart(graph: fx.GraphModule) -> None:
    """Add the bias of a small product in the loop that follows it: torch copies the bias into every row of the result first.

    This saves a call. After a large product, one more loop over the result would cost as much or more.

    Args:
        graph: Changed in place; its nodes know their values (``meta["val"]``).

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(lambda bias, a, b: torch.addmm(bias, a, b), tracing_mode="fake")(torch.zeros(4), torch.zeros(2, 3), torch.zeros(3, 4))
        >>> biases_apart(graph)
        >>> [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        ['aten.mm.default', '_inductor_test.realize.default', 'aten.add.Tensor']
    """
    aten, nodes = torch.ops.aten, graph.graph
    for node in list(nodes.nodes):
        if node.target is not aten.addmm.default or node.kwargs or node.meta["val"].dtype not in (torch.float32, torch.float64):
            continue
        bias, a, b = node.args
        if _size(a.meta["val"], b.meta["val"]) >= _LEAST:
            continue
        with nodes.inserting_before(node):
            product = nodes.call_function(aten.mm.default, (a, b))
            held = nodes.call_function(realized(), (product,))  # or torch's compiler would join them again
            done = nodes.call_function(aten.add.Tensor, (held, bias))
        for each in (product, held, done):
            each.meta.update(node.meta)
        node.replace_all_uses_with(done)
        nodes.erase_node(node)
    graph.recompile()


def _is_large(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and _size(a, b) >= _LEAST and min(*a.shape, b.shape[1]) >= _NARROW


def _size(a: Tensor, b: Tensor) -> int:
    return a.numel() * b.shape[1]
