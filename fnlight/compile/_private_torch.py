"""Every private name of torch's compiler that fnlight uses; all other private names of torch are in ``fnlight/tensors/_private_torch.py``.

It is a file of its own because the compiler takes a second to load: every function looks up what it needs when it is called. If a name is
missing, it raises `UntraceableError`, and the step is taken at the next lower level, with one warning. Tests compare each name with torch
(tests/compile/test_private_torch.py); torch 2.9.0 and 2.13.0 have all of them.
"""

import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, fx

from fnlight.compile.shadow import UntraceableError

Operation: Any = type(torch.ops.aten.detach.default)
"""The class of what a graph calls; its name is private, its objects are not."""


def find(path: str) -> Any:
    """A private name of torch, such as ``"torch._inductor.ir:TensorBox.create"``; the module is imported."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        raise UntraceableError(
            f"torch {torch.__version__} has no {path.replace(':', '.')}, which compiled steps of fnlight need"
        ) from error


# Tracing


def make_graph(fn: Callable[..., Any], inputs: Sequence[Tensor], **options: Any) -> fx.GraphModule:
    """The operations that a function calls, by ``make_fx``; constants that are no stand-ins, such as a tensor of the user's, are allowed."""
    return find("torch.fx.experimental.proxy_tensor:make_fx")(fn, _allow_non_fake_inputs=True, **options)(*inputs)


def fake_mode(**options: Any) -> Any:
    """A mode in which tensors have shapes but no values; ``tracing_mode="fake"`` is the public way, but keeps the tensors that it is given."""
    shapes = find("torch.fx.experimental.symbolic_shapes:ShapeEnv")()
    make = find("torch._subclasses.fake_tensor:FakeTensorMode")
    return make(allow_non_fake_inputs=True, shape_env=shapes, static_shapes=True, **options)


def without_addresses() -> Any:
    """A context in which a stand-in raises an error if it is asked for the address of its values."""
    return find("torch._functorch:config").patch(fake_tensor_allow_unsafe_data_ptr_access=False)


@contextmanager
def compiling(flag: bool) -> Iterator[None]:
    """Tell torch's optimizers that they are traced for a compiler, so that their capturable form runs on every device."""
    given: Any = torch.compiler
    before = find("torch.compiler:_is_compiling_flag")
    given._is_compiling_flag = flag
    try:
        yield
    finally:
        given._is_compiling_flag = before


def writes(operation: Any) -> bool:
    """Whether an operation changes one of its inputs."""
    return operation._schema.is_mutable


# Operations without a public name


def realized() -> Any:
    """The operation that lets torch's compiler store a value, and not compute it again in each loop that reads it."""
    return find("torch:ops._inductor_test.realize.default")


def writing_norm() -> Any:
    """BatchNorm whose signature says that it writes running statistics."""
    return find("torch:ops.aten._native_batch_norm_legit.default")


def linear() -> Any:
    """A matrix product by oneDNN."""
    return find("torch:ops.mkldnn._linear_pointwise.default")


# The compiler


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's own, and those of operations on lists that its compiler would call one by one, through Python."""
    own = {find("torch:ops.aten._foreach_norm.Scalar"): _norms, find("torch:ops.aten._foreach_lerp.List"): _towards}
    return {**find("torch._inductor.decomposition:select_decomp_table")(), **own}


def _norms(tensors: Sequence[Tensor], ord: float = 2.0, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.linalg.vector_norm(tensor, ord, dtype=dtype) for tensor in tensors]


def _towards(tensors: Sequence[Tensor], ends: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    return [torch.lerp(tensor, end, weight) for tensor, end, weight in zip(tensors, ends, weights, strict=True)]


def with_settings(settings: Mapping[str, Any]) -> Any:
    """A context in which torch's compiler has other settings."""
    return find("torch._inductor:config").patch(settings)


def compile_graph(graph: fx.GraphModule, inputs: Sequence[Tensor], fake: Any, on_cpu: bool) -> Any:
    """Compile a graph to machine code; ``torch.compile`` is the public way, but calls a graph through a dozen Python functions."""
    compile_fx_inner = find("torch._inductor.compile_fx:compile_fx_inner")
    context = find("torch._guards:TracingContext")(fake)
    failed = find("torch._inductor.exc:InductorError")
    try:
        with find("torch._guards:tracing")(context), _writes_before_reads():
            made = compile_fx_inner(graph, inputs, cpp_wrapper=on_cpu)
    except failed as error:
        raise UntraceableError(f"torch's compiler fails with {str(error).splitlines()[0]}") from error
    return getattr(made, "current_callable", made)  # without the wrapper that only profilers need


@contextmanager
def _writes_before_reads() -> Iterator[None]:
    """Keep torch's scheduler aware of reads that come after an in-place write, also after it has changed the loops of the reader.

    It loses such a dependency when it makes the ranges of two loops equal, and may then fuse the reader with operations before
    the write: a dropout mask is used before it is drawn (torch 2.9 to 2.13).
    """
    node: Any = find("torch._inductor.scheduler:SchedulerNode")
    forgets = node.recompute_size_and_body

    def recompute(self: Any, *args: Any, **kwargs: Any) -> None:
        forgets(self, *args, **kwargs)
        self.set_read_writes(self.read_writes.rename(self.mutation_renames))

    node.recompute_size_and_body = recompute  # an assignment, since torch has no setting for it
    try:
        yield
    finally:
        node.recompute_size_and_body = forgets


@contextmanager
def with_onednn() -> Iterator[None]:
    """Make torch's compiler accept oneDNN products also if no factor is a constant; by default it does so in inference only."""
    make, product = find("torch._inductor.ir:TensorBox.create"), find("torch._inductor.mkldnn_ir:LinearUnary.create")
    lowerings = find("torch._inductor.lowering:lowerings")
    import_module("torch._inductor.mkldnn_lowerings")  # torch's own way, which would come later otherwise
    before = lowerings[linear()]
    lowerings[linear()] = lambda *args: make(product(*args))
    try:
        yield
    finally:
        lowerings[linear()] = before


_AROUND = {"torch", "_C", "_aoti", "isinstance", "Tensor", "tensor", "clear"}
_HANDLES = ("unsafe_alloc_void_ptrs_from_tensors", "alloc_tensors_by_stealing_from_void_ptrs")


def direct(call: Any) -> Any:
    """Call machine code without the check of each input that torch wraps around it (1/40 of a small update); other wrappers are kept."""
    code = getattr(call, "__code__", None)
    if code is None or code.co_freevars != ("f",) or not {*_HANDLES} < {*code.co_names} <= {*_AROUND, *_HANDLES}:
        return call
    entry, (give, take) = call.__closure__[0].cell_contents, (find(f"torch:_C._aoti.{name}") for name in _HANDLES)

    def called(inputs: list[Tensor]) -> Sequence[Tensor]:
        handles = give(inputs)
        inputs.clear()  # the code lets go of each as soon as it can
        return take(entry(handles))

    return called


# Models compiled by ``torch.compile``


def compiled_call(model: Any) -> Any:
    """The call of a model, hooks included, compiled; ``model.compile()`` is the public way, which cannot be undone."""
    return torch.compile(model._call_impl)


def set_compiled_call(model: Any, call: Any) -> None:
    """Let a model call what `compiled_call` gave, or None: what it is itself."""
    model._compiled_call_impl = call
