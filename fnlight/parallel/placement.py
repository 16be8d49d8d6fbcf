"""What the rest of fnlight asks of a placement: how tensors lie on several processes, and how gradients come together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fnlight.parallel.world import World
from fnlight.protocols import Gradients


class Placement(Protocol):
    """A frozen value given to ``TrainState.create(task, place=...)`` and kept as ``store.place``; None where a process is alone.

    What it makes for one store (buckets, hooks) it keeps as ``store.bound``, which is never copied nor saved. All methods but `local` are called
    by all processes, at the same time.

    A group of batches goes: `begin` and `loss` for each of them, then `finish`. Gradients that come out of `finish` are **means over ranks of
    the ranks' sums**; divided by `mean_weight` they are exact, however samples or tokens are spread.
    """

    @property
    def world(self) -> World:
        """The ranks that have data of their own: those that share one part of a batch (tensor parallel) have one rank here."""
        ...

    @property
    def everyone(self) -> World:
        """All processes, those among them that share one part of a batch."""
        ...

    @property
    def writes(self) -> bool:
        """Whether this process writes files and logs; one of all does."""
        ...

    @property
    def lockstep(self) -> bool:
        """Whether a forward pass is one of all ranks, so that each must make as many."""
        ...

    @property
    def cuts(self) -> bool:
        """Whether parameters are cut up, which must be done before their optimizer is built."""
        ...

    def place(self, module: nn.Module) -> "Placement | None":
        """Place a module, in place, before its optimizer is built; what the store keeps is returned: None where nothing is to be done later."""
        ...

    def sync(self, store: Any) -> None:
        """Before an evaluation: what each rank has changed by itself, such as the statistics of BatchNorm, becomes the same for all."""
        ...

    def begin(self, store: Any, last: bool) -> None:
        """Before each batch of a group: only the backward pass of the last one need bring gradients together."""
        ...

    def loss(self, store: Any, fn: Any, batch: Any) -> Any:
        """Call a loss function on the store's live module."""
        ...

    def finish(self, store: Any, found: Gradients) -> Gradients:
        """After a group: gradients that are the same on all ranks, or each rank's shards of them."""
        ...

    def mean_weight(self, found: Gradients) -> Any:
        """The mean over ranks of the weight; that of plain losses is the same on all of them, and needs no communication."""
        ...

    def norm(self, values: list[Tensor]) -> Tensor:
        """The joint 2-norm of gradients, over all shards, shape []."""
        ...

    def norms(self, values: Sequence[Tensor]) -> Tensor:
        """The 2-norm of each gradient, over all of its shards, shape [values]."""
        ...

    def unit_norms(self, tensor: Tensor) -> Tensor:
        """The 2-norm of each row of a tensor, or of a vector as one, over all shards, in a shape that multiplies what lies here."""
        ...

    def anywhere(self, flag: Tensor) -> Tensor:
        """The largest value, over all processes, of a number that each has found in its shards; what is whole was seen by all."""
        ...

    def apart(self, store: Any, done: Callable[[], bool]) -> "Any | None":
        """What to take in its place for an attempt that may fail on one rank; None where ranks need each other in every forward pass.

        Ranks work apart, and come together where `done` says so on all of them.
        """
        ...

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest of the numbers that the ranks give."""
        ...

    def rest(self, module: nn.Module) -> None:
        """Free what a forward pass without a backward pass has brought together."""
        ...

    def copy(self, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """An independent module that is placed likewise; `memo` is that of ``copy.deepcopy``, and leads from its parameters to those of the copy."""
        ...

    def plain(self, module: nn.Module) -> nn.Module:
        """A copy with whole parameters, which needs no other process."""
        ...

    def full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, for saving where no shards are written; what is whole already is not copied."""
        ...
