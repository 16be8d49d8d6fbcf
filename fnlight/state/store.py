"""The store: one live module, its optimizers, and what combinators remember. Steps write over it in place.

A `TrainState` is a value that may read it as long as its version is that of the store.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fnlight.metrics import Tally
from fnlight.optim import Optim, reported
from fnlight.runtime import HostCallbacks, WallTime
from fnlight.state.progress import Progress
from fnlight.state.task import copied
from fnlight.tensors import end_step_on, seed_generators


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
        "back",
        "bound",
        "device",
        "end_step",
        "host",
        "media",
        "memory",
        "module",
        "named",
        "optim",
        "owner",
        "params",
        "phases",
        "place",
        "position",
        "progress",
        "resources",
        "retained_grads",
        "scale",
        "seed",
        "skipped",
        "until",
        "version",
        "wall_time",
    )  # fmt: skip

    def __init__(self, module: nn.Module, optim: Optim | Mapping[str, Optim], memory: dict[str, Any], place: Any = None) -> None:
        self.module, self.memory, self.place = module, memory, place
        self.optim = Optim(None) if isinstance(optim, Mapping) else optim
        self.bound: Any = None  # what the placement keeps for this very module, such as hooks; neither copied nor saved
        self.version = 0
        self.back = -1  # the version of the state that went back to an earlier one, for those that look at it on the same tick
        self.owner: Any = None  # the pipe whose combinators have their memory here
        self.position: Callable[[], Any] | None = None  # where a loader that keeps its own position stands
        self.skipped = False  # whether the last step left out its update, and the host knows
        self.retained_grads: Any = None  # on the CPU, gradients until the next step: freed before, their pages would go back to the system
        self.progress = Progress()  # what was completed before the step that is under way
        self.until: int | None = None  # the completed steps at which the run that is under way ends at the latest, if that is known
        self.scale: Tensor | None = None  # what a loss is multiplied by before it goes backward
        self.resources: dict[str, Any] = {}  # what a run holds open, by name; each has a close(error), and none is copied or saved
        self.wall_time = WallTime()  # where the time of the training went
        self.media: dict[str, Any] | None = None  # pictures and texts of an evaluation, for the sinks of the same tick
        self.named = dict(module.named_parameters())
        self.params = [p for p in self.named.values() if p.requires_grad]
        first = next((t for t in (*module.parameters(), *module.buffers())), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.end_step = end_step_on(self.device)
        # what a kernel seeds the generators with; a trace puts its own here
        self.seed: Callable[[int], None] = partial(seed_generators, device=self.device)
        self.host = HostCallbacks()  # what Python has to say and to look at around a kernel; a trace puts its own here
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
        twin.wall_time = self.wall_time.copy()
        twin.end_step()  # on a lazy device a copy shares memory until then, and a step would take it away
        return twin
