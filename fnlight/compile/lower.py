"""Compile the graph of a whole update to machine code, with torch's own compiler."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from fnlight.compile._private_torch import (
    Operation,
    compile_graph,
    decompositions,
    direct,
    fake_mode,
    make_graph,
    realized,
    with_onednn,
    with_settings,
    writes,
    writing_norm,
)
from fnlight.compile.products import biases_apart, by_onednn, prefers_onednn
from fnlight.compile.shadow import UntraceableError
from fnlight.tensors import isolated, seed_generators


def lower(graph: fx.GraphModule, example: Sequence[Tensor], cache_dir: str | None = None) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """Compile a graph that changes its inputs in place.

    In-place operations become values that are written back at the end, random numbers are those of the eager kernels, and on the CPU
    the calling code is machine code too.

    Args:
        graph: The graph that `trace` made with ``lowers=True``.
        example: Example inputs; they are not changed.
        cache_dir: Directory of compiled code, for other processes; None takes torch's default.

    Returns:
        A function of a list of tensors; it empties the list.

    Raises:
        UntraceableError: If torch's compiler fails.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(lambda x: [x.add_(1) * 2])(torch.zeros(2))
        >>> x = torch.zeros(2)
        >>> lower(graph, [x])([x])[0].tolist(), x.tolist()
        ([2.0, 2.0], [1.0, 1.0])
    """
    fake = fake_mode()
    inputs = [fake.from_tensor(tensor.detach()) for tensor in example]
    on_cpu = all(tensor.device.type == "cpu" for tensor in example)
    settings = {"fallback_random": True, "cpp_wrapper": on_cpu, "layout_optimization": not on_cpu, "size_asserts": False}
    _say_what_norms_write(graph)
    with torch.no_grad(), with_settings(settings), _cached(cache_dir):
        with fake:
            values = make_graph(torch.func.functionalize(graph, remove="mutations"), inputs, decomposition_table=decompositions())
        _without_aliases(values)
        others = on_cpu and prefers_onednn()
        if on_cpu:
            _once(values)
        if others:
            by_onednn(values)
        if on_cpu:
            biases_apart(values)
        with with_onednn() if others else nullcontext():
            found = compile_graph(values, inputs, fake, on_cpu)
    if not _agree(graph, found, example):
        raise UntraceableError("the compiled code returns NaN where the eager operations return none")
    return direct(found) if on_cpu else found


def _agree(graph: Any, made: Any, example: Sequence[Tensor]) -> bool:
    """Whether machine code returns NaN exactly where its graph does: a compiler bug would silently spoil the model."""
    found = []
    for call in (lambda inputs: graph(*inputs), made):
        held = [tensor.detach().clone() for tensor in example]
        with torch.no_grad(), isolated(example[0].device):
            seed_generators(0, example[0].device)
            given = call(list(held))
        found.append([torch.isnan(each) for each in (*given, *held) if isinstance(each, Tensor) and each.is_floating_point()])
    return all(torch.equal(*pair) for pair in zip(*found, strict=True))


def _say_what_norms_write(graph: fx.GraphModule) -> None:
    """Replace normalisations by operations whose signature says that running statistics are written."""
    aten = torch.ops.aten
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is aten.native_batch_norm.default and node.args[3] is not None:
            node.target = writing_norm()
    graph.recompile()


_POWERS = {torch.ops.aten.pow.Scalar, torch.ops.aten.pow.Tensor_Scalar, torch.ops.aten.pow.Tensor_Tensor}
_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


def _without_aliases(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _ALIASES:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _once(graph: fx.GraphModule) -> None:
    """Compute scalars that contain a power once: torch's compiler would compute them again for each vector of the tensors that use them.

    Scalars that depend on inputs alone, such as the bias corrections of Adam, are computed first, into one tensor of each dtype.
    """
    heavy, early, wanted = set[fx.Node](), dict[fx.Node, None](), dict[fx.Node, list[fx.Node]]()
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim():
            continue
        if node.op == "placeholder" or (node.all_input_nodes and all(each in early for each in node.all_input_nodes) and _is_pure(node)):
            early[node] = None
        if node.op == "call_function" and (node.target in _POWERS or any(each in heavy for each in node.all_input_nodes)):
            heavy.add(node)
            users = [user for user in node.users if isinstance(each := user.meta.get("val"), Tensor) and each.dim()]
            wanted |= {node: users} if users else {}
    at = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in (each for each in early if each.op != "placeholder"):
        if node is not at.next:
            at.append(node)
        at = node
    together: dict[Any, list[fx.Node]] = {}
    for node in wanted:
        together.setdefault(node.meta["val"].dtype if node in early else node, []).append(node)
    for nodes in together.values():
        _realized(graph.graph, {node: wanted[node] for node in nodes}, (at if nodes[0] in early else nodes[0]).next)
    graph.recompile()


def _is_pure(node: fx.Node) -> bool:
    """Whether a node may be computed earlier: not if it is written back at the end, nor if it draws random numbers."""
    target: Any = node.target
    return isinstance(target, Operation) and not writes(target) and torch.Tag.nondeterministic_seeded not in target.tags


def _realized(graph: fx.Graph, wanted: dict[fx.Node, list[fx.Node]], at: fx.Node) -> None:
    """Compute scalars before a node, into one tensor, from which their users read them."""
    aten = torch.ops.aten

    def called(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda each: each.meta["val"]))
        return node

    with graph.inserting_before(at):
        joined = called(aten.cat.default, [called(aten.unsqueeze.default, node, 0) for node in wanted])
        held = called(realized(), joined)
        for i, (node, users) in enumerate(wanted.items()):
            number = called(aten.select.int, held, 0, i)
            for user in users:
                user.replace_input_with(node, number)


@contextmanager
def _cached(cache_dir: str | None) -> Iterator[None]:
    import os

    if cache_dir is None:
        yield
        return
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = cache_dir
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
