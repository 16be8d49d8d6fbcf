"""A table of the modules of a model: names, types, parameters, output shapes and modes."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fnlight.errors import ConfigError
from fnlight.state import Task, TrainState, copied
from fnlight.tensors import isolated, leaves, map_tensors

_SHAPES = 3  # tensors of one output whose shapes are listed


@attrs.frozen
class ModuleRow:
    """One module of a `ModelSummary`.

    Args:
        name: The qualified name; empty for the model itself.
        type: The name of the class.
        trainable: Trainable parameters of the module and its submodules, without those that another module already counts.
        frozen: The same for frozen parameters.
        shared: Parameters that another module counts, because they are tied.
        training: True in train mode.
        output: The shapes of the output; None if the module was not called, or no batch was given.
        lazy: True if some parameters have no shape yet.

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
        """The cells of its row as text."""
        parts = [f"{self.trainable:,}"] if self.trainable or not self.frozen else []
        parts += [f"{self.frozen:,} frozen"] if self.frozen else []
        parts += [f"({self.shared:,} shared)"] if self.shared else []
        parts += ["+ lazy"] if self.lazy else []
        return self.name or "(model)", self.type, " ".join(parts), self.output or "-", "train" if self.training else "eval"


@attrs.frozen
class ModelSummary:
    """The result of `summary`; ``print`` shows a table, ``rich.print`` a formatted one.

    Args:
        rows: One row per module, down to the requested depth; the model itself comes first.
        trainable: Number of trainable parameters; tied ones count once.
        frozen: Number of frozen parameters.
        buffers: Number of elements in buffers.
        num_bytes: Size of parameters and buffers in bytes.
        ran: True if the model ran on a batch, so that output shapes are known.

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
        """Number of all parameters."""
        return self.trainable + self.frozen

    @property
    def megabytes(self) -> float:
        """The size of parameters and buffers in MB (1,000,000 bytes)."""
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
        from rich import box  # slow to import, needed by rich.print only
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
    """Summarise a model: one row per module with parameters and mode and, with a batch, output shapes.

    A copy of the model runs on the batch in eval mode, without gradients. The given model and batch do not change.

    Args:
        model: A task, a state or a module.
        batch: A batch for the first of `predict_step`, `eval_step` and `train_step` that the task has; a module is called with it.
            None: no output shapes.
        depth: The number of levels of submodules to list; deeper modules are counted in their listed parent. 0 lists only the model.

    Returns:
        The summary; ``print`` shows the table.

    Raises:
        ConfigError: If the depth is not a whole number of at least 0.
        TypeError: If `model` is not a task, state or module.
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
    seen: dict[int, str] = {}  # parameter id -> the module that counts it
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
    """The module, the name of the function that uses it, and that function of a module and a batch."""
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
    """Run a copy of the module on a copy of the batch; return the copy, and the shapes of each module's first output."""
    found: dict[str, str] = {}
    first = next((t for t in (*module.parameters(), *module.buffers())), None)
    device = torch.device("cpu") if first is None else first.device
    with isolated(device), torch.no_grad(), ExitStack() as hooks:
        module = copied(module).eval()
        batch = map_tensors(lambda t: t.detach().to(device, copy=True), batch)
        for path in paths:
            handle = module.get_submodule(path).register_forward_hook(_recorder(found, path))
            hooks.callback(handle.remove)
        try:
            forward(module, batch)
        except Exception as error:
            error.add_note(
                f"this error occurred when summary(...) ran {name} on the batch; leave the batch out for a table without output shapes"
            )
            raise
    return module, found


def _recorder(found: dict[str, str], path: str) -> Callable[..., None]:
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
    """Whether this module counts the parameter: it, or a parent module, was the first to have it."""
    counted = seen.get(id(param))
    if not counted or path.startswith(f"{counted}."):
        seen[id(param)] = path
        return True
    return False
