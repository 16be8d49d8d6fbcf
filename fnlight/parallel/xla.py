"""XLA: states on the devices of ``torch_xla``, which is imported only here, and only when it is asked for.

XLA notes operations down and compiles what was noted when a step is complete. So nothing is read in between: metrics stay on the device
until they are logged, and what is saved is copied to the host first. On several devices (SPMD) one process holds tensors that are spread over
all of them; a program is that of one device, and the compiler divides it.
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
    """Put a state on XLA's device, or spread it over several of them.

    The first call of a process tells torch how the random numbers of the device are seeded, as ``torch.xla``. With a mesh it also switches
    ``torch_xla`` to SPMD, which holds for the whole process; do that before anything else is put on the device.

    Args:
        mesh: Names of axes to numbers of devices, such as ``{"data": 4}``: batches are divided over the first one; None is a single
            device, or the mesh that ``torch_xla`` has been given.
        shard: Which parameters are divided too: patterns of names, as in `param_groups`, to the axis that divides each dimension, such as
            ``{"head.weight": ("model", None)}``; all others are on every device.

    Returns:
        A placement, for ``TrainState.create(task, place=...)``.

    Raises:
        ParallelError: If ``torch_xla`` is missing, or there are several processes, or other devices than the mesh has.
        ConfigError: If what is to be divided names an axis that the mesh does not have.

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
        raise ParallelError(f"fl.parallel.xla() works in one process, but torch_xla runs {runtime.process_count()}; start one, with a mesh")
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
    """The placement that `xla` gives; the process stays one, so all that is done is done to the module.

    Args:
        mesh: Axes and their sizes; empty where there is none of our own.
        shard: Patterns of parameter names, and what divides each dimension.

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
        """Move a module to the device, in place, and divide its parameters; nothing else is asked of it later."""
        move(module, import_module("torch_xla").device())
        for pattern, spec in self.shard:
            for name in meant(pattern, module, "shard"):
                _divide(name, module.get_parameter(name), spec)


@attrs.frozen(eq=False)
class Device:
    """What torch is told of as ``torch.xla``: random numbers, and what `fnlight.tensors.device` asks of a lazy device.

    Example:
        >>> callable(Device().spread)
        True
    """

    def current_device(self) -> int:
        """The device of this process; of several there is one that stands for all."""
        return import_module("torch_xla").device().index

    def manual_seed(self, seed: int) -> None:
        """Seed the device's random numbers."""
        import_module("torch_xla").manual_seed(seed)

    def get_rng_state(self) -> int:
        """Where the device's random numbers stand."""
        return import_module("torch_xla.core.xla_model").get_rng_state()

    def set_rng_state(self, state: int) -> None:
        """Put them back."""
        self.manual_seed(state)

    def end_step(self) -> None:
        """Compile what was noted down since the last time, if it is new, and start it; nothing is waited for."""
        import_module("torch_xla").sync()

    def spread(self, tensor: Tensor) -> Tensor:
        """Divide a tensor of a batch over the first axis of the mesh, by its first dimension."""
        spmd = _spmd()
        mesh = spmd.get_global_mesh()
        if mesh is not None and tensor.dim():
            spmd.mark_sharding(tensor, mesh, (0, *[None] * (tensor.dim() - 1)))
        return tensor


def _tell_torch() -> None:
    if getattr(torch, "xla", None) is None:  # as the makers of devices do it; a later torch_xla may bring its own
        register_device("xla", Device())


def _use(mesh: Mapping[str, int], runtime: Any) -> None:
    """Make a mesh the one of this process."""
    if not mesh or not all(isinstance(size, int) and size >= 1 for size in mesh.values()):
        raise ConfigError(f"xla(mesh=...) must map names of axes to numbers of devices, such as {{'data': 4}}, but got {dict(mesh)!r}")
    count, wanted = runtime.global_runtime_device_count(), torch.Size(mesh.values()).numel()
    if count != wanted:
        raise ParallelError(
            f"xla(mesh={dict(mesh)!r}) takes {wanted} devices, but there are {count}; give a mesh of all of them"
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
                f"xla(shard={{{pattern!r}: {tuple(spec)!r}}}) names {unknown}, but the axes of the mesh are {known or 'none'}"
            )


def _divide(name: str, p: Tensor, spec: Spec) -> None:
    if p.dim() != len(spec):
        raise ConfigError(f"xla(shard=...) says of {len(spec)} dimensions how {name!r} is divided, but its shape is {list(p.shape)}")
    _spmd().mark_sharding(p, _spmd().get_global_mesh(), tuple(spec))
