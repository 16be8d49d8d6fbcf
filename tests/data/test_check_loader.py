"""Laws of `check_loader`: it passes every kind of loader that resumes exactly, and names what is wrong with the others."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fnlight.data import Loaders
from fnlight.errors import ConfigError
from fnlight.testing import LoaderCheckError, check_loader
from tests.data.loaders import KINDS, Hidden, Noisy, Numbers, rows_of, stream


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "workers" not in kind])
def test_every_kind_that_resumes_exactly_passes(kind: str) -> None:
    """In this process; a new one is tried below."""
    assert "resumes exactly" in str(check_loader(KINDS[kind](), skip=["process", "workers"]))


@pytest.mark.parametrize("make", [lambda: DataLoader(Noisy(12), batch_size=2, shuffle=True), lambda: KINDS["a stream that counts"]()])
def test_a_new_process_and_other_numbers_of_workers_are_tried(make: Any) -> None:
    """All checks pass for a loader that keeps all laws."""
    line = check_loader(make()).lines["loader"]
    assert line.startswith("resumes exactly")
    assert "not checked" not in line


class Unkeyed(Dataset[Any]):
    """Rows with noise from where fnlight cannot reach."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng().random  # a method: its generator is no attribute

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([index, self.draw()])


class Hashed(IterableDataset[Any]):
    """Rows in the order of a set of texts, which is another one in every process."""

    def __iter__(self) -> Iterator[Any]:
        return rows_of([int(text[1:]) for text in {f"n{i}" for i in range(40)}])


class Global(Dataset[Any]):
    """Rows that count how often they are read."""

    def __init__(self) -> None:
        self.read = itertools.count()

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([index, next(self.read)])


@pytest.mark.parametrize(
    "make, options, match",
    [
        (
            lambda: DataLoader(Unkeyed(), batch_size=2),
            {},
            r"loader: again: read again in the same process it gives another batch 1 of epoch 0",
        ),
        (lambda: DataLoader(Global(), batch_size=2), {}, "again"),
        (lambda: stream(Hidden()), {}, r"again: .*gives another batch"),
        (
            lambda: stream(Hidden()),
            {"skip": ["again"]},
            r"middle: a run that is resumed in the middle of the second epoch is refused: .*is not what it was",
        ),
        (lambda: stream(Hashed()), {}, "process: read by a new process.*Is there an order of a set"),
        (lambda: iter([torch.zeros(1)]), {}, "is an iterator: a resumed run needs one that begins at the first batch again"),
    ],
)
def test_what_is_wrong_is_named(make: Any, options: dict[str, Any], match: str) -> None:
    """The message says which check found it, and what to do."""
    with pytest.raises(LoaderCheckError, match=f"(?s){match}"):
        check_loader(make(), **options)


def test_loaders_of_a_run_are_checked_by_name() -> None:
    """Each gets a line, which says what a resume costs."""
    report = check_loader(
        Loaders(train=stream(KINDS["a stream"]().dataset), val={"rows": DataLoader(Numbers(6), batch_size=2)}), skip="process"
    )
    assert report.lines["val/rows"] == "resumes exactly, at once, with any number of workers (not checked: process)"
    assert report.lines["train"].startswith("resumes exactly, by reading what was done (its order depends on the number of workers")


def test_batches_that_show_nothing_are_said_to() -> None:
    """What cannot be compared is no success."""
    assert "nothing can be said" in str(check_loader([object(), object()]))


def test_a_check_that_does_not_exist_is_named() -> None:
    """A misspelt name would leave out nothing."""
    with pytest.raises(ConfigError, match=r"check_loader has no check called \['midle'\]; there are"):
        check_loader([1], skip=["midle"])
