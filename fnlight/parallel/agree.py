"""Check before training that all ranks agree: on code, configuration, seeds and shapes, and that no two ranks use the same device."""

import hashlib
import inspect
import os
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from fnlight.errors import ParallelError
from fnlight.parallel.world import World
from fnlight.state import TrainState

_SAME_DATA = "give all ranks the same data; fnlight takes each rank's part of it (use fl.sharded(loader) if each rank has its own data)"
_WHAT_TO_DO = {
    "code": "run the same version of the script and of its modules on all machines",
    "seed": "give TrainState.create(task, seed=...) the same number on all ranks; each rank derives its own random numbers from it",
    "batches": _SAME_DATA,
    "samples": _SAME_DATA,
}


def check_same(world: World, state: TrainState, **facts: Any) -> None:
    """Raise before any work starts if ranks differ in code, configuration, seed, data or shapes.

    Args:
        world: The ranks; all of them must call this.
        state: The training state; its task, seed, progress and the shapes of its model are compared.
        **facts: Further values that must be the same on all ranks, as numbers or strings.

    Raises:
        ParallelError: If ranks differ; the message names the ranks and the value in which they differ.

    Example:
        >>> import fnlight as fl
        >>> check_same(World(), fl.TrainState.create(fl.Task(torch.nn.Linear(1, 1), max)), config="{}")
    """
    progress = state.progress
    mine = {
        "fnlight and torch": torch.__version__,
        "code": code_digest(state.task),
        "shapes": [[name, list(p.shape), str(p.dtype)] for name, p in state.store.named.items()],
        "seed": state.seed,
        "progress": [progress.step, progress.epoch, progress.batch, progress.samples],
        "history": len(state.history),
        **facts,
    }
    found = world.gather([mine, [socket.gethostname(), world.local_rank, _share(state, os.environ)]])
    for name in mine:
        given = [each[name] for each, _ in found]
        other = [rank for rank, value in enumerate(given) if value != given[0]]
        if other:
            says = f": {given[other[0]]!r:.60} and {given[0]!r:.60}" if name not in ("code", "shapes") else ""
            what = _WHAT_TO_DO.get(name, "start all ranks in the same way")
            raise ParallelError(f"rank {', '.join(map(str, other))} and rank 0 differ in their {name}{says}; {what}")
    twice = [place for place, count in Counter(tuple(place) for _, place in found).items() if count > 1]
    if twice:
        raise ParallelError(
            f"several processes have local rank {twice[0][1]} on {twice[0][0]}; check LOCAL_RANK, and that each machine is only once in the "
            "list of hosts"
        )


def _share(state: TrainState, environ: Mapping[str, str]) -> str:
    """What distinguishes processes with the same machine and local rank: the accelerators that each may see; on a CPU, the node of its launcher."""
    if any(p.device.type != "cpu" for p in state.store.params):
        return str(sorted((name, value) for name, value in environ.items() if name.endswith("VISIBLE_DEVICES")))
    return environ.get("GROUP_RANK") or environ.get("SLURM_NODEID", "")  # of torchrun, of SLURM


def code_digest(task: Any) -> str:
    """Return a digest of the source code of a task's functions and of its model's class.

    Args:
        task: Any task.

    Returns:
        Hexadecimal digits; a function without source code counts by its name.

    Example:
        >>> import fnlight as fl
        >>> len(code_digest(fl.Task(torch.nn.Linear(1, 1), max)))
        32
    """
    whole = hashlib.blake2b(digest_size=16)
    for part in (type(task.model), task.train_step, task.eval_step, task.predict_step, task.configure_optimizers):
        whole.update(_source(part).encode())
    return whole.hexdigest()


def _source(part: Any) -> str:
    try:
        return inspect.getsource(part)
    except (OSError, TypeError):
        return getattr(part, "__qualname__", type(part).__qualname__)
