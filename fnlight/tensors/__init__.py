"""Basic tools for tensors: random keys, nested trees, devices, dtypes, and sharded tensors.

Read `rng` first: every random number of a training comes from it.
"""

from fnlight.tensors._private_torch import (
    BATCH_NORMS,
    NORMS,
    BatchNorm,
    attributes_of,
    broadcast_each,
    buffers_of,
    derived_buffers,
    flattened_mesh,
    foreach_add_,
    foreach_clamp_max_,
    foreach_clamp_min_,
    foreach_copy_,
    foreach_div_,
    foreach_lerp_,
    foreach_mul_,
    foreach_norm,
    fsdp_state,
    fused_kernel,
    gradient_hooks,
    has_own_iterator,
    has_scheduler,
    has_step_hooks,
    is_profiling,
    parameters_of,
    register_device,
    remove_reducer_hooks,
    replace_tensors,
    say_fused,
    set_grad_enabled,
    stored_values,
    strip_sharding,
    unscale_,
    update_scale_,
    version_of,
)
from fnlight.tensors.device import check_context, default_device, end_step_on, existing, home_of, is_lazy, move, spread_like, spread_on
from fnlight.tensors.dtype import DTYPES, convert
from fnlight.tensors.finite import listed, not_finite
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
from fnlight.tensors.sparse import entries, sparse_names
from fnlight.tensors.tree import differences, equal, leaves, map_nodes, map_tensors

__all__ = [
    "fold_in",
    "isolated",
    "seed_generators",
]
