"""Data parallel: every rank holds the whole model, and torch's ``DistributedDataParallel`` averages gradients during the backward pass."""

import os
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fnlight.errors import ConfigError, ParallelError, StepError, check_type
from fnlight.metrics import Mean
from fnlight.parallel.batchnorm import is_synced, meet
from fnlight.parallel.batchnorm import sync_batchnorm as synced
from fnlight.parallel.deferred_allreduce import Apart
from fnlight.parallel.world import World, named_world, world
from fnlight.protocols import Gradients
from fnlight.state import copied
from fnlight.tensors import foreach_norm, remove_reducer_hooks

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def ddp(
    *,
    bucket_cap_mb: float | None = None,
    find_unused_parameters: bool = False,
    gradient_as_bucket_view: bool = True,
    static_graph: bool = False,
    broadcast_buffers: bool = True,
    comm_hook: Any = None,
    sync_batchnorm: bool = False,
) -> "Replicated":
    """Every rank holds the whole model; gradients are averaged over ranks during the backward pass.

    The options are those of ``torch.nn.parallel.DistributedDataParallel``.

    Args:
        bucket_cap_mb: Megabytes of gradients that are sent in one bucket; None takes torch's 25.
        find_unused_parameters: True searches in every step for parameters that the loss does not depend on.
        gradient_as_bucket_view: True makes gradients views of the buckets, which saves a copy.
        static_graph: True promises that every step uses the same parameters in the same way.
        broadcast_buffers: True sends the buffers of rank 0, such as the statistics of BatchNorm, to all ranks before each step.
        comm_hook: How a bucket is sent: ``"bf16"`` or ``"fp16"`` halves the traffic; or a hook of torch, which takes a state (None) and a bucket
            and returns the mean.
        sync_batchnorm: True makes BatchNorm compute its statistics over the samples of all ranks, as on one process. It costs two more
            messages per layer in the forward and in the backward pass.

    Returns:
        A placement.

    Raises:
        ConfigError: If an option is not valid.

    Example:
        >>> ddp(bucket_cap_mb=10)
        ddp(bucket_cap_mb=10)
    """
    check_type("ddp(bucket_cap_mb=...)", bucket_cap_mb, int | float | None, "megabytes above 0, or None for torch's own")
    if bucket_cap_mb is not None and not bucket_cap_mb > 0:
        raise ConfigError(f"ddp(bucket_cap_mb=...) must be megabytes above 0, or None for torch's own, but got {bucket_cap_mb!r}")
    if comm_hook is not None and comm_hook not in _HALVES and not callable(comm_hook):
        raise ConfigError(
            f"ddp(comm_hook=...) must be one of {', '.join(map(repr, _HALVES))}, a hook of torch, or None, but got {comm_hook!r}"
        )
    options = {
        "bucket_cap_mb": bucket_cap_mb, "find_unused_parameters": find_unused_parameters, "gradient_as_bucket_view": gradient_as_bucket_view,
        "static_graph": static_graph, "broadcast_buffers": broadcast_buffers,
    }  # fmt: skip
    return Replicated(options, comm_hook, sync_batchnorm)


@attrs.frozen(eq=False, repr=False)
class Replicated:
    """The placement that `ddp` returns; `Placement` documents its methods.

    Args:
        options: What ``DistributedDataParallel`` is given.
        comm_hook: How a bucket is sent; None sends it unchanged.
        sync_batchnorm: Whether BatchNorm uses the samples of all ranks.

    Example:
        >>> Replicated({}).place(nn.Linear(1, 1)) is None  # alone there is nothing to do
        True
    """

    options: Mapping[str, Any]
    comm_hook: Any = None
    sync_batchnorm: bool = False

    def __repr__(self) -> str:
        defaults = ddp.__kwdefaults__ or {}
        given = {**self.options, "comm_hook": self.comm_hook, "sync_batchnorm": self.sync_batchnorm}
        return f"ddp({', '.join(f'{name}={value!r}' for name, value in given.items() if value != defaults.get(name))})"

    @property
    def world(self) -> World:
        """All processes."""
        return world()

    @property
    def everyone(self) -> World:
        """All processes."""
        return world()

    @property
    def writes(self) -> bool:
        """Whether this process writes files and logs."""
        return self.world.rank == 0

    @property
    def lockstep(self) -> bool:
        """Whether all ranks must make the same number of forward passes."""
        return self.sync_batchnorm

    @property
    def cuts(self) -> bool:
        """Whether parameters are sharded."""
        return False

    def place(self, module: nn.Module) -> "Replicated | None":
        """Send the tensors of rank 0 to all ranks; None where this process is alone."""
        here, named = self.world, named_world(os.environ)
        if here.size == 1 and named.size > 1:
            raise ParallelError(
                f"this process is rank {named.rank} of {named.size}, but has not joined the other ranks; write `with fl.parallel.join():` around "
                "the code that creates and trains the state, or leave place= out: fit then joins and places it"
            )
        devices = {p.device for p in module.parameters()}
        if here.size > 1 and len(devices) > 1:
            raise ParallelError(
                f"ddp needs the model on one device per rank, but it is on {sorted(map(str, devices))}; move it to one of them"
            )
        if here.size == 1:
            return None
        if self.sync_batchnorm:
            synced(module)
        meet(module)
        for tensor in (*module.parameters(), *module.buffers()):
            distributed.broadcast(tensor.detach(), 0)
        return attrs.evolve(self, sync_batchnorm=is_synced(module))

    def sync(self, store: Any) -> None:
        """Send the buffers of rank 0 to all ranks, which have changed theirs independently."""
        for buffer in store.module.buffers():
            distributed.broadcast(buffer, 0)

    def begin(self, store: Any, last: bool) -> None:
        """Called before each batch: gradients are sent only after the last one."""
        bound: _Bound | None = store.bound
        held = [id(p) for p in store.params]
        if bound is None or bound.held != held:
            bound = store.bound = self._bind(store, held)
        bound.ddp.require_backward_grad_sync = last

    def _bind(self, store: Any, held: list[int]) -> "_Bound":
        """Wrap the module for the parameters that are trained now, which may change from epoch to epoch."""
        if store.bound is not None:
            remove_reducer_hooks(store.bound.ddp)
        if store.optim.create_graph:
            raise ParallelError(
                f"{type(store.optim.optimizer).__name__} needs gradients of gradients, which cannot be averaged over ranks; train in one process, "
                "or use another optimizer"
            )
        wrapped = DistributedDataParallel(_Loss(store.module), init_sync=False, **_of_torch(self.options))
        if self.comm_hook is not None:
            own = not callable(self.comm_hook)
            wrapped.register_comm_hook(_HALVES[self.comm_hook] if own else None, _halved if own else self.comm_hook)
        return _Bound(wrapped, held)

    def loss(self, store: Any, fn: Any, batch: Any) -> Any:
        """Call a loss function on the live module, within torch's wrapper."""
        total, rest = store.bound.ddp(fn, batch)
        out = Mean(total, rest.out.weight) if rest.out.__class__ is Mean else total
        return out if rest.metrics is None else (out, rest.metrics)

    def finish(self, store: Any, found: Gradients) -> Gradients:
        """Called after the last batch: gradients are averaged, if every parameter had one."""
        options = self.options
        if any(v is None for v in found.values) and not (options["find_unused_parameters"] or options["static_graph"]):
            raise StepError(_unused(store, found))
        return found

    def mean_weight(self, found: Gradients) -> Any:
        """The mean over ranks of the weight."""
        return found.weight if found.plain else self.world.mean(found.weight)[0]

    def norm(self, values: list[Tensor]) -> Tensor:
        """The joint 2-norm."""
        return torch.nn.utils.get_total_norm(values)

    def norms(self, values: Sequence[Tensor]) -> Tensor:
        """The 2-norm of each."""
        return torch.stack([n.float() for n in foreach_norm(list(values))])

    def unit_norms(self, tensor: Tensor) -> Tensor:
        """The 2-norm of each unit."""
        return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())), keepdim=True) if tensor.dim() > 1 else tensor.norm()

    def anywhere(self, flag: Tensor) -> Tensor:
        """Every rank has seen all of the gradients."""
        return flag

    def apart(self, store: Any, done: Callable[[], bool]) -> Apart | None:
        """Each rank holds the whole model, so each may compute alone: torch's wrapper is not used until the gradients are averaged."""
        if self.sync_batchnorm:
            return None
        if store.bound is not None:
            remove_reducer_hooks(store.bound.ddp)
            store.bound = None
        if self.options["broadcast_buffers"]:
            for buffer in store.module.buffers():
                distributed.broadcast(buffer, 0)
        return Apart(self, done)

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest of the numbers that the ranks give."""
        held = torch.tensor(number, device=device)
        distributed.all_reduce(held, distributed.ReduceOp.MIN)
        return int(held)

    def rest(self, module: nn.Module) -> None:
        """Nothing to do: parameters are never gathered."""

    def copy(self, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """An independent module."""
        return copied(module, memo)

    def plain(self, module: nn.Module) -> nn.Module:
        """An independent module."""
        return copied(module)

    def full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every rank has the whole tensors."""
        return dict(tensors)


@attrs.frozen(eq=False, repr=False)
class _Rest:
    """What a loss function returned besides the loss tensor; not a container, so that torch does not search it for tensors."""

    out: Any
    metrics: Any


class _Bound(NamedTuple):
    """What a store holds: torch's wrapper, and the parameters that it was made for."""

    ddp: DistributedDataParallel
    held: list[int]


class _Loss(nn.Module):
    """A module whose forward pass calls the loss function on the live model; torch wraps it, so that hooks and buckets are torch's own."""

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.model = model

    def forward(self, fn: Any, batch: Any) -> tuple[Any, _Rest]:
        out, metrics = fn(self.model, batch), None
        if out.__class__ is tuple and len(out) == 2 and isinstance(out[1], Mapping):
            out, metrics = out
        return (out.total if out.__class__ is Mean else out), _Rest(out, metrics)


def _halved(dtype: torch.dtype, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The mean of a bucket over ranks, sent in 16 bits; torch's own hook works with NCCL only."""
    whole = bucket.buffer()
    sent = whole.to(dtype).div_(distributed.get_world_size())
    travelling: Any = distributed.all_reduce(sent, async_op=True)
    return travelling.get_future().then(lambda done: whole.copy_(done.value()[0]))


def _of_torch(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options under the names of the installed torch, which warns of old names; options at their default are left out."""
    given, known = dict(options), signature(DistributedDataParallel.__init__).parameters
    if "forward_sync_buffers" in known:
        given["forward_sync_buffers"] = given.pop("broadcast_buffers", True)
    return {name: value for name, value in given.items() if value != known[name].default}


def _unused(store: Any, found: Gradients) -> str:
    missing = {id(p) for p, v in zip(store.params, found.values, strict=True) if v is None}
    names = [name for name, p in store.named.items() if id(p) in missing]
    return (
        f"the loss does not depend on {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}, so the ranks would wait for "
        "these gradients, or train with different ones; remove these parameters from the model, freeze them (requires_grad=False), or use "
        "fl.parallel.ddp(find_unused_parameters=True), which searches the graph in every step"
    )
