"""Which ranks share what: the mesh of a placement, made of names and sizes, and checked against the processes that there are."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fnlight.errors import ParallelError
from fnlight.parallel.world import World, world
from fnlight.tensors import flattened_mesh

TENSOR = "tensor"
"""The dimension of a mesh along which layers are cut; all others are for data."""

MeshLike = Any
"""A ``DeviceMesh``, names to sizes, or None."""


def made_mesh(given: MeshLike, module: nn.Module) -> Any:
    """The mesh that a placement was given, or is to make, held against the processes that have joined.

    Args:
        given: A ``DeviceMesh``; names to sizes; or None for one row of all processes.
        module: Says on which kind of device it is to be made.

    Returns:
        A ``DeviceMesh`` with names.

    Raises:
        ParallelError: If it does not fit the world, or has dimensions that mean nothing here.

    Example:
        >>> made_mesh({"data": 2}, nn.Linear(1, 1))
        Traceback (most recent call last):
        fnlight.errors.ParallelError: a mesh of {'data': 2} needs 2 processes, but 1 have joined; start torchrun with as many, or change the sizes
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
            f"a mesh of {dict(named)} needs {math.prod(named.values())} processes, but {size} have joined; start torchrun with as many, or "
            "change the sizes"
        )
    if not 1 <= len([name for name in named if name != TENSOR]) <= 2:
        raise ParallelError(
            f"a mesh has one data dimension, or two of which the first replicates, and besides {TENSOR!r} if need be, but got {dict(named)}; "
            "a data dimension may have the size 1"
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
    """The dimensions of a mesh along which ranks have data of their own.

    Args:
        mesh: A ``DeviceMesh`` with names.

    Returns:
        The part of it without the dimension for tensor parallel.

    Example:
        >>> from types import SimpleNamespace
        >>> data_mesh(SimpleNamespace(mesh_dim_names=("data",))).mesh_dim_names
        ('data',)
    """
    names = tuple(name for name in mesh.mesh_dim_names if name != TENSOR)
    return mesh if len(names) == len(mesh.mesh_dim_names) else mesh[names]


def data_world(mesh: Any) -> World:
    """This process among those that have data of their own.

    Args:
        mesh: A ``DeviceMesh`` with names.

    Returns:
        Its rank among them, their number, and the group in which they talk.

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
    """Refuse a model on several devices, or on another kind than its mesh.

    Args:
        module: The model.
        mesh: Its mesh.

    Raises:
        ParallelError: If it is so.

    Example:
        >>> from types import SimpleNamespace
        >>> check_devices(nn.Linear(1, 1), SimpleNamespace(device_type="cuda"))
        Traceback (most recent call last):
        fnlight.errors.ParallelError: the model lies on cpu, but the mesh is one of cuda; give TrainState.create(task, device="cuda", place=...)
    """
    devices = sorted({str(p.device) for p in module.parameters()})
    if len(devices) > 1:
        raise ParallelError(f"a placement takes a model on one device a rank, but this one lies on {devices}; move it to one")
    if devices and devices[0].partition(":")[0] not in (mesh.device_type, "meta"):
        kind = mesh.device_type
        raise ParallelError(
            f'the model lies on {devices[0]}, but the mesh is one of {kind}; give TrainState.create(task, device="{kind}", place=...)'
        )
