"""Training on several processes: a placement, given to ``TrainState.create(task, place=...)``, says how a state is distributed over the ranks.

torchrun, SLURM or Ray start the processes. `join` makes the process group, `ddp` gives every rank the whole model, `fsdp` gives it a shard.
`xla` puts a state on XLA's device, or shards it over several XLA devices.

Example:
    >>> import torch, fnlight as fl
    >>> task = fl.Task(torch.nn.Linear(1, 1), lambda model, batch: model(batch).mean(),
    ...                configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    >>> with fl.parallel.join() as world:  # under torchrun, one of many
    ...     state = fl.TrainState.create(task, place=fl.parallel.ddp())
    >>> world
    World(rank=0, size=1, local_rank=0)
"""

from fnlight.parallel.agree import check_same, code_digest
from fnlight.parallel.attach_placement import alone, placed_on
from fnlight.parallel.batchnorm import sync_batchnorm
from fnlight.parallel.ddp import Replicated, ddp
from fnlight.parallel.exact import exact_ranks
from fnlight.parallel.fsdp import Sharded, fsdp, hsdp
from fnlight.parallel.local_sgd import LocalSGD, diloco, local_sgd
from fnlight.parallel.placement import Placement
from fnlight.parallel.world import Pulse, World, first_host, join, named_world, pack, stream_part, unpack, world
from fnlight.parallel.xla import OnXLA, xla

__all__ = [
    "LocalSGD",
    "OnXLA",
    "Placement",
    "Pulse",
    "Replicated",
    "Sharded",
    "World",
    "alone",
    "check_same",
    "code_digest",
    "ddp",
    "diloco",
    "exact_ranks",
    "first_host",
    "fsdp",
    "hsdp",
    "join",
    "local_sgd",
    "named_world",
    "pack",
    "placed_on",
    "stream_part",
    "sync_batchnorm",
    "unpack",
    "world",
    "xla",
]
