"""Weights by name: the differences between a module and a file, and loading a plain safetensors file."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fnlight.checkpoint.bucket import Bucket
from fnlight.checkpoint.listing import MODEL
from fnlight.checkpoint.placeholder import Lent
from fnlight.checkpoint.places import Path, at, open_checkpoint
from fnlight.checkpoint.rename import Rename, new_name, renamed
from fnlight.checkpoint.tensors import describe
from fnlight.errors import BrokenCheckpointError, MismatchError, check_type
from fnlight.state import A_STATE, TrainState
from fnlight.tensors import assign, buffers_of, derived_buffers

_ROWS = 20


def split_buffers(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The buffers of a module, apart: those in its ``state_dict`` and those registered with ``persistent=False``.

    Args:
        module: Any module.

    Returns:
        Two mappings of names to tensors.

    Example:
        >>> module = nn.Module()
        >>> module.register_buffer("kept", torch.zeros(1))
        >>> module.register_buffer("derived", torch.zeros(1), persistent=False)
        >>> [list(part) for part in split_buffers(module)]
        [['kept'], ['derived']]
    """
    inside = dict(module.named_modules(remove_duplicate=False))
    persistent: dict[str, Tensor] = {}
    derived: dict[str, Tensor] = {}
    for name, buffer in module.named_buffers():
        owner, _, leaf = name.rpartition(".")
        part = derived if leaf in derived_buffers(inside[owner]) else persistent
        part[name] = buffer.detach()
    return persistent, derived


def extra_states(module: nn.Module) -> dict[str, Any]:
    """What modules with ``get_extra_state`` keep besides their tensors.

    Args:
        module: Any module.

    Returns:
        Names of modules to their extra states.

    Example:
        >>> extra_states(nn.Linear(1, 1))
        {}
    """
    own = {name: inner for name, inner in module.named_modules() if type(inner).get_extra_state is not nn.Module.get_extra_state}
    return {name: inner.get_extra_state() for name, inner in own.items()}


@attrs.frozen
class LoadReport:
    """Which weights were loaded by name, and which were not.

    Args:
        path: The file.
        loaded: Names whose values were taken.
        missing: Names to what the model has and the file lacks.
        unexpected: Names to what the file has and the model lacks.
        mismatched: Names to what both have, with another shape or kind of number: ``(in the file, in the model)``.
        converted: Names to those whose values were converted to the dtype of the model, likewise.

    Example:
        >>> print(LoadReport("a", ("weight",), {"bias": "float32 [2]"}, {}, {}))
        a: 1 loaded, 1 missing
          name  in the file  in the model
          bias            -   float32 [2]
    """

    path: str
    loaded: tuple[str, ...]
    missing: Mapping[str, str]
    unexpected: Mapping[str, str]
    mismatched: Mapping[str, tuple[str, str]]
    converted: Mapping[str, tuple[str, str]] = attrs.field(factory=dict)

    @property
    def fits(self) -> bool:
        """Say whether every name was found, with its shape, on both sides."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def taken(self) -> frozenset[str]:
        """The names whose values were taken."""
        return frozenset(self.loaded)

    @property
    def left(self) -> frozenset[str]:
        """The names in the file whose values were not taken."""
        return frozenset((*self.unexpected, *self.mismatched))

    def __str__(self) -> str:
        counts = {kind: len(getattr(self, kind)) for kind in ("loaded", "missing", "unexpected", "mismatched", "converted")}
        head = f"{self.path}: {', '.join(f'{n} {kind}' for kind, n in counts.items() if n or kind == 'loaded')}"
        rows = [(name, "-", has) for name, has in self.missing.items()]
        rows += [(name, has, "-") for name, has in self.unexpected.items()]
        rows += [(name, *both) for name, both in {**self.mismatched, **self.converted}.items()]
        return head + _table(rows)


def _table(rows: list[tuple[str, str, str]]) -> str:
    if not rows:
        return ""
    shown = [("name", "in the file", "in the model"), *rows[:_ROWS]]
    a, b, c = (max(len(row[i]) for row in shown) for i in range(3))
    lines = [f"  {name:<{a}}  {left:>{b}}  {right:>{c}}" for name, left, right in shown]
    more = [f"  ... and {len(rows) - _ROWS} more"] if len(rows) > _ROWS else []
    return "\n" + "\n".join(lines + more)


def place_weights(module: nn.Module, found: Mapping[str, Tensor], path: str, convert: bool = False, lent: Lent | None = None) -> LoadReport:
    """Copy tensors into the parameters and persistent buffers of the same name and shape, in place.

    Args:
        module: What is filled.
        found: Names to tensors; a tied weight may stand under any of its names.
        path: The file, for the report.
        convert: Whether floating-point values may be converted to the dtype of the model.
        lent: What the module has borrowed; a value becomes the memory of such a tensor, and must be nobody else's.

    Returns:
        The report.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> place_weights(module, {"bias": torch.ones(1)}, "a").missing
        {'weight': 'float32 [1, 2]'}
    """
    wanted = {**dict(module.named_parameters()), **split_buffers(module)[0]}
    found = _first_names(module, found)
    fits = {name: _fits(found[name], tensor, convert) for name, tensor in wanted.items() if name in found}
    with torch.no_grad():
        for name in (name for name, good in fits.items() if good):
            put(module, name, found[name], lent)
    differ = {name: (_say(found[name]), _say(wanted[name])) for name in fits if describe(found[name]) != describe(wanted[name])}
    return LoadReport(
        path=path,
        loaded=tuple(name for name, good in fits.items() if good),
        missing={name: _say(tensor) for name, tensor in wanted.items() if name not in found},
        unexpected={name: _say(tensor) for name, tensor in found.items() if name not in wanted},
        mismatched={name: both for name, both in differ.items() if not fits[name]},
        converted={name: both for name, both in differ.items() if fits[name]},
    )


def make_late_buffers(module: nn.Module, found: Mapping[str, Tensor], derived: bool, same_run: bool = False) -> None:
    """Make room for buffers that a model fills in a forward: those that are None or empty in a new model get the shape in the checkpoint.

    Args:
        module: The module; changed in place.
        found: Names to tensors of a checkpoint.
        derived: Whether these are the buffers outside the ``state_dict``, or those in it.
        same_run: True for the model of the run that has saved it: its buffers get the saved shapes, or are None again where none was saved.

    Example:
        >>> module = nn.Module()
        >>> module.register_buffer("mean", None)
        >>> make_late_buffers(module, {"mean": torch.ones(2)}, derived=False)
        >>> module.mean.shape
        torch.Size([2])
    """
    named = dict(module.named_buffers())
    device = next((t.device for t in (*module.parameters(), *named.values())), None)
    for prefix, inner in module.named_modules():
        buffers, outside = buffers_of(inner), derived_buffers(inner)
        for leaf in [leaf for leaf in buffers if (leaf in outside) is derived]:
            name, now = f"{prefix}.{leaf}".lstrip("."), buffers[leaf]
            value = found.get(name)
            if value is None:
                buffers[leaf] = None if same_run and name in named else now
            elif now is None or ((same_run or not now.numel()) and now.shape != value.shape and now.dtype == value.dtype):
                buffers[leaf] = torch.empty_like(value, device=device if now is None else now.device)


def put(module: nn.Module, name: str, value: Tensor, lent: Lent | None = None) -> None:
    """Copy a value into a parameter or buffer; a buffer whose elements share memory is replaced, for it cannot be written.

    Args:
        module: The module.
        name: A qualified name.
        value: A tensor of the same shape.
        lent: What the module has borrowed, if anything.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     put(module, "bias", torch.ones(1))
        >>> module.bias.item()
        1.0
    """
    owner, _, leaf = name.rpartition(".")
    inner = module.get_submodule(owner)
    target = getattr(inner, leaf)
    if any(stride == 0 and size > 1 for size, stride in zip(target.shape, target.stride(), strict=True)):
        setattr(inner, leaf, value.to(target.device, target.dtype, copy=True))
    elif lent is None or not lent.put(target, value):
        assign(target, value)


def _first_names(module: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, those of tied weights under the first of their names, as the module counts them."""
    first = {id(p): name for name, p in module.named_parameters()}
    alias = {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
    named = {name: tensor for name, tensor in found.items() if alias.get(name, name) == name}
    return {**{alias[name]: tensor for name, tensor in found.items() if name in alias}, **named}


def _fits(value: Tensor, target: Tensor, convert: bool) -> bool:
    same = value.dtype == target.dtype or (convert and value.is_floating_point() and target.is_floating_point())
    return same and value.shape == target.shape


def _say(tensor: Tensor) -> str:
    dtype, shape = describe(tensor)
    return f"{dtype} {shape}"


def load_weights(state: TrainState, path: Path, *, partial: bool = False, rename: Rename = None) -> tuple[TrainState, LoadReport]:
    """Load the weights of a plain safetensors file, or of a checkpoint, into a copy of a state; everything else is unchanged.

    Floating-point values are converted to the dtype of the model, and the report says which.

    Args:
        state: Whose model is filled; it stays as it is.
        path: A ``.safetensors`` file, a checkpoint or a run's directory; or the URL of one.
        partial: True takes what fits and leaves the rest as it is, without an error.
        rename: Names in the file to names in the model: a mapping, whose keys name a parameter or a module with all below it (names it
            lacks stay), or a function, whose None leaves one out.

    Returns:
        The new state, and a report of what fitted; print it.

    Raises:
        MismatchError: Unless `partial`, if names or shapes differ; all of them are listed.
        BrokenCheckpointError: If the file is damaged, or no safetensors file.
        CheckpointError: If there is no file, or two names become one.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> from fnlight.state import Task
        >>> state = TrainState.create(Task(nn.Linear(2, 1), lambda model, batch: model(batch).sum()))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"net.bias": torch.ones(1)}, f"{folder}/a.safetensors")
        ...     after, report = load_weights(state, f"{folder}/a.safetensors", partial=True, rename={"net.bias": "bias"})
        >>> after.params["bias"].item(), report.loaded, list(report.missing)
        (1.0, ('bias',), ['weight'])
    """
    check_type("load_weights(state, ...)", state, TrainState, A_STATE)
    named = {name for name, _ in (*state.live.module.named_parameters(remove_duplicate=False), *state.live.module.named_buffers())}
    found = renamed(_read(path, lambda name: new_name(rename, name) in named), rename)
    state = state.copy()
    report = place_weights(state.store.module, found, at(path).path, convert=True)
    if not partial and not report.fits:
        raise MismatchError(
            f"the weights do not match the model. {report}\nPass partial=True to load those that match, or rename= to map names in the file"
        )
    return state, report


def _read(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    file = at(path)
    folder, name = file.parent(), file.name()
    if folder.size(name) is None:
        return open_checkpoint(path, (MODEL,)).tensors(MODEL)
    try:
        return folder.tensors(name, wanted) if isinstance(folder, Bucket) else folder.tensors(name)
    except Exception as error:  # the safetensors library raises its own class, and others on damage
        raise BrokenCheckpointError(
            f"{file.path} cannot be read as a safetensors file: {error}; pickles (.pt, .pth) run code when they are read and are not "
            "loaded: convert them with torch.load(..., weights_only=True) and safetensors.torch.save_file"
        ) from error
