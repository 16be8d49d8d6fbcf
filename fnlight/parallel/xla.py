"""XLA: states on the devices of ``torch_xla``, which is imported only here, and only when `xla` is called.

XLA records operations and compiles them when a step is complete. So nothing is read in between: metrics stay on the device
until they are logged, and what is saved is copied to the host first. On several devices (SPMD) one process holds tensors that are sharded over
all of them; the program is written for one device, and the compiler partitions it.
"""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fnlight.errors import ConfigError, ParallelError
from fnlight.optim import meant
from fnlight.tensors import move, register_device

Spec = Sequence[str | None]


def xla(mesh: Mapping[str, int] | None = None, shard: Mapping[str, Spec] | None = None) -> "OnXLA":
    """Put a state on XLA's device, or shard it over several XLA devices.

    The first call of a process registers ``torch.xla`` with torch, which seeds the device's random numbers. With a mesh it also switches
    ``torch_xla`` to SPMD for the whole process; do that before anything else is put on the device.

    Args:
        mesh: Names of axes to numbers of devices, such as ``{"data": 4}``: batches are sharded over the first axis; None is a single
            device, or the mesh that ``torch_xla`` was given before.
        shard: Which parameters are sharded too: patterns of names, as in `param_groups`, to the axis that shards each dimension, such as
            ``{"head.weight": ("model", None)}``; all others are replicated.

    Returns:
        A placement, for ``TrainState.create(task, place=...)``.

    Raises:
        ParallelError: If ``torch_xla`` is missing, if there are several processes, or if the mesh has another number of devices than there are.
        ConfigError: If `shard` names an axis that the mesh does not have.

    Example:
        >>> try:
        ...     place = xla()
        ... except ParallelError as error:
        ...     print("torch_xla is missing" in str(error))
        ... else:
        ...     print(place == xla())
        True
    """
    runtime = _runtime()
    if runtime.process_count() > 1:
        raise ParallelError(
            f"fl.parallel.xla() needs one process, but torch_xla runs {runtime.process_count()}; start one, and give xla(mesh=...)"
        )
    _tell_torch()
    if mesh is not None:
        _use(mesh, runtime)
    _check_axes(shard or {})
    return OnXLA(tuple((mesh or {}).items()), tuple((pattern, tuple(spec)) for pattern, spec in (shard or {}).items()))


def _runtime() -> Any:
    try:
        return import_module("torch_xla.runtime")
    except ImportError as error:
        raise ParallelError(
            f"fl.parallel.xla() needs torch_xla, and torch_xla is missing here ({error}); install the version that goes with torch "
            f"{torch.__version__}, if there is one, or leave place= out"
        ) from error


def _spmd() -> Any:
    return import_module("torch_xla.distributed.spmd")


@attrs.frozen(repr=False)
class OnXLA:
    """The placement that `xla` returns; there is only one process, so it only moves and shards the module.

    Args:
        mesh: Axes and their sizes; empty if none was given.
        shard: Patterns of parameter names, and the axis that shards each dimension.

    Example:
        >>> OnXLA((("data", 4),))
        xla(mesh={'data': 4})
    """

    mesh: tuple[tuple[str, int], ...] = ()
    shard: tuple[tuple[str, tuple[str | None, ...]], ...] = ()

    def __repr__(self) -> str:
        given = {"mesh": dict(self.mesh), "shard": dict(self.shard)}
        return f"xla({', '.join(f'{name}={value!r}' for name, value in given.items() if value)})"

    def place(self, module: nn.Module) -> None:
        """Move a module to the device, in place, and shard its parameters; nothing is to be done later."""
        move(module, import_module("torch_xla").device())
        for pattern, spec in self.shard:
            for name in meant(pattern, module, "shard"):
                _divide(name, module.get_parameter(name), spec)


@attrs.frozen(eq=False)
class Device:
    """What is registered as ``torch.xla``: random numbers, and the functions that `fnlight.tensors.device` calls on a lazy device.

    Example:
        >>> callable(Device().spread)
        True
    """

    def current_device(self) -> int:
        """The index of this process's device; with SPMD one index represents all devices."""
        return import_module("torch_xla").device().index

    def manual_seed(self, seed: int) -> None:
        """Seed the device's random numbers."""
        import_module("torch_xla").manual_seed(seed)

    def get_rng_state(self) -> int:
        """The state of the device's random number generator."""
        return import_module("torch_xla.core.xla_model").get_rng_state()

    def set_rng_state(self, state: int) -> None:
        """Restore a state of the random number generator."""
        self.manual_seed(state)

    def end_step(self) -> None:
        """Compile the operations recorded since the last call, if they are new, and start them without waiting."""
        import_module("torch_xla").sync()

    def spread(self, tensor: Tensor) -> Tensor:
        """Shard a tensor of a batch over the first axis of the mesh, along its first dimension."""
        spmd = _spmd()
        mesh = spmd.get_global_mesh()
        if mesh is not None and tensor.dim():
            spmd.mark_sharding(tensor, mesh, (0, *[None] * (tensor.dim() - 1)))
        return tensor


def _tell_torch() -> None:
    if getattr(torch, "xla", None) is None:  # torch's hook for device vendors; a later torch_xla may register its own
        register_device("xla", Device())


def _use(mesh: Mapping[str, int], runtime: Any) -> None:
    """Make a mesh the one of this process."""
    if not mesh or not all(isinstance(size, int) and size >= 1 for size in mesh.values()):
        raise ConfigError(f"xla(mesh=...) must map names of axes to numbers of devices, such as {{'data': 4}}, but got {dict(mesh)!r}")
    count, wanted = runtime.global_runtime_device_count(), torch.Size(mesh.values()).numel()
    if count != wanted:
        raise ParallelError(
            f"xla(mesh={dict(mesh)!r}) needs {wanted} devices, but there are {count}; give a mesh of all of them"
            + (f", or set CPU_NUM_DEVICES={wanted} before torch_xla is used" if os.environ.get("PJRT_DEVICE") == "CPU" else "")
        )
    if not runtime.is_spmd():
        runtime.use_spmd()
    spmd = _spmd()
    spmd.set_global_mesh(spmd.Mesh(list(range(count)), tuple(mesh.values()), tuple(mesh)))


def _axes() -> list[str]:
    mesh = _spmd().get_global_mesh()
    return [] if mesh is None else list(mesh.axis_names or ())


def _check_axes(shard: Mapping[str, Spec]) -> None:
    known = _axes() if shard else []
    for pattern, spec in shard.items():
        unknown = [axis for axis in spec if axis is not None and axis not in known]
        if unknown:
            raise ConfigError(
                f"xla(shard={{{pattern!r}: {tuple(spec)!r}}}) names the axes {unknown}, but the axes of the mesh are {known or 'none'}"
            )


def _divide(name: str, p: Tensor, spec: Spec) -> None:
    if p.dim() != len(spec):
        raise ConfigError(f"xla(shard=...) has {len(spec)} entries for {name!r}, but its shape is {list(p.shape)}; give one per dimension")
    _spmd().mark_sharding(p, _spmd().get_global_mesh(), tuple(spec))
