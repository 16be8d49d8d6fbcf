"""Trace everything that a kernel does to tensors into one graph: forward, backward, gradient transforms, optimizer, averages.

The kernel runs on fake tensors, and every operation is recorded. Decisions that Python makes meanwhile become constants, so a
kernel is traced twice, and one that does not give the same graph both times is refused.
"""

import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from types import FunctionType
from typing import Any

import attrs
import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect

from fnlight.compile._private_torch import Operation, compiling, fake_mode, make_graph, without_addresses
from fnlight.compile.recorder import Duties, Recorder
from fnlight.compile.shadow import UnsettledError, UntraceableError, WantedError, changes, shadow, swapped
from fnlight.compile.traceable_optimizers import twin_of
from fnlight.data import num_samples
from fnlight.metrics import Cat, Last, Max, Mean, Min, Sum, join_all
from fnlight.state import Store
from fnlight.tensors import NOISE, buffers_of, fold_in, leaves, map_tensors, seed_generators

Kernel = Callable[[Store, Any, int], Mapping[str, Any]]
"""``(store, batches, key) -> metrics``"""

_KEY = fold_in(0, 0)  # the key of a kernel while it is traced
_PARTS = (*range(4096), NOISE)  # what a kernel may fold into its key

_MONOIDS = (Mean, Sum, Max, Min, Last, Cat)
_TORCH = os.path.dirname(torch.__file__)
_PYTHON = re.compile(rf"{re.escape(os.path.dirname(os.__file__))}/(?!(site|dist)-packages)")  # modules of the standard library
_ALIASES = {
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.detach_copy.default,
    torch.ops.aten.alias_copy.default,
}


def reseed(keys: Sequence[int], update: int, parts: Sequence[int], device: torch.device) -> None:
    """Seed the generators within a graph, as the kernel does before a micro-batch.

    Args:
        keys: One per update of the call.
        update: The index of the update within the call.
        parts: What the kernel folds into its key, such as the number of a micro-batch.
        device: The device of the store.

    Example:
        >>> from fnlight.tensors import isolated
        >>> with isolated():
        ...     reseed([1], 0, [0], torch.device("cpu"))
    """
    seed_generators(fold_in(keys[update], *parts), device)


@attrs.frozen(eq=False, repr=False)
class Traced:
    """A graph with everything that is needed to call it.

    Args:
        graph: Takes the tensors of the store, learning rates, numbers of stages, the tensors of the batches and, last, the keys; gives tensors.
        metrics: Names to values, in which indices into the graph's results replace tensors.
        duties: By update, what the host has to do before and after it.
        draws: Whether it draws random numbers.

    Example:
        >>> Traced(fx.symbolic_trace(lambda x: [x]), {"n": 3}).results([])
        {'n': 3}
    """

    graph: fx.GraphModule
    metrics: dict[str, Any]
    duties: Sequence[Duties] = ()
    draws: bool = True
    _makers: list[tuple[str, Callable[[Sequence[Tensor]], Any]]] = attrs.field(
        init=False, default=attrs.Factory(lambda self: [(name, _maker(value)) for name, value in self.metrics.items()], takes_self=True)
    )

    def results(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The merged metrics of all updates of the call, from the graph's results."""
        return {name: make(tensors) for name, make in self._makers}


@attrs.frozen(eq=False, repr=False)
class _Place:
    """The index of a result of the graph."""

    number: int


def _maker(value: Any) -> Callable[[Sequence[Tensor]], Any]:
    """A function that makes a metric from the results of a graph."""
    kind = value.__class__
    if kind is _Place:
        return itemgetter(value.number)
    if kind is tuple:
        parts = [_maker(part) for part in value]
        return lambda tensors: tuple([part(tensors) for part in parts])
    if kind in _MONOIDS:
        fields = [_maker(getattr(value, field.name)) for field in attrs.fields(kind)]
        return lambda tensors: kind(*[field(tensors) for field in fields])
    return lambda tensors: value


@attrs.frozen(eq=False, repr=False)
class Call:
    """The updates of one call, to be traced.

    Args:
        kernel: The kernel.
        store: The live store; it is not changed.
        reads: Names of the trees in the memory that the kernel uses.
        held: Its tensors, as `shadow.held` gives them.
        rates: By update, one per group: whether the learning rate is an input of the graph.
        updates: By update, the batches of a group.
        options: Options that are set in the optimizer's groups.
        numbers: How many numbers the stages of one update ask for.

    Example:
        >>> from fnlight.optim import Optim
        >>> Call(lambda store, batches, key: {}, Store(torch.nn.Linear(1, 1), Optim(None), {}), (), [], [[]], [()], {}).updates
        [()]
    """

    kernel: Kernel
    store: Store
    reads: Sequence[str]
    held: Sequence[Tensor]
    rates: Sequence[Sequence[bool]]
    updates: Sequence[Any]
    options: Mapping[str, Any]
    numbers: int = 0


def trace(call: Call, lowers: bool) -> Traced:
    """Trace the updates of one call into one graph.

    Args:
        call: The updates.
        lowers: Whether the graph is for a compiler: then optimizers use forms that compilers can compile, and nothing is reseeded within it.

    Returns:
        The graph, and how its results become metrics.

    Raises:
        UntraceableError: If the graph is not the same each time, or the kernel changes something that a graph would not change again.
        WantedError: If a stage asks for a tree of the memory that is not in `reads`, or for one more number.

    Example:
        >>> from fnlight.compile.shadow import held
        >>> from fnlight.optim import Optim
        >>> store = Store(torch.nn.Linear(2, 1, bias=False), Optim(None), {})
        >>> kernel = lambda store, batches, key: {"sum": store.module(batches[0]).sum()}
        >>> traced = trace(Call(kernel, store, (), held(store, ()), [[]], [(torch.ones(3, 2),)], {}), lowers=False)
        >>> [node.name for node in traced.graph.graph.nodes if node.op == "call_function"]
        ['t', 'mm', 'sum_1']
    """
    one, two = _trace(call, lowers), _trace(call, lowers)
    for a, b in zip(_lines(one.graph), _lines(two.graph), strict=False):
        if a != b:
            raise UntraceableError(
                f"two traces of the step differ: {a!r:.150} and {b!r:.150}; it uses a random or changing number of Python, NumPy or a clock"
            )
    for (name, a), (_, b) in zip(_constants(one.graph), _constants(two.graph), strict=True):
        if not torch.equal(a, b):
            raise UntraceableError(f"the step makes the tensor {name} of shape {list(a.shape)} from different numbers each time")
    return one


def _lines(graph: fx.GraphModule) -> list[str]:
    return graph.code.splitlines()


def _constants(graph: fx.GraphModule) -> list[tuple[str, Tensor]]:
    return [(node.target, getattr(graph, node.target)) for node in graph.graph.nodes if node.op == "get_attr"]


def _trace(call: Call, lowers: bool) -> Traced:
    metrics: dict[str, Any] = {}
    hosts: list[Recorder] = []
    flat = [leaf for batches in call.updates for _, leaf in leaves(batches) if isinstance(leaf, Tensor)]
    scalars = sum(sum(rates) for rates in call.rates) + call.numbers * len(call.updates)
    device = call.store.device if call.store.device.type == "cuda" and lowers else None
    given = [*call.held, *(torch.zeros((), dtype=torch.float64, device=device) for _ in range(scalars)), *flat]
    twins = _twins(given)
    has_side_effect(reseed)

    def fn(*tensors: Tensor) -> list[Tensor]:
        out: list[Tensor] = []
        hosts.clear()
        samples = [sum(map(num_samples, batches)) for batches in call.updates]
        for name, value in join_all(_run(call, list(tensors), hosts, lowers), samples).items():
            metrics[name] = _placed(value, out)
        return out

    with compiling(lowers), _explained():
        graph = make_graph(fn, twins, tracing_mode="fake")
    if any("mkldnn_rnn_layer_backward" in str(node.target) for node in graph.graph.nodes):
        raise UntraceableError(
            "a recurrent layer on the CPU keeps a workspace from its forward to its backward pass, which a graph cannot hold"
        )
    draws = any(_draws(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return Traced(_finished(graph, draws and not lowers), metrics, [host.duties for host in hosts], draws)


def _twins(given: Sequence[Tensor]) -> list[Tensor]:
    """Fake tensors with the same shapes, strides and dtypes, not derived from the real ones.

    A fake tensor that torch derives from a real one keeps references that outlive the graph; these have crashed the interpreter in a later
    garbage collection.
    """

    def twin(t: Tensor) -> Tensor:
        if type(t) not in (Tensor, torch.nn.Parameter) or t.layout != torch.strided or t.is_quantized or t.is_conj() or t.is_neg():
            return t.detach().requires_grad_(t.requires_grad)
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device, requires_grad=t.requires_grad)

    with without_addresses():  # raise instead of returning an invalid address
        fake = fake_mode(allow_fallback_kernels=True)
    with fake:
        return [twin(t) for t in given]


def _draws(target: Any) -> bool:
    """Whether an operation draws random numbers; an operation that is not torch's own is assumed to."""
    if not isinstance(target, Operation):
        return False
    return torch.Tag.nondeterministic_seeded in target.tags or target.namespace not in ("aten", "prims")


def _run(call: Call, tensors: list[Tensor], hosts: list[Recorder], lowers: bool) -> list[Mapping[str, Any]]:
    """The traced function: every update of the call, on fake tensors."""
    num = len(call.held)
    new = {id(old): tensor for old, tensor in zip(call.held, tensors, strict=False)}
    rest = iter(tensors[num:])
    rates = [[next(rest) if takes else None for takes in each] for each in call.rates]
    hosts += [Recorder(call.store, [next(rest) for _ in range(call.numbers)], lowers) for _ in call.updates]
    updates = [map_tensors(lambda _: next(rest), batches) for batches in call.updates]
    found: list[Mapping[str, Any]] = []
    with swapped(call.store.module, new):
        for number, (batches, lrs) in enumerate(zip(updates, rates, strict=True)):
            found.append(_update(call, new, _given(call, lrs), batches=batches, number=number, host=hosts[number]))
    return found


def _given(call: Call, rates: Sequence[Any]) -> list[Any]:
    """Learning rates as the optimizer needs them: tensors if its kernel takes tensors, else symbolic numbers, which remain inputs."""
    optimizer = call.store.optim.optimizer
    takes = [bool(call.options) or group.get("fused") for group in optimizer.param_groups] if optimizer is not None else []
    return [rate if rate is None or tensor else rate.item() for rate, tensor in zip(rates, takes, strict=True)]


def _update(call: Call, new: Mapping[int, Tensor], lrs: Sequence[Any], batches: Any, number: int, host: Any) -> Mapping[str, Any]:
    before, after = (shadow(call.store, call.reads, new, rates=lrs, options=call.options) for _ in range(2))
    after.seeder, after.host = _seeding(number, call.store.device), host
    twin = twin_of(after.optim.optimizer) if call.options else None
    if twin is not None:
        after.optim.optimizer.step = partial(twin, after.optim.optimizer)
    tables = [buffers_of(m) for m in call.store.module.modules()]
    were = [dict(table) for table in tables]
    counts = _exact_counts(after.optim.optimizer) if call.options else []
    try:
        metrics = call.kernel(after, batches, _KEY)
        _put_back(counts)
        moved = changes(before, after, list(zip(were, tables, strict=True)))
    finally:
        for p in after.params:
            p.grad = None
    with torch.no_grad():
        for old, now in moved:
            old.copy_(now)
    for table, were_ in zip(tables, were, strict=True):
        table.update(were_)
    return metrics


def _exact_counts(optimizer: Any) -> list[tuple[dict[str, Any], Tensor]]:
    """Count steps in float64, as Python does in an eager step: in float32, what optimizers compute from the counts loses digits."""
    found: list[tuple[dict[str, Any], Tensor]] = []
    for slots in optimizer.state.values() if optimizer is not None else ():
        step = slots.get("step")
        if isinstance(step, Tensor) and not step.dim() and step.dtype == torch.float32:
            slots["step"] = step.double()
            found.append((slots, step))
    return found


@torch.no_grad()
def _put_back(counts: list[tuple[dict[str, Any], Tensor]]) -> None:
    for slots, step in counts:
        step.copy_(slots["step"])
        slots["step"] = step


def _seeding(update: int, device: torch.device) -> Callable[[int], None]:
    """The seeding function of a traced kernel: it records that the graph seeds the generators with the key of each call."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    folded = {fold_in(_KEY, part): (part,) for part in _PARTS} | {_KEY: ()}

    def seed(key: int) -> None:
        if key not in folded:
            raise UntraceableError("the step seeds the generators with something else than its key and the number of a micro-batch")
        mode = get_proxy_mode()
        if mode is not None:
            mode.tracer.create_proxy("call_function", reseed, (0, update, folded[key], device), {})

    return seed


def _placed(value: Any, out: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        out.append(value.detach())
        return _Place(len(out) - 1)
    if value.__class__ in _MONOIDS:
        return value.__class__(*(_placed(getattr(value, field.name), out) for field in attrs.fields(value.__class__)))
    if value.__class__ is tuple:
        return tuple(_placed(part, out) for part in value)
    if value is None or isinstance(value, int | float) or _holds_nothing(value):
        return value
    raise UntraceableError(
        f"a metric is or contains a {type(value).__name__}; a graph can return scalars, Mean, Sum, Max, Min, Last, and Cat with a function "
        "that has no closure and no defaults"
    )


def _holds_nothing(fn: Any) -> bool:
    """Whether a value is a function without closure or defaults, which is the same in every step."""
    return isinstance(fn, FunctionType) and not (fn.__closure__ or fn.__defaults__ or fn.__kwdefaults__)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn an error during tracing into an `UntraceableError` with the line of the caller's code and the reason."""
    try:
        yield
    except (UntraceableError, WantedError):
        raise
    except Exception as error:
        ours = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if not _PYTHON.match(f.filename) and not f.filename.startswith((_TORCH, "<"))
        ]
        where = f"{ours[-1].filename}:{ours[-1].lineno} ({ours[-1].line})" if ours else "the model"
        text = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if type(error).__name__ == "GuardOnDataDependentSymNode" or "get value out of a tracing tensor" in text:
            text = "Python code depends on the value of a tensor"
        raise UntraceableError(f"{where}: {text}") from error


def _finished(graph: fx.GraphModule, seeds: bool) -> fx.GraphModule:
    """Remove operations without effect and, if the graph seeds, add the keys as the last input."""
    nodes = graph.graph
    last = [node for node in nodes.nodes if node.op == "placeholder"][-1]
    with nodes.inserting_after(last):
        keys = nodes.placeholder("keys")
    for node in list(nodes.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ALIASES:
            node.replace_all_uses_with(node.args[0])
            nodes.erase_node(node)
        elif node.target is reseed and seeds:
            node.args = (keys, *node.args[1:])
        elif node.target is reseed:
            nodes.erase_node(node)
    if not seeds:
        nodes.erase_node(keys)
    graph.recompile()
    return graph


__all__ = ["Call", "Kernel", "Traced", "UnsettledError", "UntraceableError", "reseed", "trace"]
