"""A kernel that runs as graphs: each graph is made when a batch of its shape first occurs."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor

from fnlight.compile.bound import Bound, described
from fnlight.compile.program import Program
from fnlight.compile.shadow import UnsettledError, UntraceableError, WantedError, held
from fnlight.compile.trace import Call, Traced, trace
from fnlight.errors import CompileWarning, ConfigError, warn
from fnlight.state import Progress, Store
from fnlight.tensors import leaves

Kernel = Callable[[Store, Any, int], Mapping[str, Any]]

LEVELS = {"trace": ("trace",), "step": ("step", "trace"), "graph": ("graph", "trace")}
"""The levels that are tried in order, by the requested level."""

_MOST = 16  # graphs of one step: a step that needs more changes something all the time
_FOR_COMPILERS = {"fused": False, "foreach": False, "capturable": True}
_ABSENT: Any = object()


@attrs.define(eq=False, repr=False)
class Graph:
    """A kernel ``(store, batches, key) -> metrics`` that runs as one graph if it can be traced, else as the eager kernel.

    Args:
        kernel: The eager kernel.
        level: The highest level to try.
        cache_dir: Directory of compiled code.

    Example:
        >>> Graph(lambda store, batches, key: {}, "trace").level
        'trace'
    """

    kernel: Kernel
    level: str
    cache_dir: str | None = None
    _reads: list[str] = attrs.field(factory=list, init=False, repr=False)
    _settled: set[str] = attrs.field(factory=set, init=False, repr=False)  # trees that an eager step has initialized
    _signs: dict[Any, int] = attrs.field(factory=dict, init=False, repr=False)
    _programs: dict[Any, Program | None] = attrs.field(factory=dict, init=False, repr=False)
    _bound: Bound | None = attrs.field(default=None, init=False, repr=False)  # the store of the last call
    _said: set[str] = attrs.field(factory=set, init=False, repr=False)

    def __call__(self, store: Store, batches: Any, key: int) -> Mapping[str, Any]:
        """Make one update, with a graph or without."""
        found = self.take(store, (batches,), (key,))
        return self.eager(store, batches, key) if found is None else found

    def eager(self, store: Store, batches: Any, key: int) -> Mapping[str, Any]:
        """Make one update without a graph."""
        self._bound = None  # an optimizer may replace its tensors
        return self.kernel(store, batches, key)

    def take(
        self, store: Store, updates: Sequence[Any], keys: Sequence[int], rates: Any = None, ahead: Sequence[Progress] = ()
    ) -> Mapping[str, Any] | None:
        """Make one or more updates with one graph.

        Args:
            store: The live store.
            updates: By update, the batches of a group.
            keys: By update, its key.
            rates: By update, the learning rate of each group; None takes that of the groups.
            ahead: By update, the progress before it; empty takes that of the store.

        Returns:
            The merged metrics; None, and nothing is done, if there is no graph for these updates.
        """
        bound = self._bound
        if bound is None or bound.store is not store or store.version - bound.version not in (0, 2):
            try:
                bound = self._bound = Bound(store, self._reads, store.version, self._signs)
            except UntraceableError as error:
                return self._never(error)
        bound.version = store.version
        if rates is None:
            rates = ([group.get("lr") for group in bound.groups],)
        tensors = list[Tensor]()
        sign = bound.sign(), described(updates, tensors)
        program = self._programs.get(sign, _ABSENT)
        if program is _ABSENT:
            program = self._new(sign, store, updates, rates)
            bound = self._bound
        if program is None or bound is None or not all(holds(store) for holds in program.conditions):
            return None
        return program(bound, keys, rates, batches=tensors, ahead=ahead)

    def _never(self, error: UntraceableError) -> None:
        self._warn(f"no graph at level {self.level!r}: {error}; continuing without a graph")

    def _new(self, sign: Any, store: Store, updates: Sequence[Any], rates: Sequence[Sequence[Any]]) -> Program | None:
        if len(self._programs) >= _MOST:
            if not any("graphs were made" in text for text in self._said):
                self._warn(f"{_MOST} graphs were made, and this batch matches none of them: {sign[-1]}; such batches run without a graph")
            return None
        try:
            program = self._made(store, updates, rates)
        except UnsettledError:
            return None  # this step creates optimizer state or the memory of a combinator
        if self._bound is not None and self._bound.reads != self._reads:
            self._bound = Bound(store, self._reads[:], store.version, self._signs)
            sign = self._bound.sign(), sign[-1]
        self._programs[sign] = program
        return program

    def _made(self, store: Store, updates: Sequence[Any], rates: Sequence[Sequence[Any]]) -> Program | None:
        check_device(self.level, store)
        for level in LEVELS[self.level]:
            lowers = level != "trace"
            began = time.perf_counter()
            try:
                _check_store(store)
                takes = [[isinstance(lr, float | int) for lr in each] for each in rates]
                program = Program(self._traced(store, updates, takes, lowers), takes, lowers)
                if lowers:
                    tensors = [leaf for _, leaf in leaves(updates) if isinstance(leaf, Tensor)]
                    inputs = program.inputs(Bound(store, self._reads, 0, {}), rates, tensors)
                    if level == "step":
                        program.compile(inputs, self.cache_dir)
                    else:
                        program.capture(inputs, len(tensors))
            except UnsettledError:
                raise
            except UntraceableError as error:
                below = "without a graph" if level == "trace" else "at level 'trace'"
                self._warn(f"no graph at level {level!r}: {error}; continuing {below}")
            else:
                logging.getLogger("fnlight").info("compile(%r): %d updates in %.1f s", level, len(updates), time.perf_counter() - began)
                return program
        return None

    def _traced(self, store: Store, updates: Sequence[Any], takes: Any, lowers: bool) -> Traced:
        """Trace until all trees and numbers that the kernel reads are known."""
        reads, numbers, options = list(self._reads), 0, _FOR_COMPILERS if lowers else {}
        while True:
            try:
                found = trace(
                    Call(
                        kernel=self.kernel,
                        store=store,
                        reads=reads,
                        held=held(store, reads),
                        rates=takes,
                        updates=updates,
                        options=options,
                        numbers=numbers,
                    ),
                    lowers,
                )
            except WantedError as wanted:
                if not wanted.args:
                    numbers += 1
                else:
                    reads += wanted.args
                    self._check_settled(store, wanted.args[0])
            else:
                self._reads = reads
                return found

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warn(f"compile: {text}", CompileWarning)

    def _check_settled(self, store: Store, name: str) -> None:
        """Let an eager step first create memory that does not exist yet."""
        if name not in store.memory:
            raise UntraceableError(f"the state has no memory called {name!r}")
        if name not in self._settled and any(leaf is None for _, leaf in leaves(store.memory[name])):
            self._settled.add(name)
            raise UnsettledError(f"{name} creates its memory in this step")


def check_device(level: str, store: Store) -> None:
    """Raise if the device does not support a level.

    Args:
        level: The level.
        store: The store, whose device is checked.

    Raises:
        ConfigError: If CUDA graphs are requested on another device.

    Example:
        >>> from torch import nn
        >>> from fnlight.optim import Optim
        >>> check_device("trace", Store(nn.Linear(1, 1), Optim(None), {}))
    """
    if level == "graph" and store.device.type != "cuda":
        raise ConfigError(
            f"compile('graph') captures a CUDA graph, but this training is on the device {store.device}; use 'step' or 'trace', "
            "or create the state with device='cuda'"
        )


def _check_store(store: Store) -> None:
    if store.place is not None:
        raise UntraceableError("several processes train together, and a graph holds no communication")
    if store.phases:
        raise UntraceableError("the step has several optimizers")
    if store.optim.offload:
        raise UntraceableError("the optimizer runs on the host")
    keys = sorted({course.key for course in store.optim.courses} - {"lr"})
    if keys:
        raise UntraceableError(f"a schedule changes {', '.join(keys)}, which would be a constant in a graph")
