"""Metrics of many steps, merged late: one list append per step, and one copy from the device when they are read."""

import math
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from functools import reduce
from operator import attrgetter, methodcaller
from typing import Any

import attrs
import torch
from torch import Tensor

from fnlight.errors import MemoryWarning, StepError, check_type, warn
from fnlight.metrics.media import MEDIA
from fnlight.metrics.monoids import Last, Max, Mean, Min, Sum, _pick
from fnlight.metrics.own import scalars_of
from fnlight.metrics.torchmetric import is_torchmetric
from fnlight.metrics.wide import check_scalar

SCALARS = {"Mean": Mean, "Sum": Sum, "Max": Max, "Min": Min, "Last": Last}

_FOLD: dict[str, Callable[[Any, Any], Any]] = {
    "Max": lambda a, b: _pick(a, b, torch.maximum, max),
    "Min": lambda a, b: _pick(a, b, torch.minimum, min),
    "Last": lambda a, b: b,
}
_DTYPE, _DEVICE, _DIM = attrgetter("dtype"), attrgetter("device"), methodcaller("dim")
_PLAIN, _MEAN = {Tensor}, ["Mean"]
_NEUTRAL = {"Max": -math.inf, "Min": math.inf}  # what nothing comes to; it is no sign of a broken number
_STACK = 256  # pending steps after which their scalars are stacked on the device: bounded memory without a host sync


@attrs.define(eq=False, repr=False)
class Tally:
    """Metrics of many steps, kept on their device and merged only when they are read.

    Adding is one list append. Reading copies everything pending to the host at once and adds it up in float64, one step after the other, so
    the result does not depend on when or how often it is read.
    Names with a slash, such as ``gen/loss``, belong to a phase: a step has all names of a phase, or none of them.

    Args:
        totals: Per name the kind of monoid and its merged fields on the host.
        bad: The first ``(step, name)`` whose value was NaN or infinite.
        parts: By rank, the two of a state that lies on several; for a file only, see `fnlight.metrics.ranks`.

    Example:
        >>> tally = Tally()
        >>> tally.add(1, {"loss": torch.tensor(2.0)})
        >>> tally.add(2, {"loss": torch.tensor(4.0)})
        >>> tally.read()
        {'loss': 3.0}
    """

    totals: dict[str, list[Any]] = attrs.field(factory=dict)
    bad: tuple[int, str] | None = None
    parts: list[Any] | None = attrs.field(default=None, kw_only=True)
    _names: Any = attrs.field(default=None, init=False)
    _turns: set[frozenset[str]] = attrs.field(factory=set, init=False)  # sets of names that are steps of some phases, but not of all
    _pending: list[tuple[int, Mapping[str, Any], float | None]] = attrs.field(factory=list, init=False)
    _stacked: list[tuple["_Block | None", dict[str, "_Columns"]]] = attrs.field(factory=list, init=False)
    _objects: dict[str, list[Any]] = attrs.field(factory=dict, init=False)

    def add(self, step: int, metrics: Mapping[str, Any], samples: float | None = None) -> None:
        """Take the metrics of one step, in which plain numbers count with its samples; without `samples` each counts once.

        The names must be those of the first one, but for whole phases that are not due.
        """
        if metrics.keys() != self._names and frozenset(metrics) not in self._turns:
            self._accept(step, metrics)
        self._pending.append((step, metrics, samples))
        if len(self._pending) >= _STACK:
            self._stack()

    def _accept(self, step: int, metrics: Mapping[str, Any]) -> None:
        known, names = self._names, metrics.keys()
        if known is None and self.totals:  # from a file, which holds no pictures and no texts
            given = {name for name, value in metrics.items() if _kind(value)}
            if _by_turns(self.totals.keys(), given):
                known, names = self.totals.keys(), given
            else:
                self._follow(step, given)
        turns = known is not None and names != known and _by_turns(known, names)
        if known is not None and names != known and not turns:
            missing, new = sorted(known - names), sorted(names - known)
            raise StepError(
                f"step {step}: the metrics must have the same names at every step, {sorted(known)}; "
                f"missing now: {missing}, new: {new}. Give every name each time, with Mean(0.0, 0) where there is nothing to count."
            )
        for name, value in metrics.items():
            check_type("the name of a metric", name, str, "a string")
            for field in scalars_of(value):
                check_scalar(name, field)
            if not _kind(value) and not isinstance(value, MEDIA) and not callable(getattr(value, "merge", None)):
                more = "; objects of torchmetrics are read in eval_step only" if is_torchmetric(value) else ""
                raise StepError(
                    f"metric {name!r} must be a number, a scalar tensor, or a value such as Mean or Image, but got {value!r:.60}{more}"
                )
        if turns:
            self._turns |= {frozenset(known or ()), frozenset(metrics)}
        self._names = dict.fromkeys([*(known or ()), *metrics] if turns else metrics).keys()

    def _follow(self, step: int, names: set[str]) -> None:
        """Go on from a file under the names of today, which another pipe may have changed."""
        new, gone = sorted(names - self.totals.keys()), sorted(self.totals.keys() - names)
        if new or gone:
            what = [f"{new} are new since the state was saved and count from here on"] if new else []
            what += [f"{gone} are given no more and are dropped"] if gone else []
            warn(f"step {step}: the metrics {', '.join(what)}", MemoryWarning)
        self.totals = {name: fields for name, fields in self.totals.items() if name in names}

    def settle(self, merge: Callable[[str, str, list[Any], list[int]], None] | None = None) -> None:
        """Bring what is pending to the host and merge it, here or as it is told; one host sync for all of it."""
        merge = merge or self.merge_column
        if self._pending:
            self._stack()
        for block, columns in self._stacked:
            if block is not None:
                for name, values in zip(block.names, block.values.tolist(), strict=True):
                    merge(name, "Mean", _times([values, len(values)], block.times), block.steps)
            hosted = _to_host([column for each in columns.values() for column in each.fields])
            place = iter(hosted)
            for name, each in columns.items():
                merge(name, each.kind, _times([next(place) for _ in each.fields], each.times), each.steps)
        self._stacked.clear()

    def _stack(self) -> None:
        rows, names = self._pending[:], list(self._names)
        self._pending.clear()
        if not self._turns:
            self._stack_whole(names, rows)
            return
        for phase in dict.fromkeys(map(_phase, names)):
            own = [name for name in names if _phase(name) == phase]
            held = [row for row in rows if own[0] in row[1]]
            if held:
                self._stack_whole(own, held)

    def _stack_whole(self, names: list[str], pending: list[tuple[int, Mapping[str, Any], float | None]]) -> None:
        steps = [step for step, _, _ in pending]
        counts = None if pending[0][2] is None else [samples or 0 for _, _, samples in pending]
        found = {name: [metrics[name] for _, metrics, _ in pending] for name in names}
        plain = [n for n, values in found.items() if set(map(type, values)) == _PLAIN and self.totals.get(n, _MEAN)[0] == "Mean"]
        for name in plain:
            if any(map(_DIM, found[name])):
                check_scalar(name, next(value for value in found[name] if value.dim()))
        block = _block(plain, steps, [value for name in plain for value in found[name]], counts)
        columns: dict[str, _Columns] = {}
        for name in found if block is None else [n for n in found if n not in block.names]:
            kind = _one_kind(name, found[name], self.totals.get(name))
            if kind is None:
                self._keep(name, found[name])
            else:
                columns[name] = _columns(name, kind, steps, values=found[name], counts=counts)
        self._stacked.append((block, columns))

    def _keep(self, name: str, values: list[Any]) -> None:
        if isinstance(values[-1], MEDIA):
            self._objects[name] = values[-1:]
        else:
            self._objects.setdefault(name, []).extend(values)

    def merge_column(self, name: str, kind: str, fields: list[Any], steps: list[int]) -> None:
        """Merge the values of several steps: a column for each field of the monoid, or the number of ones in it."""
        merged = self.totals.get(name)
        old = merged[1:] if merged else [None] * len(fields)
        self.totals[name] = [kind, *(folded(kind, total, values) for total, values in zip(old, fields, strict=True))]
        for values in fields:
            if not isinstance(values, int) and not all(map(math.isfinite, values)):
                self._blame(name, values, steps, _NEUTRAL.get(kind))

    def _blame(self, name: str, values: list[Any], steps: list[int], neutral: float | None) -> None:
        for step, value in zip(steps, values, strict=True):
            if not math.isfinite(value) and value != neutral and (self.bad is None or step < self.bad[0]):
                self.bad = (step, name)

    def read(self) -> dict[str, Any]:
        """Settle, then give names to floats (and to media, where there are any)."""
        self.settle()
        scalars = {name: float(SCALARS[kind](*fields)) for name, (kind, *fields) in self.totals.items()}
        objects = {name: _compute(name, values) for name, values in self._objects.items()}
        found = {**scalars, **objects}
        return {name: found[name] for name in self._names or found if name in found}

    def is_empty(self) -> bool:
        """Say whether nothing was added since the last `clear`."""
        return not (self._pending or self._stacked or self.totals or self._objects)

    def clear(self) -> None:
        """Start afresh; the names stay."""
        self.totals, self.bad = {}, None
        self._pending.clear()
        self._stacked.clear()
        self._objects.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tally":
        self.settle()
        twin = Tally({name: list(fields) for name, fields in self.totals.items()}, self.bad)
        twin._objects = {name: list(values) for name, values in self._objects.items()}
        return twin


def _phase(name: str) -> str:
    """The phase that a name belongs to; "" where there is none."""
    return name.rpartition("/")[0]


def _by_turns(known: AbstractSet[str], names: AbstractSet[str]) -> bool:
    """Say whether two sets of names differ by whole phases only."""
    changed = {_phase(name) for name in known ^ names}
    return "" not in changed and not any(_phase(name) in changed for name in known & names)


@attrs.frozen(eq=False, repr=False)
class _Block:
    """Plain scalars of many steps in one tensor, shape [names, steps]: what there mostly is, stacked and copied at once."""

    names: list[str]
    steps: list[int]
    values: Tensor
    times: list[float] | None


@attrs.frozen(eq=False, repr=False)
class _Columns:
    """The fields of a monoid, a column each, with the steps they were taken at, and what plain numbers count; None where all count 1."""

    kind: str
    steps: list[int]
    fields: list[Any]
    times: list[float] | None


def _times(fields: list[Any], times: list[float] | None) -> list[Any]:
    """The totals and weights of means, each row as often as it counts."""
    if times is None:
        return fields
    return [times if isinstance(f, int) else [value * n for value, n in zip(f, times, strict=True)] for f in fields]


def _block(names: list[str], steps: list[int], values: list[Tensor], times: list[float] | None) -> _Block | None:
    if not values or len(set(map(_DTYPE, values))) != 1 or len(set(map(_DEVICE, values))) != 1:
        return None
    return _Block(names, steps, torch.stack(values).detach().reshape(len(names), len(steps)), times)


def _columns(name: str, kind: str, steps: list[int], values: list[Any], counts: list[float] | None) -> _Columns:
    if kind == "Last":
        steps = [step for step, v in zip(steps, values, strict=True) if v.value is not None]
        values = [v for v in values if v.value is not None]
    times = None
    if kind == "Mean" and counts is not None:
        times = [n if not isinstance(v, Mean) or v._exact is True else 1 for v, n in zip(values, counts, strict=True)]
        values = [Mean(*v._exact) if isinstance(v, Mean) and isinstance(v._exact, tuple) else v for v in values]
    fields = _fields(kind, values)
    for field in fields:
        for value in () if isinstance(field, int) else field:
            check_scalar(name, value)
    return _Columns(kind, steps, [_column(field) for field in fields], times)


def columns_of(tally: Tally) -> dict[str, list[Any]]:
    """What a tally has taken and not merged yet, on the host.

    Args:
        tally: Not read since it was made; it is settled.

    Returns:
        Names to the kind of monoid, the steps, and a column for each of its fields.

    Example:
        >>> tally = Tally()
        >>> tally.add(1, {"loss": torch.tensor(2.0)})
        >>> columns_of(tally)
        {'loss': ['Mean', [1], [2.0], [1]]}
    """
    found: dict[str, list[Any]] = {}

    def note(name: str, kind: str, fields: list[Any], steps: list[int]) -> None:
        columns = [[1] * field if isinstance(field, int) else list(field) for field in fields]
        held = found.setdefault(name, [kind, [], *([] for _ in columns)])
        for column, values in zip(held[1:], [steps, *columns], strict=True):
            column += values

    tally.settle(note)
    return found


def folded(kind: str, total: Any, values: Any) -> Any:
    """Add up one value after the other, so that it does not matter how many come at a time.

    Args:
        kind: Of the monoid.
        total: What there is already; None for nothing.
        values: Numbers, or how many ones.

    Returns:
        The total.

    Example:
        >>> folded("Sum", 1.0, [2.0, 3.0])
        6.0
    """
    if isinstance(values, int):
        return values if total is None else total + values
    if not values:
        return total
    if kind in ("Mean", "Sum"):
        total, rest = (values[0], values[1:]) if total is None else (total, values)
        for value in rest:
            total += value
        return total
    return reduce(_FOLD[kind], values if total is None else [total, *values])


def _one_kind(name: str, values: list[Any], total: list[Any] | None) -> str | None:
    """The one kind of all values of a metric, those that were merged before among them."""
    kinds = {_kind(value) for value in values} if len(set(map(type, values))) > 1 else {_kind(values[0])}
    if len(kinds | {total[0]} if total else kinds) > 1:
        names = sorted({type(value).__name__ for value in values} | ({total[0]} if total else set()))
        raise StepError(
            f"metric {name!r} must be of one kind at every step, but came as {' and as '.join(names)}; always give the same type"
        )
    return kinds.pop()


def _kind(value: Any) -> str | None:
    """The monoid that a metric value stands for; None for what is merged as an object."""
    if isinstance(value, Tensor | int | float):
        return "Mean"
    name = type(value).__name__
    return name if SCALARS.get(name) is type(value) else None


def _fields(kind: str, values: list[Any]) -> list[Any]:
    if kind != "Mean":
        return [[v.value for v in values]]
    if Mean not in set(map(type, values)):
        return [values, len(values)]  # so many ones
    pairs = [(v.total, v.weight) if isinstance(v, Mean) else (v, 1) for v in values]
    return [[total for total, _ in pairs], [weight for _, weight in pairs]]


def _column(values: Any) -> Any:
    """A column of scalars: one stacked tensor where all are tensors of one type, else the values themselves, so that none is rounded."""
    if isinstance(values, int) or not all(issubclass(t, Tensor) for t in set(map(type, values))) or len(set(map(_DTYPE, values))) != 1:
        return values
    if len(set(map(_DEVICE, values))) != 1:
        return values
    return torch.stack(values).detach().reshape(len(values))


def _to_host(columns: list[Any]) -> list[list[Any]]:
    """The columns as lists of numbers, with one copy from the device for all columns of one type."""
    out: list[Any] = [[v.item() if isinstance(v, Tensor) else v for v in c] if isinstance(c, list) else c for c in columns]
    by_type: dict[Any, list[int]] = {}
    for i, column in enumerate(columns):
        if isinstance(column, Tensor):
            by_type.setdefault((column.dtype, column.device, len(column)), []).append(i)
    for places in by_type.values():
        rows = torch.stack([columns[i] for i in places]).tolist()
        for i, row in zip(places, rows, strict=True):
            out[i] = row
    return out


def _compute(name: str, values: list[Any]) -> Any:
    if isinstance(values[0], MEDIA):
        return values[-1]
    found = reduce(lambda a, b: a.merge(b), values).compute()
    if (isinstance(found, Tensor) and found.numel() != 1) or not isinstance(found, Tensor | int | float):
        raise StepError(
            f"metric {name!r} must come to one number, but {type(values[0]).__name__}.compute() gave {type(found).__name__}"
            f"{list(found.shape) if isinstance(found, Tensor) else ''}; pass Cat(values, fn) a function that gives a scalar"
        )
    return float(found)
