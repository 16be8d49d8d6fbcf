"""BatchNorm over the samples of all ranks: torch's ``SyncBatchNorm`` on accelerators, and the same on the CPU, where torch has none."""

from typing import Any

import torch
from torch import Tensor, distributed, nn

from fnlight.errors import ParallelError, check_type
from fnlight.tensors import BATCH_NORMS, BatchNorm


class SyncedNorm(BatchNorm):
    """BatchNorm that computes its training statistics over the samples of all ranks, on every device; made by `sync_batchnorm`.

    Args:
        num_features: Channels, the second dimension of the input.
        **options: Those of ``torch.nn.BatchNorm1d``.

    Attributes:
        counts_samples: Whether samples of this rank count; False for a zero-weight dummy batch, see `fnlight.data.Part`.
        alike: How many ranks have the same samples, as with tensor parallel.

    Example:
        >>> SyncedNorm(2)(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).round().tolist()  # alone it is BatchNorm
        [[-1.0, -1.0], [1.0, 1.0]]
    """

    counts_samples = True
    alike = 1

    def forward(self, input: Tensor) -> Tensor:
        """Normalize.

        Args:
            input: Shape [samples, channels, ...].
        """
        if not self.training or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return BatchNorm.forward(self, input)
        self._check_input_dim(input)
        x = input
        wide = x if x.dtype == torch.float64 else x.float()
        over = [d for d in range(x.dim()) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        # in two passes, as on one process: the mean of squares less the square of the mean would lose digits
        here = wide.new_full((1,), x.numel() / x.shape[1])
        total, count = _total(torch.cat([wide.sum(over), here]) * self.counts_samples).split([x.shape[1], 1])
        if float(count.detach()) <= self.alike:
            raise ValueError(
                f"BatchNorm needs more than one value per channel in training, but all ranks together have only one; this rank's input has shape "
                f"{list(x.shape)}; make the batches larger"
            )
        mean = total / count
        apart = wide - mean.view(shape)
        var = _total(apart.square().sum(over) * self.counts_samples) / count
        self._track(mean.detach(), var.detach(), count.detach() / self.alike)
        found = apart * (var + self.eps).rsqrt().view(shape)
        found = found if self.weight is None else found * self.weight.view(shape)
        return (found if self.bias is None else found + self.bias.view(shape)).to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm takes an input of shape [samples, channels, ...], but got {list(input.shape)}")

    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Update the running statistics, with the unbiased variance."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), share)


class _Total(torch.autograd.Function):
    """A differentiable all-reduce sum: each rank gets the summed gradients of all ranks. Torch's own is deprecated."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:  # noqa: ARG004  # of the contract
        whole = part.clone()
        distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004  # of the contract
        whole = grads[0].contiguous().clone()
        distributed.all_reduce(whole)
        return whole


def _total(part: Tensor) -> Tensor:
    found: Any = _Total.apply(part)
    return found


def sync_batchnorm(module: nn.Module) -> nn.Module:
    """Make every BatchNorm of a module use the samples of all ranks, in place; parameters, buffers and hooks are unchanged.

    `fnlight.parallel.ddp(sync_batchnorm=True)` does this for the model of a state. For `fnlight.parallel.fsdp`, call this function on the model
    before the task is created.

    Args:
        module: Any module, or a BatchNorm itself.

    Returns:
        The same module. On an accelerator it uses torch's own ``SyncBatchNorm``.

    Example:
        >>> type(sync_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))[1]).__name__
        'SyncedNorm'
    """
    check_type("sync_batchnorm(module)", module, nn.Module, "an nn.Module")
    for each in module.modules():
        if isinstance(each, BATCH_NORMS):
            vars(each)["process_group"] = None  # of torch's own: all ranks
            each.__class__ = SyncedNorm if _on_cpu(each) else nn.SyncBatchNorm
    return module


def _on_cpu(module: nn.Module) -> bool:
    return all(t.device.type == "cpu" for t in (*module.parameters(), *module.buffers()))


def meet(module: nn.Module, alike: int = 1) -> None:
    """Set up every synchronized BatchNorm for the ranks of this run; on the CPU torch's ``SyncBatchNorm`` becomes a `SyncedNorm`.

    Args:
        module: Any module, which is changed.
        alike: How many ranks have the same samples.

    Raises:
        ParallelError: If a ``SyncBatchNorm`` on the CPU is for a subgroup of the ranks.

    Example:
        >>> norm = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(1))
        >>> meet(norm, alike=2)
        >>> type(norm).__name__, norm.alike
        ('SyncedNorm', 2)
    """
    for name, each in module.named_modules():
        if isinstance(each, nn.SyncBatchNorm) and _on_cpu(each):
            if each.process_group not in (None, distributed.group.WORLD):
                raise ParallelError(
                    f"{name!r} is a SyncBatchNorm for a subgroup of the ranks; on CPUs torch has no SyncBatchNorm, and fnlight's works only over all "
                    "ranks; use a plain BatchNorm in the model and fl.parallel.ddp(sync_batchnorm=True)"
                )
            each.__class__ = SyncedNorm  # it has the same fields
        if isinstance(each, SyncedNorm):
            each.alike = alike


def is_synced(module: nn.Module) -> bool:
    """Whether a module contains a BatchNorm that is synchronized over ranks.

    Args:
        module: Any module.

    Returns:
        True if there is one.

    Example:
        >>> is_synced(nn.BatchNorm1d(1)), is_synced(sync_batchnorm(nn.BatchNorm1d(1)))
        (False, True)
    """
    return any(isinstance(m, SyncedNorm | nn.SyncBatchNorm) for m in module.modules())
