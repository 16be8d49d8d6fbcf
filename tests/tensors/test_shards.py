"""Where a part is in the whole follows from how the whole is cut, as torch cuts it."""

from itertools import product

import pytest
import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Replicate, _StridedShard

from fnlight.tensors import assign, box, box_of, cuts, is_sharded, like_parts, own_part

MESHES = {
    "one row": ((3,), [Shard(0)]),
    "rows and columns": ((2, 3), [Shard(0), Shard(1)]),
    "replicated rows": ((2, 2), [Replicate(), Shard(0)]),
    "cut by layers first": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    "twice along one": ((2, 2), [Shard(0), Shard(0)]),
}


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("shape", [(12, 6), (7, 6), (1, 6), (2, 3, 5)])
def test_a_part_is_where_torch_says_it_is(name, shape):
    """Offset and shape are those of torch, for parts that are uneven or empty, too."""
    mesh, placements = MESHES[name]
    if name == "cut by layers first" and shape[0] % 2:
        return  # torch pads such a weight, or refuses it
    for at in product(*map(range, mesh)):
        found = box_of(shape, [(dim, mesh[i], at[i]) for i, dim in cuts(placements)])
        size, offset = _compute_local_shape_and_global_offset(shape, mesh, list(at), placements)
        assert found[1] == tuple(size)
        if 0 not in size:
            assert found[0] == tuple(offset)


def test_the_parts_are_the_whole():
    """Cut in any way, the parts of all processes cover the whole, each entry once."""
    for mesh, placements in (each for name, each in MESHES.items() if name != "replicated rows"):
        seen = torch.zeros(7, 6)
        for at in product(*map(range, mesh)):
            offset, shape = box_of((7, 6), [(dim, mesh[i], at[i]) for i, dim in cuts(placements)])
            seen[offset[0] : offset[0] + shape[0], offset[1] : offset[1] + shape[1]] += 1
        assert torch.equal(seen, torch.ones(7, 6))


def test_a_tensor_that_lies_here_is_its_only_part():
    """What is whole is taken as it is, without a copy."""
    weight = torch.arange(6.0).reshape(2, 3)
    assert not is_sharded(weight)
    assert box(weight) == ((0, 0), (2, 3))
    assert own_part(weight, weight).data_ptr() == weight.data_ptr()
    assert like_parts(weight, weight) is weight
    assign(weight, torch.zeros(2, 3))
    assert weight.sum() == 0
