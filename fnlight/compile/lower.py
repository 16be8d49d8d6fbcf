"""Compile the graph of a whole update to machine code, with torch's own compiler."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from fnlight.compile.products import biases_apart, by_onednn, prefers_onednn, with_onednn
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
    import torch._inductor.config as inductor
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.exc import InductorError
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fake = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    inputs = [fake.from_tensor(tensor.detach()) for tensor in example]
    on_cpu = all(tensor.device.type == "cpu" for tensor in example)
    settings = {"fallback_random": True, "cpp_wrapper": on_cpu, "layout_optimization": not on_cpu, "size_asserts": False}
    _say_what_norms_write(graph)
    with torch.no_grad(), inductor.patch(settings), _cached(cache_dir):
        with fake:
            values = make_fx(
                torch.func.functionalize(graph, remove="mutations"),
                decomposition_table={**select_decomp_table(), **_EACH},
                _allow_non_fake_inputs=True,
            )(*inputs)
        _without_aliases(values)
        others = on_cpu and prefers_onednn()
        if on_cpu:
            _once(values)
        if others:
            by_onednn(values)
        if on_cpu:
            biases_apart(values)
        try:
            with tracing(TracingContext(fake)), _writes_before_reads(), with_onednn() if others else nullcontext():
                made: Any = compile_fx_inner(values, inputs, cpp_wrapper=on_cpu)
        except InductorError as error:
            raise UntraceableError(f"torch's compiler fails with {str(error).splitlines()[0]}") from error
    found = getattr(made, "current_callable", made)  # without what is only looked at by profilers
    if not _agree(graph, found, example):
        raise UntraceableError("the compiled code returns NaN where the eager operations return none")
    return _direct(found) if on_cpu else found


_AROUND = {"torch", "_C", "_aoti", "isinstance", "Tensor", "tensor", "clear"}
_HANDLES = ("unsafe_alloc_void_ptrs_from_tensors", "alloc_tensors_by_stealing_from_void_ptrs")


def _direct(call: Any) -> Any:
    """Call machine code without the check of each input that torch wraps around it (1/40 of a small update); other wrappers are kept."""
    code = getattr(call, "__code__", None)
    if code is None or code.co_freevars != ("f",) or not {*_HANDLES} < {*code.co_names} <= {*_AROUND, *_HANDLES}:
        return call
    aoti: Any = getattr(torch._C, "_aoti")  # noqa: B009  # torch's type stubs do not know it
    entry, (give, take) = call.__closure__[0].cell_contents, (getattr(aoti, name) for name in _HANDLES)

    def direct(inputs: list[Tensor]) -> Sequence[Tensor]:
        handles = give(inputs)
        inputs.clear()  # the code lets go of each as soon as it can
        return take(entry(handles))

    return direct


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


def _norms(tensors: Sequence[Tensor], ord: float = 2.0, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.linalg.vector_norm(tensor, ord, dtype=dtype) for tensor in tensors]


def _towards(tensors: Sequence[Tensor], ends: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    return [torch.lerp(tensor, end, weight) for tensor, end, weight in zip(tensors, ends, weights, strict=True)]


_EACH = {torch.ops.aten._foreach_norm.Scalar: _norms, torch.ops.aten._foreach_lerp.List: _towards}
"""Operations on lists that torch's compiler would call one by one, through Python."""


def _say_what_norms_write(graph: fx.GraphModule) -> None:
    """Replace normalisations by operations whose signature says that running statistics are written."""
    aten = torch.ops.aten
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is aten.native_batch_norm.default and node.args[3] is not None:
            node.target = aten._native_batch_norm_legit.default
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
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _realized(graph: fx.Graph, wanted: dict[fx.Node, list[fx.Node]], at: fx.Node) -> None:
    """Compute scalars before a node, into one tensor, from which their users read them."""
    aten = torch.ops.aten

    def called(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda each: each.meta["val"]))
        return node

    with graph.inserting_before(at):
        joined = called(aten.cat.default, [called(aten.unsqueeze.default, node, 0) for node in wanted])
        held = called(torch.ops._inductor_test.realize.default, joined)
        for i, (node, users) in enumerate(wanted.items()):
            number = called(aten.select.int, held, 0, i)
            for user in users:
                user.replace_input_with(node, number)


@contextmanager
def _writes_before_reads() -> Iterator[None]:
    """Keep torch's scheduler aware of reads that come after an in-place write, also after it has changed the loops of the reader.

    It loses such a dependency when it makes the ranges of two loops equal, and may then fuse the reader with operations before
    the write: a dropout mask is used before it is drawn (torch 2.9 to 2.13).
    """
    from torch._inductor.scheduler import SchedulerNode

    forgets = SchedulerNode.recompute_size_and_body

    def recompute(self: Any, *args: Any, **kwargs: Any) -> None:
        forgets(self, *args, **kwargs)
        self.set_read_writes(self.read_writes.rename(self.mutation_renames))

    SchedulerNode.recompute_size_and_body = recompute  # an assignment, since torch has no setting for it
    try:
        yield
    finally:
        SchedulerNode.recompute_size_and_body = forgets


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
