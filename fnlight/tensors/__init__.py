"""Basic tools for tensors: random keys, nested trees, devices, dtypes, and sharded tensors.

Read `rng` first: every random number of a training comes from it.
"""

from fnlight.tensors.device import default_device, end_step_on, existing, is_lazy, move, spread_like, spread_on
from fnlight.tensors.dtype import DTYPES, convert
from fnlight.tensors.rng import (
    COLLATE,
    EVALUATE,
    LOADER,
    NOISE,
    ORDER,
    PREDICT,
    RANK,
    SAMPLE,
    SKIPPED,
    TRAIN,
    fold_in,
    isolated,
    seed_generators,
)
from fnlight.tensors.shards import (
    Box,
    assign,
    box,
    box_of,
    cuts,
    give_memory,
    is_sharded,
    like_parts,
    local,
    local_parts,
    lying_like,
    own_part,
)
from fnlight.tensors.tree import differences, equal, leaves, map_nodes, map_tensors

__all__ = [
    "fold_in",
    "isolated",
    "seed_generators",
]
