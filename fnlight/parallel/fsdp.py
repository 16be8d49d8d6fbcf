"""Sharded: every rank holds a shard of each parameter, of its gradient and of its optimizer state; torch's ``fully_shard`` does the work."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, distributed, nn

from fnlight.errors import ConfigError, ParallelError, StepError, check_type
from fnlight.parallel.batchnorm import meet
from fnlight.parallel.mesh import TENSOR, MeshLike, check_devices, data_mesh, data_world, made_mesh
from fnlight.parallel.norms import norms, unit_norms
from fnlight.parallel.shard_policy import Policy, check_offload, chosen, cut_layers, dtype_of, offload_policy, precision_policy
from fnlight.parallel.unsharded_copy import stripped_copy
from fnlight.parallel.world import World, named_world, world
from fnlight.protocols import Gradients
from fnlight.state import hooked
from fnlight.tensors import box_of, broadcast_each, cuts, is_sharded, local, replace_tensors


def fsdp(
    mesh: MeshLike = None,
    *,
    policy: Policy = None,
    mixed_precision: Any = None,
    offload: Any = False,
    reshard: bool | int | None = None,
    tensor_parallel: Mapping[str, Any] | None = None,
    methods: Sequence[str] = (),
    broadcast_buffers: bool = True,
) -> "Sharded":
    """Every rank holds a shard of each parameter, and gathers the whole parameter just before it computes with it.

    The model is sharded first, and its optimizer is built from the shards; so gradients, optimizer state and weight averages are sharded, too.

    Args:
        mesh: Which ranks share what: a ``DeviceMesh``, or names to sizes such as ``{"data": 2, "tensor": 2}``; None is one data dimension of
            all ranks. Of two data dimensions the first replicates, as in `hsdp`. The dimension ``tensor`` is for `tensor_parallel`.
        policy: Which modules are gathered on their own; the rest is gathered as one: classes, or a function of name and module; None takes the
            blocks in each ``nn.ModuleList``.
        mixed_precision: The dtype of what is computed and sent, ``"bf16"`` or ``"fp16"``, with gradients summed in fp32; or a
            ``MixedPrecisionPolicy`` of torch.
        offload: True keeps shards on the CPU; or an ``OffloadPolicy`` of torch.
        reshard: ``reshard_after_forward`` of torch: True frees gathered parameters after the forward pass, False keeps them until the backward
            pass is over, a number keeps them sharded among that many ranks; None frees all but those of the outermost module.
        tensor_parallel: Names of modules, in which ``*`` matches any part, to styles of ``torch.distributed.tensor.parallel``.
        methods: Names of methods of the model that a loss function calls besides the model itself.
        broadcast_buffers: True sends the buffers of rank 0, such as the statistics of BatchNorm, to all ranks before each batch.

    Returns:
        A placement.

    Raises:
        ConfigError: If an option is not valid.

    Example:
        >>> fsdp(mixed_precision="bf16")
        fsdp(mixed_precision='bf16')

    References:
        Zhao et al., "PyTorch FSDP: experiences on scaling fully sharded data parallel" (2023).
    """
    check_type("fsdp(methods=...)", methods, Iterable, "names of methods")
    more = {"tensor_parallel": tensor_parallel, "methods": tuple(methods), "broadcast_buffers": broadcast_buffers}
    return Sharded(mesh, policy, mixed_precision, offload, reshard=reshard, **more)


def hsdp(mesh: MeshLike = None, **options: Any) -> "Sharded":
    """Shard the model within each group of ranks, and replicate it between groups; gradients are averaged within a group, then between groups.

    Args:
        mesh: Names to sizes, such as ``{"replicate": 2, "shard": 4}``, or a ``DeviceMesh``; None makes each machine one group.
        **options: Those of `fsdp`.

    Returns:
        A placement.

    Raises:
        ConfigError: If an option is not valid.
        ParallelError: If no mesh is given, and the environment does not say how many processes each machine has.

    Example:
        >>> hsdp({"replicate": 2, "shard": 4})
        fsdp({'replicate': 2, 'shard': 4})
    """
    if mesh is None:
        here, each = named_world(os.environ), os.environ.get("LOCAL_WORLD_SIZE", "")
        if not each.isdecimal() or here.size % max(int(each), 1):
            raise ParallelError(
                f"hsdp() makes each machine one group, but LOCAL_WORLD_SIZE={each!r} does not say how many of the {here.size} processes each has; "
                'give the mesh, as in hsdp({"replicate": 2, "shard": 4})'
            )
        mesh = {"replicate": here.size // int(each), "shard": int(each)}
    return fsdp(mesh, **options)


@attrs.frozen(eq=False, repr=False)
class Sharded:
    """The placement that `fsdp` returns; `Placement` documents its methods.

    Args:
        mesh: A mesh, or how to make one.
        policy: Which modules are gathered on their own.
        mixed_precision: The dtype of computation and communication.
        offload: Whether shards are kept on the CPU.
        reshard: When gathered parameters are freed.
        tensor_parallel: Names of modules to styles.
        methods: Methods that a loss function calls.
        broadcast_buffers: Whether all ranks get the buffers of rank 0.
        world: The ranks that have their own data; known after a module is placed.

    Example:
        >>> fsdp().place(nn.Linear(1, 1)) is None  # alone there is nothing to do
        True
    """

    mesh: Any = None
    policy: Policy = None
    mixed_precision: Any = None
    offload: Any = False
    reshard: bool | int | None = None
    tensor_parallel: Mapping[str, Any] | None = None
    methods: tuple[str, ...] = ()
    broadcast_buffers: bool = True
    world: World = attrs.field(factory=World)

    def __attrs_post_init__(self) -> None:
        _check(self)

    def __repr__(self) -> str:
        fields = [f for f in attrs.fields(Sharded) if f.name != "world" and getattr(self, f.name) != f.default]
        given = [repr(getattr(self, f.name)) if f.name == "mesh" else f"{f.name}={getattr(self, f.name)!r}" for f in fields]
        return f"fsdp({', '.join(given)})"

    @property
    def everyone(self) -> World:
        """All processes."""
        return world()

    @property
    def writes(self) -> bool:
        """Whether this process writes files and logs."""
        return world().rank == 0

    @property
    def lockstep(self) -> bool:
        """Whether all ranks must make the same number of forward passes."""
        return True

    @property
    def cuts(self) -> bool:
        """Whether parameters are sharded."""
        return True

    def place(self, module: nn.Module) -> "Sharded | None":
        """Shard a module; None where this process is alone."""
        if not isinstance(module, nn.Module):
            raise ParallelError(
                f"this placement shards a model before its optimizer is built, but got a {type(module).__name__}; give it to "
                "fl.TrainState.create(task, place=...), and load a checkpoint into that state with fl.restore(path, like=state)"
            )
        here, named = world(), named_world(os.environ)
        if here.size == 1 and named.size > 1:
            raise ParallelError(
                f"this process is rank {named.rank} of {named.size}, but has not joined the other ranks; write `with fl.parallel.join():` around "
                "the code that creates and trains the state"
            )
        if not (distributed.is_available() and distributed.is_initialized()):
            _refuse_alone(self)
            return None
        cut = [name for name, p in module.named_parameters() if is_sharded(p)]
        if cut:
            raise ParallelError(f"the model is sharded already, e.g. {cut[0]}; give fl.Task the plain model: the placement shards it")
        hooks = hooked(module)
        if hooks:
            raise ParallelError(
                f"the gradient of {hooks[0]} has a hook, which a sharded parameter loses; change gradients in a combinator after grad() instead"
            )
        missing = [name for name in self.methods if not callable(getattr(module, name, None))]
        if missing:
            raise ParallelError(f"fsdp(methods={missing}): {type(module).__name__} has no such method")
        mesh = made_mesh(self.mesh, module)
        check_devices(module, mesh)
        placed = attrs.evolve(self, mesh=mesh, world=data_world(mesh))
        if self.tensor_parallel is not None:
            cut_layers(module, mesh, self.tensor_parallel)
        meet(module, here.size // placed.world.size)
        placed._cut(module)
        placed._materialise(module)
        return placed

    def _materialise(self, module: nn.Module) -> None:
        """Allocate the shards of a model on the meta device, filled with NaN: a checkpoint is loaded into them."""
        if not any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            return
        kept = module.state_dict(keep_vars=True)
        derived = [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in kept]
        if derived:
            raise ParallelError(
                f"the model is on the meta device, but no checkpoint has its buffers {derived[:5]}; create these on a real device"
            )

        def made(t: Tensor) -> Tensor:
            return torch.full_like(t, torch.nan if t.is_floating_point() else 0, device=self._home) if t.is_meta else t

        with torch.no_grad():
            replace_tensors(module, made)

    def _cut(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = data_mesh(self.mesh)
        options = {
            "mesh": mesh,
            "reshard_after_forward": self.reshard,
            "mp_policy": precision_policy(self.mixed_precision),
            "offload_policy": offload_policy(self.offload),
        }
        for inner in chosen(module, self.policy):
            fully_shard(inner, **options)
        fully_shard(module, **options)
        for name in self.methods:
            register_fsdp_forward_method(module, name)

    @property
    def _home(self) -> str:
        """The device of the shards."""
        return self.mesh.device_type if self.offload is False else "cpu"

    def begin(self, store: Any, last: bool) -> None:
        """Called before each batch: gradients are reduced only after the last one."""
        bound = self._bound(store)
        if bound.sync is not last:
            store.module.set_requires_gradient_sync(last)
            bound.sync = last
        self.sync(store)

    def sync(self, store: Any) -> None:
        """Send the buffers of rank 0, such as the statistics of BatchNorm, to all ranks."""
        buffers = self._bound(store).buffers
        if buffers:
            group: Any = self.world.group or distributed.group.WORLD
            broadcast_each(buffers, group)

    def _bound(self, store: Any) -> "_Bound":
        if store.bound is None:
            if store.optim.closure:
                raise ParallelError(
                    f"{type(store.optim.optimizer).__name__} needs all gradients as one flat tensor, but a rank holds only shards; train with "
                    "fl.parallel.ddp(), or use another optimizer"
                )
            if store.optim.create_graph:
                raise ParallelError(
                    f"{type(store.optim.optimizer).__name__} needs gradients of gradients, which sharded parameters do not have; train in one "
                    "process, or use another optimizer"
                )
            store.bound = _Bound(True, _kept_buffers(store.module) if self.broadcast_buffers and self.world.size > 1 else [])
        return store.bound

    def loss(self, store: Any, fn: Any, batch: Any) -> Any:
        """Call a loss function on the live module."""
        try:
            return fn(store.module, batch)
        except (RuntimeError, AssertionError) as error:
            if "mixed torch.Tensor and DTensor" in str(error):
                raise StepError(
                    "the loss function computes with sharded parameters that were not gathered: call the model itself, model(x), not a part "
                    "of it; or name the methods of the model that the loss function calls, as in fl.parallel.fsdp(methods=['encode'])"
                ) from error
            raise

    def finish(self, store: Any, found: Gradients) -> Gradients:  # noqa: ARG002  # of the contract
        """Called after the last batch: every rank has its shard of all gradients."""
        return found

    def mean_weight(self, found: Gradients) -> Any:
        """The mean over ranks of the weight."""
        if found.plain:
            return found.weight
        mean = torch.as_tensor(found.weight).detach().float().clone()
        distributed.all_reduce(mean, group=self.world.group)
        return mean / self.world.size

    def norms(self, values: Sequence[Tensor]) -> Tensor:
        """The 2-norm of each value, over all of its shards, shape [values]."""
        return norms(values)

    def norm(self, values: list[Tensor]) -> Tensor:
        """The joint 2-norm, over all shards."""
        return torch.linalg.vector_norm(norms(values))

    def unit_norms(self, tensor: Tensor) -> Tensor:
        """The 2-norm of each unit, in a shape that broadcasts against the local shard."""
        return unit_norms(tensor)

    def anywhere(self, flag: Tensor) -> Tensor:
        """The largest of the numbers that the ranks computed from their shards."""
        found = flag.detach().clone()
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return found

    def full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors, on every rank."""
        return {name: _whole(t) for name, t in tensors.items()}

    def apart(self, store: Any, done: Callable[[], bool]) -> None:
        """No rank has the whole model, so none can compute alone."""

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest of the numbers that the ranks give."""
        held = torch.tensor(number, device=device)
        distributed.all_reduce(held, distributed.ReduceOp.MIN)
        return int(held)

    def rest(self, module: nn.Module) -> None:
        """Free gathered parameters, which stay allocated after a forward pass without a backward pass."""
        for inner in _fsdp_modules(module):
            inner.reshard()

    def copy(self, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """An independent module that is sharded in the same way."""
        self.rest(module)
        found = dict(module.named_parameters())
        memo[id(self.mesh)] = self.mesh
        twin = stripped_copy(module, memo, lambda p: nn.Parameter(_hollow(p, self.mesh), p.requires_grad), self.methods)
        self._cut(twin)
        with torch.no_grad():
            replace_tensors(twin, lambda t: torch.empty_like(t, device=self._home) if t.is_meta else t)
            for name, p in twin.named_parameters():
                local(p).copy_(local(found[name]))
                memo[id(found[name])] = p
        return twin

    def plain(self, module: nn.Module) -> nn.Module:
        """An unsharded copy of the module, which needs no other process; all ranks must call this at the same time."""
        self.rest(module)
        wholes = {id(p): nn.Parameter(_whole(p.detach()), p.requires_grad) for p in module.parameters()}
        return stripped_copy(module, {id(self.mesh): self.mesh}, lambda p: wholes[id(p)], self.methods, all_hooks=True)


@attrs.define(eq=False)
class _Bound:
    """What a store holds: whether gradients are reduced after the next backward pass, and the buffers that are broadcast."""

    sync: bool
    buffers: list[Tensor]


def _check(given: Sharded) -> None:
    dtype_of(given.mixed_precision)
    check_offload(given.offload)
    if given.reshard is not None and not isinstance(given.reshard, int):
        raise ConfigError(
            f"fsdp(reshard=...) must be True, False, a number of ranks, or None for torch's choice, but got {given.reshard!r}"
        )
    policy = given.policy
    if not (policy is None or callable(policy) or (isinstance(policy, tuple) and all(isinstance(kind, type) for kind in policy))):
        raise ConfigError(f"fsdp(policy=...) must be a tuple of classes, or a function of name and module, but got {policy!r}")
    if given.tensor_parallel is not None and not isinstance(given.tensor_parallel, Mapping):
        raise ConfigError(f"fsdp(tensor_parallel=...) must map names of modules to styles, but got {type(given.tensor_parallel).__name__}")


def _refuse_alone(given: Sharded) -> None:
    special = [name for name in ("mesh", "mixed_precision", "offload", "tensor_parallel") if getattr(given, name)]
    if special:
        raise ParallelError(
            f"{given!r} sets {', '.join(f'{name}=' for name in special)}, but this process is alone and shards nothing; start the script with "
            "`torchrun --nproc-per-node=2 script.py` and create the state within `with fl.parallel.join():`, or leave place= out"
        )


def _fsdp_modules(module: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [inner for inner in module.modules() if isinstance(inner, FSDPModule)]


def _kept_buffers(module: nn.Module) -> list[Tensor]:
    """The buffers of the ``state_dict``; other buffers are computed from constants and the same on all ranks."""
    kept = module.state_dict(keep_vars=True)
    return [buffer for name, buffer in module.named_buffers() if name in kept and not is_sharded(buffer)]


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _hollow(p: Any, mesh: Any) -> Tensor:
    """A parameter on the meta device, in the shape that it had before it was sharded for data parallel."""
    whole = torch.empty(p.shape, dtype=p.dtype, device="meta")
    if TENSOR not in (p.device_mesh.mesh_dim_names or ()):
        return whole
    from torch.distributed.tensor import DTensor

    across, placement = mesh[TENSOR], p.placements[-1]
    steps = [(placement.dim, across.size(), across.get_local_rank())] if cuts([placement]) else []
    part = torch.empty(box_of(p.shape, steps)[1], dtype=p.dtype, device="meta")
    return DTensor.from_local(part, across, [placement], run_check=False, shape=p.shape, stride=whole.stride())
