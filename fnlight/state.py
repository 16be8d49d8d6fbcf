"""The state: an immutable value that holds everything a run needs to go on, and the arena that its tensors live in.

A `TrainState` is where the training of a `Task` stands; its `Store` holds the tensors. In PyTorch the fast way to train is in place, so a
step *donates* its input: it updates the store, bumps the version and returns a new state on it. A state whose version is past raises
`DonatedStateError` when its tensors are read.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fnlight.device import end_step_on, existing, move
from fnlight.errors import DonatedStateError, OptimizerError, ParallelError, check_type, described
from fnlight.history import History, Record
from fnlight.host import Host
from fnlight.metrics import Tally
from fnlight.optim import Optim, choose_fused, named_state, prepare, prepare_each, reported, to_device, weights_to_use
from fnlight.rng import SKIPPED, TRAIN, fold_in, isolated, seed_generators
from fnlight.task import Task, copied, empty
from fnlight.times import Times
from fnlight.tree import map_nodes

A_STATE = "a TrainState, such as fl.TrainState.create(task) or fl.load(path, task) gives"
"""What the errors of those that take one say."""


@attrs.frozen
class Progress:
    """Counts of completed work.

    Args:
        step: Completed optimizer updates.
        epoch: Completed epochs.
        batch: Batches done in the epoch that is under way; 0 between epochs.
        samples: Samples seen.
        seconds: Time spent, in seconds; it does not count in comparisons.
        epoch_samples: Samples of the epoch that is under way that are done; 0 where an old checkpoint does not say.
        skipped: Groups of batches that were consumed without an update, such as those whose scaled gradients overflowed.
        updates: Where a task has several optimizers: the completed updates of each, by name.

    Example:
        >>> Progress(step=3).step
        3
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    samples: int = 0
    seconds: float = attrs.field(default=0.0, eq=False)
    epoch_samples: int = 0
    skipped: int = 0
    updates: Mapping[str, int] = attrs.field(factory=dict, hash=False)

    def after(self, item: Any, made: int, skipped: int, updates: Mapping[str, int]) -> "Progress":
        """The progress once an `Item` is consumed by so many updates; those that were skipped count as no steps."""
        batch, seconds = (0 if item.last else item.batch), self.seconds + item.seconds
        known = self.epoch_samples or not self.batch  # an old checkpoint does not say
        done = self.epoch_samples + item.samples if known and not item.last else 0
        step, skipped, samples = self.step + made, self.skipped + skipped, self.samples + item.samples
        return Progress(step, item.epoch + item.last, batch, samples, seconds, done, skipped, updates)


class Store:
    """The arena: one live module, its optimizer, and the named trees that combinators own. Changed in place by steps.

    Where a task has several optimizers, `phases` holds a store for each, of the same module: its `optim` is the optimizer, its `params` and
    `named` are the parameters that this one holds, and its `memory` is that of the phase's own combinators.

    Args:
        module: The live module; nobody else holds it.
        optim: Its prepared optimizer, or a mapping of names to several.
        memory: Names of combinators to trees of dicts, lists, tensors, numbers and strings, or a `Tally`.
        place: How the tensors lie on several processes, see `fnlight.parallel`; None where this process is alone.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> Store(model, Optim(None), {}).copy().module is model
        False
    """

    __slots__ = (
        "back", "bound", "device", "end_step", "host", "media", "memory", "module", "named", "optim", "owner", "params", "phases", "place",
        "position", "progress", "resources", "scale", "seed", "skipped", "spent", "times", "until", "version",
    )  # fmt: skip

    def __init__(self, module: nn.Module, optim: Optim | Mapping[str, Optim], memory: dict[str, Any], place: Any = None) -> None:
        self.module, self.memory, self.place = module, memory, place
        self.optim = Optim(None) if isinstance(optim, Mapping) else optim
        self.bound: Any = None  # what the placement keeps for this very module, such as hooks; neither copied nor saved
        self.version = 0
        self.back = -1  # the version of the state that went back to an earlier one, for those that look at it on the same tick
        self.owner: Any = None  # the pipe whose combinators have their memory here
        self.position: Callable[[], Any] | None = None  # gives the place in the data, until the next step
        self.skipped = False  # whether the last step left out its update, and the host knows
        self.spent: Any = None  # on the CPU, gradients until the next step: freed before, their pages would go back to the system
        self.progress = Progress()  # what was completed before the step that is under way
        self.until: int | None = None  # the completed steps at which the run that is under way ends at the latest, if that is known
        self.scale: Tensor | None = None  # what a loss is multiplied by before it goes backward
        self.resources: dict[str, Any] = {}  # what a run holds open, by name; each has a close(error), and none is copied or saved
        self.times = Times()  # where the time of the training went
        self.media: dict[str, Any] | None = None  # pictures and texts of an evaluation, for the sinks of the same tick
        self.named = dict(module.named_parameters())
        self.params = [p for p in self.named.values() if p.requires_grad]
        first = next((t for t in (*module.parameters(), *module.buffers())), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.end_step = end_step_on(self.device)
        # what a kernel seeds the generators with; a trace puts its own here
        self.seed: Callable[[int], None] = partial(seed_generators, device=self.device)
        self.host = Host()  # what Python has to say and to look at around a kernel; a trace puts its own here
        self.phases = {name: self._phase(each) for name, each in optim.items()} if isinstance(optim, Mapping) else {}

    def _phase(self, optim: Optim) -> "Store":
        held = {id(p) for group in optim.optimizer.param_groups for p in group["params"]}
        phase = Store(self.module, optim, {}, self.place)
        phase.named = {name: p for name, p in self.named.items() if id(p) in held}
        phase.params = [p for p in phase.named.values() if p.requires_grad]
        return phase

    @property
    def optims(self) -> dict[str, Optim]:
        """The optimizers by name; a single one has the name ``""``."""
        return {name: phase.optim for name, phase in self.phases.items()} or {"": self.optim}

    def reported(self) -> dict[str, float]:
        """The learning rates, and what else is scheduled, as a log shows them."""
        return {key: value for name, optim in self.optims.items() for key, value in reported(optim, name).items()}

    @contextmanager
    def training(self, name: str) -> "Iterator[Store]":
        """The store of one phase, while no other parameter requires a gradient."""
        phase = self.phases[name]
        phase.version = self.version
        held = {id(p) for p in phase.params}
        others = [p for p in self.params if id(p) not in held]
        for p in others:
            p.requires_grad = False
        try:
            yield phase
        finally:
            for p in others:
                p.requires_grad = True
            for p in phase.params:
                p.grad = None

    def settle(self) -> None:
        """Bring to rest what waits to be read: pending metrics, the place of a loader that keeps its own, and parts that came together."""
        if self.place is not None:
            self.place.rest(self.module)
        for tree in self.memory.values():
            if isinstance(tree, Tally):
                tree.settle()
        if self.position is not None:
            self.memory["loader"], self.position = copy.deepcopy(self.position()), None

    def complete(self, key: str, init: Callable[["Store"], Any]) -> None:
        """Let memory that is kept by parameters' names follow a model that has more of them than the one that was saved."""
        tree = self.memory[key]
        if isinstance(tree, dict) and tree and tree.keys() < self.named.keys():
            self.memory[key] = {**init(self), **tree}

    def copy(self) -> "Store":
        """An independent store with the same values; the optimizer follows the copied parameters."""
        self.settle()
        memo: dict[int, Any] = {}
        module = copied(self.module, memo) if self.place is None else self.place.copy(self.module, memo)
        twin = Store(module, copy.deepcopy(self.optims if self.phases else self.optim, memo), copy.deepcopy(self.memory, memo), self.place)
        twin.times = self.times.copy()
        twin.end_step()  # on a lazy device a copy shares memory until then, and a step would take it away
        return twin


@attrs.frozen(eq=False, repr=False)
class TrainState:
    """Where a training stands: an immutable value.

    Args:
        task: The model class and the pure functions; never serialised.
        progress: Counts of completed work.
        seed: The one source of randomness.
        history: Every evaluation so far, oldest first.
        stopped: Why the last run ended; None while a run goes on.
        store: The tensors.
        version: The version of the store that this state may read.

    Example:
        >>> task = Task(nn.Linear(2, 1), lambda model, batch: model(batch).sum(),
        ...             configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        >>> state = TrainState.create(task, seed=0)
        >>> sorted(state.params), state.progress.step
        (['bias', 'weight'], 0)
    """

    task: Task
    progress: Progress
    seed: int
    history: History
    stopped: str | None
    store: Store
    version: int

    @classmethod
    def create(
        cls, task: Task, seed: int = 0, device: torch.device | str | None = None, *, place: Any = None, donate: bool = False,
        _memo: dict[int, Any] | None = None,
    ) -> "TrainState":  # fmt: skip
        """A state before the first step, on a copy of the task's model.

        Args:
            task: The task.
            seed: Any non-negative integer; all randomness of the training follows from it.
            device: Where the tensors live; None leaves them where the model has them.
            place: How they lie on several processes, such as ``fl.parallel.ddp()``; the model is placed first, then gets its optimizer.
            donate: True takes the very tensors of the task's model, for one that fits into memory only once; the model is left with none,
                and the task can make no other state.

        Returns:
            The state.

        Raises:
            TypeError: If the task is not a `Task` or has given its model away, the seed is no integer, or `place` is no placement.
            OptimizerError: If `configure_optimizers` does not fit the model.
        """
        check_type("TrainState.create(task)", task, Task, "a Task", "write fl.Task(model, train_step, ...)")
        if place is not None and getattr(place, "place", None) is None:
            raise TypeError(f"TrainState.create(place=...) must be a placement such as fl.parallel.ddp(), but got {described(place)}")
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise TypeError(f"seed must be a non-negative integer, but got {seed!r}")
        lazy = [name for name, t in (*task.model.named_parameters(), *task.model.named_buffers()) if is_lazy(t)]
        if lazy:
            raise TypeError(
                f"the model has lazy tensors without a shape, {lazy[:5]}; call it once on a batch before making a Task, or make it anew where it "
                "was donated to another state"
            )
        home = None if device is None else existing(device)
        memo = {id(t): t for t in (*task.model.parameters(), *task.model.buffers())} if donate else _memo
        with isolated(home):
            module = copied(task.model, memo)
            move(module, home) if home is not None else None
            placed = None if place is None else place.place(module)
            store = Store(module, _configure(task, module), {}, placed)
        if donate:
            empty(task.model)
        return cls(task, Progress(updates=dict.fromkeys(store.phases, 0)), seed, History(), None, store, 0)

    @property
    def live(self) -> Store:
        """The store, if this state may still read it."""
        if self.store.version != self.version:
            raise DonatedStateError(
                f"the state of step {self.progress.step} was given to a later step, which has overwritten its tensors (or failed half-way); "
                "use the state that the step returned, keep state.copy() before the step, or make the step pure with fl.pure(step)"
            )
        return self.store

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.store.device

    @property
    def key(self) -> int:
        """The key of the next step, from which all of its random numbers come."""
        key, skipped = fold_in(self.seed, TRAIN, self.progress.step), self.progress.skipped
        return fold_in(key, SKIPPED + skipped) if skipped else key

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The parameters by qualified name, read-only; clone what must outlive the next step."""
        return MappingProxyType({name: p.detach() for name, p in self.live.module.named_parameters()})

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """The buffers by qualified name, read-only."""
        return MappingProxyType(dict(self.live.module.named_buffers()))

    @property
    def opt_state(self) -> Mapping[str, Mapping[str, Any]]:
        """The optimizer's memory by qualified parameter name, read-only; of several optimizers by their names."""
        store = self.live
        found = {
            key: MappingProxyType({name: MappingProxyType(slots) for name, slots in named_state(optim, store.module).items()})
            for key, optim in store.optims.items()
        }
        return MappingProxyType(found) if store.phases else found[""]

    @property
    def memory(self) -> Mapping[str, Any]:
        """The trees that combinators own, by name, read-only."""
        self.live.settle()
        return MappingProxyType(self.store.memory)

    @property
    def times(self) -> Times:
        """Where the time of the training went, over all of its runs; it does not count in comparisons."""
        times = self.live.times
        times.settle()
        return times

    def module(self) -> nn.Module:
        """A module of its own with these weights, in the modes of the live one; of a schedule-free optimizer, with the averaged ones."""
        store = self.live
        module = copy.deepcopy(store.module) if store.place is None else store.place.plain(store.module)
        for name, value in weights_to_use(self.store.optims.values(), self.store.module).items():
            module.get_parameter(name).data.copy_(value if store.place is None else store.place.full({name: value})[name])
        return module

    def copy(self) -> "TrainState":
        """An independent state with the same values, which stays readable when this one is donated."""
        return attrs.evolve(self, store=self.live.copy(), version=0)

    def to(self, device: torch.device | str) -> "TrainState":
        """A copy of this state on another device."""
        return self.copy().moved(existing(device))

    def moved(self, device: torch.device | str) -> "TrainState":
        """This very state, its tensors moved in place; it donates its input."""
        store = self.live
        if store.place is not None and torch.device(device) != store.device:
            raise ParallelError(
                f"a state that is placed on several processes stays on {store.device}, but was to be moved to {device}; make it there, with "
                "TrainState.create(task, device=..., place=...)"
            )
        store.settle()
        version, resources, times = store.version + 2, store.resources, store.times  # as a step does
        memo, optim = move(store.module, torch.device(device)), store.optims if store.phases else store.optim
        optim = copy.deepcopy(optim, memo) if memo else optim
        for each in optim.values() if isinstance(optim, Mapping) else (optim,):
            choose_fused(each.optimizer, store.module) if each.chooses else None
            to_device(each)
        store.memory = {key: tree if key == "loader" else map_nodes(partial(_moved, device), tree) for key, tree in store.memory.items()}
        store.__init__(store.module, optim, store.memory, store.place)
        store.version, store.resources, store.times = version, resources, times
        return attrs.evolve(self, version=version)

    def donated(self) -> Store:
        """The store, to be written over: from here on this state can no longer be read, whatever happens."""
        store = self.live
        store.version += 1
        store.skipped = False
        return store

    def advanced(self, item: Any, updates: Mapping[str, int] | None = None, made: int = 1, skipped: int = 0) -> "TrainState":
        """The state once an `Item` is consumed and the store written: its steps, batches and samples further; it donates this one."""
        p, store = self.progress, self.store
        if store.version != self.version + 1:  # where it is, `donated` was called for this step
            store = self.live
        store.version = self.version + 2
        store.end_step()
        store.position, store.media = item.position, None
        after = p.after(item, made - store.skipped, skipped + store.skipped, p.updates if updates is None else updates)
        return TrainState(self.task, after, self.seed, self.history, None, store, store.version)

    def recorded(self, metrics: Mapping[str, float]) -> "TrainState":
        """This state with metrics added to its history at the present step."""
        progress = self.progress
        return attrs.evolve(self, history=self.history.add(Record(progress.step, progress.epoch, dict(metrics))))

    def __repr__(self) -> str:
        p, store = self.progress, self.store
        count = sum(t.numel() for t in store.module.parameters())
        kinds = {name: "no optimizer" if o.optimizer is None else type(o.optimizer).__name__ for name, o in store.optims.items()}
        optimizers = ", ".join(f"{name}: {kind}" if name else kind for name, kind in kinds.items())
        ended = f", stopped: {self.stopped}" if self.stopped else ""
        return f"TrainState(step={p.step}, epoch={p.epoch}, batch={p.batch}, {count:,} parameters, {optimizers}{ended})"


def _configure(task: Task, module: nn.Module) -> Optim | dict[str, Optim]:
    phases = list(task.train_step) if isinstance(task.train_step, Mapping) else []
    if task.configure_optimizers is None:
        if phases:
            raise OptimizerError(
                f"this task has the phases {', '.join(phases)}, but no configure_optimizers; return an optimizer for each by name"
            )
        return Optim(None)
    named = dict(module.named_parameters())
    before: Iterable[int] = [p._version for p in named.values()]
    made = task.configure_optimizers(module)
    changed = [name for (name, p), version in zip(named.items(), before, strict=True) if p._version != version]
    if changed:
        raise OptimizerError(
            f"configure_optimizers must only build an optimizer, but it changed {changed[:5]}; do not step or initialise there"
        )
    for p in named.values():
        p.grad = None  # what is left there would be added to the first gradients
    if getattr(task.train_step, "kind", None) == "step" and isinstance(made, Mapping):
        phases = list(made)  # a whole step may have as many optimizers as it likes
    return prepare_each(made, phases, module) if phases else prepare(made, module)


def _moved(device: torch.device | str, node: Any) -> Any:
    return node.to(device) if isinstance(node, Tensor) else node if isinstance(node, Tally) else NotImplemented
