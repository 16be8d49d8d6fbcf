"""What a model is made of, as a table: names, types, parameters, output shapes and modes."""

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fnlight.errors import ConfigError
from fnlight.state import Task, TrainState
from fnlight.tensors import isolated, leaves, map_tensors

_SHAPES = 3  # tensors of one output whose shapes are listed


@attrs.frozen
class ModuleRow:
    """One module of a `ModelSummary`.

    Args:
        name: Its qualified name; empty for the model itself.
        type: Its class.
        trainable: Trainable parameters in it and below it that no row above counted elsewhere.
        frozen: The same for parameters that are not trained.
        shared: Parameters in it that are counted at another module, as they are tied to it.
        training: True in train mode.
        output: The shapes of what it returned; None where it was not called, or no batch was given.
        lazy: True if it holds parameters that have no shape yet.

    Example:
        >>> summary(nn.Linear(2, 1)).rows[0].trainable
        3
    """

    name: str
    type: str
    trainable: int
    frozen: int
    shared: int
    training: bool
    output: str | None = None
    lazy: bool = False

    def cells(self) -> tuple[str, str, str, str, str]:
        """Its row of the table, as text."""
        parts = [f"{self.trainable:,}"] if self.trainable or not self.frozen else []
        parts += [f"{self.frozen:,} frozen"] if self.frozen else []
        parts += [f"({self.shared:,} shared)"] if self.shared else []
        parts += ["+ lazy"] if self.lazy else []
        return self.name or "(model)", self.type, " ".join(parts), self.output or "-", "train" if self.training else "eval"


@attrs.frozen
class ModelSummary:
    """What `summary` found; it prints as a table, and prettier with ``rich.print``.

    Args:
        rows: One a module, down to the depth that was asked for; the model itself comes first.
        trainable: Parameters that are trained; tied ones count once.
        frozen: Parameters that are not.
        buffers: Numbers in buffers.
        num_bytes: Size of parameters and buffers in bytes.
        ran: True if a batch went through the model, so that output shapes are known.

    Example:
        >>> print(summary(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.zeros(2, 4)))
        name     type        parameters  output  mode
        (model)  Sequential          40  [2, 8]  train
        0        Linear              40  [2, 8]  train
        1        ReLU                 0  [2, 8]  train
        <BLANKLINE>
        40 parameters: 40 trainable, 0 frozen; 0 in buffers; 0.00016 MB
    """

    rows: tuple[ModuleRow, ...]
    trainable: int
    frozen: int
    buffers: int
    num_bytes: int
    ran: bool

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.trainable + self.frozen

    @property
    def megabytes(self) -> float:
        """The size of parameters and buffers in MB, which are 1,000,000 bytes."""
        return self.num_bytes / 1e6

    def _totals(self) -> str:
        size = f"{self.megabytes:,.1f}" if self.megabytes >= 100 else f"{self.megabytes:.3g}"
        counts = f"{self.parameters:,} parameters: {self.trainable:,} trainable, {self.frozen:,} frozen"
        return f"{counts}; {self.buffers:,} in buffers; {size} MB"

    def _columns(self) -> list[tuple[str, ...]]:
        columns = list(zip(("name", "type", "parameters", "output", "mode"), *(row.cells() for row in self.rows), strict=True))
        return columns if self.ran else [column for column in columns if column[0] != "output"]

    def __str__(self) -> str:
        columns = self._columns()
        widths = [max(map(len, column)) for column in columns]
        adjust = [str.rjust if column[0] == "parameters" else str.ljust for column in columns]
        lines = [
            "  ".join(fit(cell, width) for fit, cell, width in zip(adjust, cells, widths, strict=True))
            for cells in zip(*columns, strict=True)
        ]
        return "\n".join([*(line.rstrip() for line in lines), "", self._totals()])

    def __rich__(self) -> Any:
        from rich import box  # heavy, for rich.print only
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD)
        columns = self._columns()
        for header, *_ in columns:
            table.add_column(header, justify="right" if header == "parameters" else "left", overflow="fold")
        for cells, row in zip(list(zip(*columns, strict=True))[1:], self.rows, strict=True):
            table.add_row(*map(Text, cells), style="dim" if row.frozen and not row.trainable else "")
        return Group(table, Text(self._totals()))


def summary(model: Task | TrainState | nn.Module, batch: Any = None, *, depth: int = 2) -> ModelSummary:
    """Summarise a model: a row a module with its parameters and mode, and, given a batch, the shapes of its outputs.

    The batch goes through a copy of the model in eval mode, without gradients: nothing of the caller's changes.

    Args:
        model: A task, a state or a module.
        batch: None, or a batch: what the task's `predict_step` takes (or else its `eval_step`, or else its `train_step`); a module
            is called with it.
        depth: How many dots deep modules are listed; what lies deeper is counted in the last one listed. 0 lists the model alone.

    Returns:
        The summary; ``print`` shows the table.

    Raises:
        ConfigError: If the depth is no number of at least 0.
        TypeError: If it is no task, state or module.
        DonatedStateError: If the state was given to a later step.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2).requires_grad_(False))
        >>> print(summary(model, depth=1))
        name     type         parameters  mode
        (model)  Sequential  40 18 frozen  train
        0        Linear               40  train
        1        Linear        18 frozen  train
        <BLANKLINE>
        58 parameters: 40 trainable, 18 frozen; 0 in buffers; 0.000232 MB
    """
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
        raise ConfigError(f"summary(depth=...) must be a whole number of at least 0, but got {depth!r}")
    module, name, forward = _parts(model)
    modes = {path: part.training for path, part in module.named_modules(remove_duplicate=False) if _level(path) <= depth}
    outputs: dict[str, str] = {}
    if batch is not None:
        module, outputs = _shapes(module, name, forward, batch=batch, paths=modes)
    seen: dict[int, str] = {}  # parameters by the module that counts them, outermost module first
    rows = [_row(path, module.get_submodule(path), modes[path], output=outputs.get(path), seen=seen) for path in modes]
    params = list(module.parameters())
    buffers = list(module.buffers())
    return ModelSummary(
        rows=tuple(rows),
        trainable=_count(p for p in params if p.requires_grad),
        frozen=_count(p for p in params if not p.requires_grad),
        buffers=_count(buffers),
        num_bytes=sum(t.numel() * t.element_size() for t in (*params, *buffers) if not is_lazy(t)),
        ran=batch is not None,
    )


def _parts(model: Any) -> tuple[nn.Module, str, Callable[[Any, Any], Any]]:
    """The module, and the function of a module and a batch that uses it, with its name."""
    if isinstance(model, nn.Module):
        return model, "the module", lambda module, batch: module(batch)
    if not isinstance(model, Task | TrainState):
        raise TypeError(f"summary takes a Task, a TrainState or an nn.Module, but got {type(model).__name__}: {model!r:.60}")
    module = model.model if isinstance(model, Task) else model.live.module
    task = model if isinstance(model, Task) else model.task
    name, forward = next(
        (name, getattr(task, name)) for name in ("predict_step", "eval_step", "train_step") if getattr(task, name) is not None
    )
    return module, name, forward


def _level(path: str) -> int:
    return path.count(".") + 1 if path else 0


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors if not is_lazy(t))


def _shapes(
    module: nn.Module, name: str, forward: Callable[[Any, Any], Any], batch: Any, paths: Iterable[str]
) -> tuple[nn.Module, dict[str, str]]:
    """Run a copy of the module on a copy of the batch; give the copy and the shapes of what each part returned first."""
    found: dict[str, str] = {}
    first = next((t for t in (*module.parameters(), *module.buffers())), None)
    device = torch.device("cpu") if first is None else first.device
    with isolated(device), torch.no_grad(), ExitStack() as hooks:
        module = copy.deepcopy(module).eval()
        batch = map_tensors(lambda t: t.detach().to(device, copy=True), batch)
        for path in paths:
            handle = module.get_submodule(path).register_forward_hook(_noting(found, path))
            hooks.callback(handle.remove)
        try:
            forward(module, batch)
        except Exception as error:
            error.add_note(
                f"this happened when summary(...) ran {name} on the batch; leave the batch out for a table without output shapes"
            )
            raise
    return module, found


def _noting(found: dict[str, str], path: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        found.setdefault(path, _shape(output))

    return hook


def _shape(output: Any) -> str:
    shapes = [str(list(leaf.shape)) for _, leaf in leaves(output) if isinstance(leaf, Tensor)]
    if not shapes:
        return type(output).__name__
    return ", ".join(shapes[:_SHAPES]) + (", ..." if len(shapes) > _SHAPES else "")


def _row(path: str, module: nn.Module, training: bool, output: str | None, seen: dict[int, str]) -> ModuleRow:
    params = list(module.parameters())
    own, shared = list[Tensor](), list[Tensor]()
    for p in params:
        (own if _counts(seen, p, path) else shared).append(p)
    lazy = any(is_lazy(p) for p in params)
    return ModuleRow(
        name=path, type=type(module).__name__, trainable=_count(p for p in own if p.requires_grad), frozen=_count(p for p in own if not p.requires_grad),
        shared=_count(shared), training=training, output=output, lazy=lazy,
    )  # fmt: skip


def _counts(seen: dict[int, str], param: Tensor, path: str) -> bool:
    """Say whether this module counts the parameter: it, or a module around it, came first."""
    counted = seen.get(id(param))
    if not counted or path.startswith(f"{counted}."):
        seen[id(param)] = path
        return True
    return False
