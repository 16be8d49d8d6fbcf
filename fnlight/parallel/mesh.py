"""The device mesh of a placement: made from names and sizes, and checked against the number of processes."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fnlight.errors import ParallelError
from fnlight.parallel.world import World, world
from fnlight.tensors import flattened_mesh

TENSOR = "tensor"
"""The mesh dimension along which tensor parallel shards layers; all others are data dimensions."""

MeshLike = Any
"""A ``DeviceMesh``, names to sizes, or None."""


def made_mesh(given: MeshLike, module: nn.Module) -> Any:
    """Return the mesh that a placement was given, or make it, after a check against the processes that have joined.

    Args:
        given: A ``DeviceMesh``; names to sizes; or None for one data dimension of all processes.
        module: Its device type is that of the mesh.

    Returns:
        A ``DeviceMesh`` with names.

    Raises:
        ParallelError: If it does not match the number of processes, or has dimensions that fnlight does not know.

    Example:
        >>> made_mesh({"data": 2}, nn.Linear(1, 1))
        Traceback (most recent call last):
        fnlight.errors.ParallelError: a mesh of {'data': 2} needs 2 processes, but 1 have joined; start 2 processes with torchrun, or change the sizes
    """
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    size = world().size
    if isinstance(given, DeviceMesh):
        named = dict(zip(given.mesh_dim_names or (), given.shape, strict=False))
        if not named:
            raise ParallelError("the mesh has no names; give init_device_mesh(..., mesh_dim_names=('data',)), or names to sizes")
    else:
        named = {"data": size} if given is None else given
    if not isinstance(named, Mapping) or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in named.values()):
        raise ParallelError(f"a mesh is a DeviceMesh, or names to sizes such as {{'data': 4}}, but got {given!r}")
    if math.prod(named.values()) != size:
        raise ParallelError(
            f"a mesh of {dict(named)} needs {math.prod(named.values())} processes, but {size} have joined; start "
            f"{math.prod(named.values())} processes with torchrun, or change the sizes"
        )
    if not 1 <= len([name for name in named if name != TENSOR]) <= 2:
        raise ParallelError(
            f"a mesh needs one data dimension, or two (the first replicates, the second shards), and may have {TENSOR!r} as well, but got "
            f"{dict(named)}; a data dimension may have size 1"
        )
    if isinstance(given, DeviceMesh):
        return given
    first = next(module.parameters(), torch.empty(0)).device.type
    kind = first if first != "meta" else _accelerator()
    return init_device_mesh(kind, tuple(named.values()), mesh_dim_names=tuple(named))


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


def data_mesh(mesh: Any) -> Any:
    """Return the dimensions of a mesh along which ranks have different data.

    Args:
        mesh: A ``DeviceMesh`` with names.

    Returns:
        The mesh without the dimension for tensor parallel.

    Example:
        >>> from types import SimpleNamespace
        >>> data_mesh(SimpleNamespace(mesh_dim_names=("data",))).mesh_dim_names
        ('data',)
    """
    names = tuple(name for name in mesh.mesh_dim_names if name != TENSOR)
    return mesh if len(names) == len(mesh.mesh_dim_names) else mesh[names]


def data_world(mesh: Any) -> World:
    """Return the position of this process among the ranks that have different data.

    Args:
        mesh: A ``DeviceMesh`` with names.

    Returns:
        Its rank among them, their number, and their process group.

    Example:
        >>> from types import SimpleNamespace
        >>> mesh = SimpleNamespace(mesh_dim_names=("data",), shape=(4,), ndim=1, get_coordinate=lambda: [3], size=lambda: 4)
        >>> data_world(mesh)
        World(rank=3, size=4, local_rank=0)
    """
    data = data_mesh(mesh)
    rank = 0
    for index, size in zip(data.get_coordinate(), data.shape, strict=True):
        rank = rank * size + index
    group = None if data is mesh else (data if data.ndim == 1 else flattened_mesh(data)).get_group()
    return World(rank, data.size(), world().local_rank, group)


def check_devices(module: nn.Module, mesh: Any) -> None:
    """Raise if a model is on several devices, or on another device type than its mesh.

    Args:
        module: The model.
        mesh: Its mesh.

    Raises:
        ParallelError: If it is.

    Example:
        >>> from types import SimpleNamespace
        >>> check_devices(nn.Linear(1, 1), SimpleNamespace(device_type="cuda"))
        Traceback (most recent call last):
        fnlight.errors.ParallelError: the model is on cpu, but the mesh is for cuda; give TrainState.create(task, device="cuda", place=...)
    """
    devices = sorted({str(p.device) for p in module.parameters()})
    if len(devices) > 1:
        raise ParallelError(f"a placement needs the model on one device per rank, but it is on {devices}; move it to one of them")
    if devices and devices[0].partition(":")[0] not in (mesh.device_type, "meta"):
        kind = mesh.device_type
        raise ParallelError(
            f'the model is on {devices[0]}, but the mesh is for {kind}; give TrainState.create(task, device="{kind}", place=...)'
        )
