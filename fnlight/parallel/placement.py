"""The protocol of a placement: how tensors are distributed over processes, and how gradients are reduced."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fnlight.parallel.world import World
from fnlight.protocols import Gradients


class Placement(Protocol):
    """A frozen value given to ``TrainState.create(task, place=...)`` and kept as ``store.place``; None where a process is alone.

    What it makes for one store (buckets, hooks) it keeps as ``store.bound``, which is never copied or saved. All ranks must call each method
    at the same time.

    For a group of batches, `begin` and `loss` are called for each of them, then `finish`. The gradients that `finish` returns are **means over
    ranks of the ranks' sums**; divided by `mean_weight` they are exact, however samples or tokens are distributed.
    """

    @property
    def world(self) -> World:
        """The ranks that have different data: processes that share one part of a batch (tensor parallel) have the same rank here."""
        ...

    @property
    def everyone(self) -> World:
        """All processes, including those that share one part of a batch."""
        ...

    @property
    def writes(self) -> bool:
        """Whether this process writes files and logs; exactly one does."""
        ...

    @property
    def lockstep(self) -> bool:
        """Whether a forward pass communicates between ranks, so that all ranks must make the same number of them."""
        ...

    @property
    def cuts(self) -> bool:
        """Whether parameters are sharded, which must be done before their optimizer is built."""
        ...

    def place(self, module: nn.Module) -> "Placement | None":
        """Place a module, in place, before its optimizer is built; returns what the store keeps: None if nothing is to be done later."""
        ...

    def sync(self, store: Any) -> None:
        """Called before an evaluation: makes equal what each rank has changed independently, such as the statistics of BatchNorm."""
        ...

    def begin(self, store: Any, last: bool) -> None:
        """Called before each batch of a group: only the backward pass of the last one needs to reduce gradients."""
        ...

    def loss(self, store: Any, fn: Any, batch: Any) -> Any:
        """Call a loss function on the store's live module."""
        ...

    def finish(self, store: Any, found: Gradients) -> Gradients:
        """Called after a group: returns gradients that are the same on all ranks, or each rank's shards of them."""
        ...

    def mean_weight(self, found: Gradients) -> Any:
        """The mean over ranks of the weight; plain losses have the same weight on all ranks and need no communication."""
        ...

    def norm(self, values: list[Tensor]) -> Tensor:
        """The joint 2-norm of gradients, over all shards, shape []."""
        ...

    def norms(self, values: Sequence[Tensor]) -> Tensor:
        """The 2-norm of each gradient, over all of its shards, shape [values]."""
        ...

    def unit_norms(self, tensor: Tensor) -> Tensor:
        """The 2-norm of each row of a tensor, or of a vector as one, over all shards, in a shape that broadcasts against the local shard."""
        ...

    def anywhere(self, flag: Tensor) -> Tensor:
        """The largest value, over all processes, of a number that each has computed from its shards; without shards it is the same on all."""
        ...

    def apart(self, store: Any, done: Callable[[], bool]) -> "Any | None":
        """The placement for an attempt that may fail on one rank; None if every forward pass communicates between ranks.

        Ranks work apart, and come together where `done` says so on all of them.
        """
        ...

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest of the numbers that the ranks give."""
        ...

    def rest(self, module: nn.Module) -> None:
        """Free the parameters that a forward pass without a backward pass has gathered."""
        ...

    def copy(self, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """An independent module with the same placement; `memo` is that of ``copy.deepcopy``, and maps its parameters to those of the copy."""
        ...

    def plain(self, module: nn.Module) -> nn.Module:
        """A copy with whole parameters, which needs no other process."""
        ...

    def full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, for saving where no shards are written; tensors that are whole already are not copied."""
        ...
