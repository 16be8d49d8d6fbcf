"""Checks of loaders: what they give is a function of (seed, epoch), and a run that is resumed reads what the whole one would.

Not part of `fnlight.testing.check`, which tries a task on one batch: here epochs are read, again and elsewhere.
"""

import copy
import json
import multiprocessing
import warnings
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from fnlight.checkpoint import decode, encode
from fnlight.data import Loaders, Source, batches, digest_of, inexact, is_plain
from fnlight.errors import ConfigError, LoaderCheckError, LoaderError, LoaderWarning
from fnlight.state import Progress, Task, TrainState
from fnlight.tensors import isolated, seed_generators

CHECKS = ("again", "middle", "copy", "workers", "process")
"""The names of the checks, in the order in which they are made."""

_KEYED = (
    "Draw from the global generators of torch, random or numpy, or from one that is an attribute of the data set: these are seeded for every sample. "
    "A stream may be made for each epoch, with fl.per_epoch(lambda seed, epoch: loader)"
)


@attrs.frozen
class LoaderReport:
    """What `check_loader` found: a line for each loader.

    Args:
        lines: By the names of the loaders.

    Example:
        >>> print(LoaderReport({"train": "resumes exactly, at once"}))
        train: resumes exactly, at once
    """

    lines: Mapping[str, str]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {line}" for name, line in self.lines.items())


@attrs.frozen(eq=False)
class _Case:
    """A loader under test: what two epochs of it hold, and where it is cut."""

    name: str
    loader: Any
    seed: int
    limit: int
    whole: list[Any]
    length: int  # batches in an epoch
    saved: dict[str, Any]  # what a state keeps in the middle of the second epoch

    @property
    def cut(self) -> int:
        return self.length + (self.length + 1) // 2


def check_loader(loaders: Any, *, seed: int = 0, limit: int = 64, skip: Iterable[str] = ()) -> LoaderReport:
    """Check that loaders give the same batches when they are read again, from the middle, and elsewhere.

    * ``again``: two epochs, read twice, hold the same batches.
    * ``middle``: a run that is resumed in the middle of the second epoch reads the rest of it.
    * ``copy``: so does one with a copy of the loader.
    * ``workers``: 0 and 2 workers read the same; of a stream it is only said that they do not.
    * ``process``: a new process reads the rest as well.

    Args:
        loaders: A loader, a mapping of named ones, or `Loaders`.
        seed: The seed of the state.
        limit: Batches of an epoch that are read at most.
        skip: Names of checks to leave out.

    Returns:
        A report that prints a line for each loader: what resumes exactly, what is slow, and what was not looked at.

    Raises:
        LoaderCheckError: If a loader is wrong; the message says which check found it, and what to do. It is an ``AssertionError``.
        ConfigError: If `skip` names no check.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> print(check_loader(DataLoader(range(8), batch_size=2, shuffle=True), skip=["process"]))
        loader: resumes exactly, at once, with any number of workers (not checked: process)
    """
    left_out = {skip} if isinstance(skip, str) else set(skip)
    if not left_out <= set(CHECKS):
        raise ConfigError(f"check_loader has no check called {sorted(left_out - set(CHECKS))}; there are {list(CHECKS)}")
    with isolated():
        return LoaderReport(
            {name: _checked(name, loader, seed, limit=limit, left_out=left_out) for name, loader in _named(loaders).items()}
        )


def _named(loaders: Any) -> dict[str, Any]:
    if isinstance(loaders, Loaders):
        return {
            "/".join(filter(None, (use, name))): each
            for use in ("train", "val", "test", "predict")
            for name, each in loaders.named(use).items()
        }
    return dict(loaders) if isinstance(loaders, Mapping) else {"loader": loaders}


def _checked(name: str, loader: Any, seed: int, limit: int, left_out: set[str]) -> str:
    why = inexact(loader.loader if isinstance(loader, Source) else loader)
    if why is not None:
        _fail(name, "again", why, "Or resume only at the end of an epoch")
    whole, length, _ = _read(loader, seed, limit)
    case = _Case(name=name, loader=loader, seed=seed, limit=limit, whole=whole, length=length, saved={})
    if not any(whole):
        return "nothing can be said: its batches hold no tensors, arrays, numbers or texts that could be compared"
    notes = list[str]()
    for check, fn in (("again", _again), ("middle", _middle), ("copy", _copy), ("workers", _workers), ("process", _process)):
        note: Any = None
        if check in left_out:
            notes.append(f"not checked: {check}")
        elif check == "middle":
            case = attrs.evolve(case, saved=_middle(case))
        else:
            note = fn(case)
        notes += [note] if note else []
    how = "by reading what was done" if Source.of(loader).reads_to_skip else "at once"
    any_number = ", with any number of workers" if _rows(loader) and "workers" not in left_out else ""
    return f"resumes exactly, {how}{any_number}" + (f" ({'; '.join(notes)})" if notes else "")


def _rows(loader: Any) -> bool:
    return is_plain(loader) and not isinstance(loader.dataset, IterableDataset)


def _state(seed: int, progress: Progress, memory: Mapping[str, Any]) -> TrainState:
    state = attrs.evolve(TrainState.create(Task(nn.Identity(), lambda model, batch: batch), seed=seed), progress=progress)
    state.store.memory.update(memory)
    return state


def _read(
    loader: Any,
    seed: int,
    limit: int,
    *,
    memory: Mapping[str, Any] | None = None,
    progress: Progress = Progress(),
    count: int | None = None,
) -> tuple[list[Any], int, dict[str, Any]]:
    """The digests of so many batches, or of two epochs; the batches of the first epoch that ends, and what a state keeps after the last one."""
    found, length, kept = list[Any](), 0, dict[str, Any]()
    items: Any = batches(Source.of(loader, limit=limit), _state(seed, progress, memory or {}))
    try:
        for item in islice(items, count):
            found.append(digest_of(item.batches[0]))
            length = item.batch if item.last and not length else length
            if count is None and item.last and item.epoch == 1:
                break
            if count is not None and len(found) == count and item.position is not None:
                kept = {"loader": item.position()}
    finally:
        items.close()
    return found, length, kept


def _rest(loader: Any, case: _Case) -> list[Any]:
    """What a run that is resumed in the middle of the second epoch reads of it."""
    at = Progress(epoch=1, batch=case.cut - case.length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoaderWarning)
        return _read(loader, case.seed, case.limit, memory=case.saved, progress=at, count=len(case.whole) - case.cut)[0]


def _again(case: _Case) -> None:
    seed_generators(12345)  # what is drawn before must not matter
    found, _, _ = _read(case.loader, case.seed, case.limit)
    _compare(case, "again", found, case.whole, first=0, where="read again in the same process", advice=_KEYED)


def _middle(case: _Case) -> dict[str, Any]:
    """What a state keeps in the middle of the second epoch, as it comes out of a file."""
    if case.cut == len(case.whole):
        return {}
    tensors: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> str:
        tensors[name] = tensor
        return name

    _, _, kept = _read(case.loader, case.seed, case.limit, count=case.cut)
    saved = decode(json.loads(json.dumps(encode(kept, put, "memory"))), tensors.__getitem__)
    case = attrs.evolve(case, saved=saved)
    _resumes(case, "middle", case.loader, "a run that is resumed in the middle of the second epoch")
    return saved


def _resumes(case: _Case, check: str, loader: Any, where: str) -> None:
    try:
        found = _rest(loader, case)
    except LoaderError as error:
        _fail(case.name, check, f"{where} is refused: {error}", "See what the loader remembers from one epoch to the next")
    _compare(
        case,
        check,
        found,
        case.whole[case.cut :],
        first=case.cut,
        where=where,
        advice="Give it set_epoch(epoch) in the place of a counter of its own. " + _KEYED,
    )


def _copy(case: _Case) -> str | None:
    try:
        twin = copy.deepcopy(case.loader)
    except Exception as error:  # noqa: BLE001  # whatever a user's object raises
        return f"cannot be copied: {type(error).__name__}"
    _resumes(case, "copy", twin, "a copy of the loader, on which a run is resumed,")
    return None


def _workers(case: _Case) -> str | None:
    if not is_plain(case.loader):
        return None
    found = {count: _read(_with_workers(case.loader, count), case.seed, case.limit)[0] for count in (0, 2)}
    if isinstance(case.loader.dataset, IterableDataset):
        return "its order depends on the number of workers" if found[0] != found[2] else None
    _compare(case, "workers", found[2], found[0], first=0, where="read by 2 workers rather than in this process", advice=_KEYED)
    return None


def _with_workers(loader: Any, count: int) -> Any:
    twin = copy.copy(loader)
    vars(twin).update(num_workers=count, prefetch_factor=2 if count else None, persistent_workers=False, timeout=0)
    if not count:
        vars(twin)["_DataLoader__multiprocessing_context"] = None
    return twin


def _process(case: _Case) -> str | None:
    try:
        found = _elsewhere("spawn", case)
    except Exception as error:  # noqa: BLE001  # what cannot be sent to a new process can be copied to it
        found = error
    if isinstance(found, Exception) and not isinstance(found, LoaderError):
        found = _elsewhere("fork", case)
    advice, where = "Is there an order of a set, or a hash, in it? " + _KEYED, "read by a new process, in which a run is resumed,"
    if isinstance(found, Exception):
        _fail(case.name, "process", f"{where} it is refused: {found}", advice)
    _compare(case, "process", found, case.whole[case.cut :], first=case.cut, where=where, advice=advice)
    return None


def _elsewhere(method: str, case: _Case) -> list[Any] | Exception:
    """What a new process reads, or why it fails."""
    context: Any = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, case))
    process.start()
    there.close()
    try:
        kind, found = here.recv()
    except EOFError:
        return RuntimeError("the process ended without a word")
    else:
        return found if kind == "read" else LoaderError(found) if kind == "refused" else RuntimeError(found)
    finally:
        process.join()
        here.close()


def _child(connection: Any, case: _Case) -> None:
    torch.set_num_threads(1)
    try:
        connection.send(("read", _rest(case.loader, case)))
    except LoaderError as error:
        connection.send(("refused", str(error)))
    except Exception as error:  # noqa: BLE001  # the parent says it
        connection.send(("failed", f"{type(error).__name__}: {error}"))
    connection.close()


def _compare(case: _Case, check: str, found: list[Any], expected: list[Any], first: int, where: str, advice: str) -> None:
    if found == expected:
        return
    wrong = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
    epoch, batch = divmod(first + wrong, case.length)
    what = f"{where} it gives another batch {batch + 1} of epoch {epoch} ({sum(a != b for a, b in zip(found, expected, strict=False))} of {len(expected)} differ)"
    _fail(
        case.name,
        check,
        what if len(found) == len(expected) else f"{where} it gives {len(found)} batches rather than {len(expected)}",
        advice,
    )


def _fail(name: str, check: str, found: str, advice: str) -> NoReturn:
    raise LoaderCheckError(f"{name}: {check}: {found}\n{advice}, or leave this check out with check_loader(..., skip=[{check!r}])")
