"""The state: an immutable value that holds everything a run needs to continue, on a store that holds its tensors.

A `TrainState` is the progress of the training of a `Task`; its `Store` holds the tensors. In PyTorch the fast way to train is in place, so
a step *donates* its input: it updates the store, increases its version and returns a new state on it. A state with an older version raises
`DonatedStateError` when its tensors are read.
"""

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fnlight.errors import DonatedStateError, OptimizerError, ParallelError, check_type, described
from fnlight.metrics import Tally
from fnlight.optim import Optim, choose_fused, named_state, prepare, prepare_each, to_device, weights_to_use
from fnlight.runtime import WallTime
from fnlight.state.copy_model import check_generators, copied
from fnlight.state.history import History, Record
from fnlight.state.progress import Progress, step_key
from fnlight.state.store import Store
from fnlight.state.task import Task, empty
from fnlight.tensors import existing, home_of, isolated, map_nodes, move, version_of

A_STATE = "a TrainState, such as fl.TrainState.create(task) or fl.load(path, task) gives"
"""For the errors of functions that take a state."""


@attrs.frozen(eq=False, repr=False)
class TrainState:
    """The state of a training: an immutable value.

    Args:
        task: The model and the pure functions; never saved.
        progress: Counts of completed work.
        seed: The one source of randomness.
        history: All records so far, oldest first.
        stopped: Why the last run ended; None during a run.
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
            device: The device of the tensors; None keeps the model's.
            place: The placement on several processes, such as ``fl.parallel.ddp()``; the optimizer is created after the model is placed.
            donate: True takes the tensors of the task's model without a copy, for a model that fits into memory only once. The model is
                then empty, and the task cannot create another state.

        Returns:
            The state.

        Raises:
            TypeError: If the task is not a `Task`, its model was donated, a parameter is sparse, the seed is not an integer, or `place` is not a
                placement.
            OptimizerError: If `configure_optimizers` does not fit the model.
        """
        check_type("TrainState.create(task)", task, Task, expected="a Task", advice="write fl.Task(model, train_step, ...)")
        if place is not None and getattr(place, "place", None) is None:
            raise TypeError(f"TrainState.create(place=...) must be a placement such as fl.parallel.ddp(), but got {described(place)}")
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise TypeError(f"seed must be a non-negative integer, but got {seed!r}")
        lazy = [name for name, t in (*task.model.named_parameters(), *task.model.named_buffers()) if is_lazy(t)]
        if lazy:
            raise TypeError(
                f"the model has lazy tensors without a shape, {lazy[:5]}; call the model once on a batch before fl.Task(model, ...), or create a "
                "new model if this one was donated to another state"
            )
        check_generators(task.model)
        _check_dense(task.model)
        home = home_of(device)
        memo = {id(t): t for t in (*task.model.parameters(), *task.model.buffers())} if donate else _memo
        with isolated(home):
            module = copied(task.model, memo)
            if home is not None:
                move(module, home)
            placed = None if place is None else place.place(module)
            store = Store(module, _configure(task, module), {}, placed)
        if donate:
            empty(task.model)
        return cls(
            task=task,
            progress=Progress(updates=dict.fromkeys(store.phases, 0)),
            seed=seed,
            history=History(),
            stopped=None,
            store=store,
            version=0,
        )

    @property
    def live(self) -> Store:
        """The store, if this state may still read it."""
        if self.store.version != self.version:
            raise DonatedStateError(
                f"the state of step {self.progress.step} was donated to a later step, which has overwritten its tensors (or failed half-way); "
                "use the state that the step returned, keep state.copy() before the step, or make the step pure with fl.pure(step)"
            )
        return self.store

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.store.device

    @property
    def key(self) -> int:
        """The random key of the next step; all of its random numbers come from it."""
        return step_key(self.seed, self.progress)

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
        """The optimizer state by qualified parameter name, read-only; with several optimizers, a mapping of their names to it."""
        store = self.live
        found = {
            key: MappingProxyType({name: MappingProxyType(slots) for name, slots in named_state(optim, store.module).items()})
            for key, optim in store.optims.items()
        }
        return MappingProxyType(found) if store.phases else found[""]

    @property
    def memory(self) -> Mapping[str, Any]:
        """The memory of combinators, a tree by name of each, read-only."""
        self.live.settle()
        return MappingProxyType(self.store.memory)

    @property
    def wall_time(self) -> WallTime:
        """Where the time of the training was spent, over all of its runs; ignored in comparisons."""
        wall_time = self.live.wall_time
        wall_time.settle()
        return wall_time

    def module(self) -> nn.Module:
        """An independent module with these weights, in the same train or eval modes; for a schedule-free optimizer, the averaged weights."""
        store = self.live
        module = copied(store.module) if store.place is None else store.place.plain(store.module)
        for name, value in weights_to_use(self.store.optims.values(), self.store.module).items():
            module.get_parameter(name).data.copy_(value if store.place is None else store.place.full({name: value})[name])
        return module

    def copy(self) -> "TrainState":
        """An independent state with the same values; it can still be read after this one is donated."""
        return attrs.evolve(self, store=self.live.copy(), version=0)

    def to(self, device: torch.device | str) -> "TrainState":
        """A copy of this state on another device."""
        return self.copy().moved(existing(device))

    def moved(self, device: torch.device | str) -> "TrainState":
        """The state on another device, moved in place; it donates its input."""
        store = self.live
        if store.place is not None and torch.device(device) != store.device:
            raise ParallelError(
                f"a state that is placed on several processes stays on {store.device} and cannot be moved to {device}; create it there, with "
                "TrainState.create(task, device=..., place=...)"
            )
        store.settle()
        memo, optim = move(store.module, torch.device(device)), store.optims if store.phases else store.optim
        optim = copy.deepcopy(optim, memo) if memo else optim
        for each in optim.values() if isinstance(optim, Mapping) else (optim,):
            if each.chooses:
                choose_fused(each.optimizer, store.module)
            to_device(each)
        store.memory = {key: tree if key == "loader" else map_nodes(partial(_moved, device), tree) for key, tree in store.memory.items()}
        store.free_gradients()
        store.bind(store.module, optim)
        store.version += 2  # as a step does
        return attrs.evolve(self, version=store.version)

    def donated(self) -> Store:
        """The store, for the step that is about to overwrite it: from now on this state cannot be read, also if the step fails."""
        store = self.store
        if store.version != self.version:
            store = self.live  # raises
        store.version += 1
        step = store.step
        step.progress, step.skipped = self.progress, False  # StepScratch.begin and Store.free_gradients without the calls:
        store.run.retained_grads = None  # every step comes here
        return store

    def advanced(self, item: Any, updates: Mapping[str, int] | None = None, made: int = 1, skipped: int = 0) -> "TrainState":
        """The state after a step that has consumed one `Item` and written the store; it donates this one. Every step ends with this call.

        Args:
            item: What the step consumed.
            updates: With several optimizers: the completed updates of each; None leaves them unchanged.
            made: Updates of the step; if ``store.step.skipped`` is True, one of them was skipped.
            skipped: Updates that were skipped, besides that one.

        Returns:
            The next state, on the same store.
        """
        p, store = self.progress, self.store
        if store.version != self.version + 1:  # if equal, `donated` was called for this step
            store = self.live
        store.version = self.version + 2
        store.end_step()
        step = store.step
        step.position, step.media = item.position, None
        after = p.after(item, made - step.skipped, skipped + step.skipped, p.updates if updates is None else updates)
        return TrainState(self.task, after, self.seed, self.history, None, store, store.version)

    def recorded(self, metrics: Mapping[str, float]) -> "TrainState":
        """This state with metrics added to its history at the current step."""
        progress = self.progress
        return attrs.evolve(self, history=self.history.add(Record(progress.step, progress.epoch, dict(metrics))))

    def __repr__(self) -> str:
        p, store = self.progress, self.store
        count = sum(t.numel() for t in store.module.parameters())
        kinds = {name: "no optimizer" if o.optimizer is None else type(o.optimizer).__name__ for name, o in store.optims.items()}
        optimizers = ", ".join(f"{name}: {kind}" if name else kind for name, kind in kinds.items())
        ended = f", stopped: {self.stopped}" if self.stopped else ""
        return f"TrainState(step={p.step}, epoch={p.epoch}, batch={p.batch}, {count:,} parameters, {optimizers}{ended})"


def _check_dense(model: nn.Module) -> None:
    sparse = [name for name, p in model.named_parameters() if p.layout != torch.strided]
    if sparse:
        raise TypeError(
            f"the parameters {sparse[:5]} are sparse, which torch can neither copy nor save as parameters; keep them dense, and make what is "
            "computed with them sparse, as in weight.to_sparse_csr()"
        )


def _configure(task: Task, module: nn.Module) -> Optim | dict[str, Optim]:
    phases = list(task.train_step) if isinstance(task.train_step, Mapping) else []
    if task.configure_optimizers is None:
        if phases:
            raise OptimizerError(
                f"this task has the phases {', '.join(phases)}, but no configure_optimizers; give fl.Task a function that returns a dict with an optimizer for each"
            )
        return Optim(None)
    named = dict(module.named_parameters())
    before: Iterable[int] = [version_of(p) for p in named.values()]
    made = task.configure_optimizers(module)
    changed = [name for (name, p), version in zip(named.items(), before, strict=True) if version_of(p) != version]
    if changed:
        raise OptimizerError(
            f"configure_optimizers must only build an optimizer, but it changed {changed[:5]}; do not step or initialise weights there"
        )
    for p in named.values():
        p.grad = None  # leftovers would be added to the first gradients
    if getattr(task.train_step, "kind", None) == "step" and isinstance(made, Mapping):
        phases = list(made)  # a whole step may have any number of optimizers
    return prepare_each(made, phases, module) if phases else prepare(made, module)


def _moved(device: torch.device | str, node: Any) -> Any:
    return node.to(device) if isinstance(node, Tensor) else node if isinstance(node, Tally) else NotImplemented
