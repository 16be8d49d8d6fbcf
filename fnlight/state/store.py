"""The store: one live module, its optimizers, and the memory of combinators. Steps overwrite it in place.

A `TrainState` is a value that may read the store while both have the same version.
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
from fnlight.state.copy_model import copied
from fnlight.state.progress import Progress
from fnlight.tensors import end_step_on, seed_generators


class StepScratch:
    """Values of one step and the rest of its tick; the next step overwrites them.

    Attributes:
        progress: What was completed before the step. Written by `begin`; by `fnlight.compile` while it asks stages for the numbers of later updates.
        skipped: Whether the update was left out, and the host knows. Written by `fnlight.step`, and cleared by `begin`.
        scale: What a loss is multiplied by before the backward pass, a scalar tensor, shape []. Written by `fnlight.precision.loss_scale`.
        position: Gives the place in the data after the step, until the next one. Written by `TrainState.advanced`, cleared by `Store.settle`.
        media: Pictures and texts of an evaluation, for the sinks of the same tick. Written by `fnlight.loop.evaluate_every`; cleared by
            `TrainState.advanced`, and by a pipe before the first step of a run.
        back: The version of the state after a rollback, for combinators on the same tick. Written by `fnlight.nonfinite.rollback`; it is
            never cleared, since no other state has this version.

    Example:
        >>> scratch = StepScratch()
        >>> scratch.begin(Progress(step=3))
        >>> scratch.progress.step, scratch.skipped
        (3, False)
    """

    __slots__ = ("back", "media", "position", "progress", "scale", "skipped")

    def __init__(self) -> None:
        self.progress = Progress()
        self.skipped = False
        self.scale: Tensor | None = None
        self.position: Callable[[], Any] | None = None
        self.media: dict[str, Any] | None = None
        self.back = -1

    def begin(self, progress: Progress) -> None:
        """Call before a step, or before each of the updates within it."""
        self.progress, self.skipped = progress, False


class RunScope:
    """Values of one run; neither copied nor saved.

    Attributes:
        resources: Open resources of the run by name; each has a ``close(error)``. The `start` of a combinator adds its own under its own name;
            `Store.end_run` removes all.
        until: The total number of steps of the run, if it is known. Written by `fnlight.loop.stop_when`.
        retained_grads: On the CPU, gradients until the next step: if freed earlier, their memory would go back to the system and be allocated
            again. Written by `Store.clear_gradients`, and cleared by `Store.free_gradients` and `TrainState.donated`.

    Example:
        >>> RunScope().resources
        {}
    """

    __slots__ = ("resources", "retained_grads", "until")

    def __init__(self) -> None:
        self.resources: dict[str, Any] = {}
        self.until: int | None = None
        self.retained_grads: list[Tensor | None] | None = None


class Store:
    """One live module, its optimizer, and the named memory of combinators. Changed in place by steps.

    Its parts by lifetime, and what writes them:

    - **The training**; copied with the state. `module` and `optim` are set by `bind` (and by `fit` for fp8); steps change their tensors. In `memory`
      each tree is written by the combinator that owns it, and ``"loader"`` by `settle`. `place` is written by `fnlight.parallel`, and for an
      attempt by ``microbatch("auto")``; `wall_time` by `fnlight.loop.run` and by loading. `version` counts how often the tensors were given
      away: `TrainState.donated`, `TrainState.advanced`, `TrainState.moved` and `fnlight.checkpoint.refill` write it.
    - **What follows from module and optimizer**; made by `bind`. `named`, `params` (`fnlight.gradients.freezing` leaves some out for a step),
      `frozen` (those that did not require gradients then), `device`, `phases`, `seeder` and `end_step`. `owner` is the pipe whose combinators have their memory here, written by that pipe;
      `bound` is what the placement keeps for this module, such as hooks, written by the placement.
    - **One run**: `run`, a `RunScope`.
    - **One step**: `step`, a `StepScratch`.

    A kernel calls Python code through `host`, and seeds the generators with `seeder`; `fnlight.compile` replaces both in the copy that it traces.

    With several optimizers, `phases` holds a store for each, with the same module and the same run: its `optim` is the optimizer, its `params`
    and `named` are the parameters of this optimizer, and its `memory` is that of the phase's own combinators.

    Args:
        module: The live module; no other state holds it.
        optim: Its prepared optimizer, or a mapping of names to several.
        memory: Names of combinators to trees of dicts, lists, tensors, numbers and strings, or a `Tally`.
        place: The placement on several processes, see `fnlight.parallel`; None in a single process.
        run: The values of the current run; None creates empty ones. A phase shares those of the whole store.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> Store(model, Optim(None), {}).copy().module is model
        False
    """

    __slots__ = (
        "bound",
        "device",
        "end_step",
        "frozen",
        "host",
        "memory",
        "module",
        "named",
        "optim",
        "owner",
        "params",
        "phases",
        "place",
        "run",
        "seeder",
        "step",
        "version",
        "wall_time",
    )  # fmt: skip

    def __init__(
        self,
        module: nn.Module,
        optim: Optim | Mapping[str, Optim],
        memory: dict[str, Any],
        place: Any = None,
        *,
        run: RunScope | None = None,
    ) -> None:
        self.memory, self.place, self.version = memory, place, 0
        self.wall_time = WallTime()
        self.host = HostCallbacks()
        self.run = RunScope() if run is None else run
        self.bind(module, optim)

    def bind(self, module: nn.Module, optim: Optim | Mapping[str, Optim]) -> None:
        """Set the module and its optimizer, or several by name, and compute what is derived from them; the values of the last step are cleared."""
        self.module = module
        self.optim = Optim(None) if isinstance(optim, Mapping) else optim
        self.named = dict(module.named_parameters())
        self.params = [p for p in self.named.values() if p.requires_grad]
        self.frozen = [p for p in self.named.values() if not p.requires_grad]
        first = next((t for t in (*module.parameters(), *module.buffers())), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.end_step = end_step_on(self.device)
        self.seeder: Callable[[int], None] = partial(seed_generators, device=self.device)
        self.bound: Any = None
        self.owner: Any = None
        self.step = StepScratch()
        self.phases = {name: self._phase(each) for name, each in optim.items()} if isinstance(optim, Mapping) else {}

    def _phase(self, optim: Optim) -> "Store":
        held = {id(p) for group in optim.optimizer.param_groups for p in group["params"]}
        phase = Store(self.module, optim, {}, self.place, run=self.run)
        phase.named = {name: p for name, p in self.named.items() if id(p) in held}
        phase.params = [p for p in phase.named.values() if p.requires_grad]
        phase.frozen = self.frozen
        return phase

    def seed(self, key: int) -> None:
        """Seed the generators from a key: those of torch, also on this device, of Python and of NumPy."""
        self.seeder(key)

    @property
    def progress(self) -> Progress:
        """What was completed before the current step."""
        return self.step.progress

    @property
    def optims(self) -> dict[str, Optim]:
        """The optimizers by name; a single one has the name ``""``."""
        return {name: phase.optim for name, phase in self.phases.items()} or {"": self.optim}

    def reported(self) -> dict[str, float]:
        """The learning rates and other scheduled values, for logs."""
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

    def clear_gradients(self) -> None:
        """Set all gradients to None; on the CPU their tensors are kept until the next step."""
        params = self.params
        self.run.retained_grads = [p.grad for p in params] if self.device.type == "cpu" else None
        for p in params:
            p.grad = None

    def free_gradients(self) -> None:
        """Free what `clear_gradients` has kept: the next step allocates new ones, or the memory is needed for something else."""
        self.run.retained_grads = None

    def end_run(self) -> dict[str, Any]:
        """Clear the values of a run; its open resources are returned, for the caller to close."""
        run = self.run
        held, run.resources, run.until, run.retained_grads = run.resources, {}, None, None
        return held

    def settle(self) -> None:
        """Complete what is pending: metrics, the position of a loader that keeps its own, and gathered parameters, which are sharded again."""
        if self.place is not None:
            self.place.rest(self.module)
        for tree in self.memory.values():
            if isinstance(tree, Tally):
                tree.settle()
        if self.step.position is not None:
            self.memory["loader"], self.step.position = copy.deepcopy(self.step.position()), None

    def complete(self, key: str, init: Callable[["Store"], Any]) -> None:
        """Extend memory that is keyed by parameter names when the model has more parameters than the saved one."""
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
        twin.end_step()  # on a lazy device a copy shares memory until then, and a step would overwrite it
        return twin
