"""A position in an epoch is a number of samples: with another batch size it is another batch, and no sample is lost or seen twice."""

from itertools import islice
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from fnlight.data import Source, TensorLoader, batches, placed, zip_longest
from fnlight.errors import LoaderError
from fnlight.state import Progress, Task, TrainState

TASK = Task(torch.nn.Linear(1, 1), lambda model, batch: model(batch).mean())
ROWS = torch.arange(24.0).reshape(24, 1)
KINDS = {
    "DataLoader": lambda size: DataLoader(TensorDataset(ROWS), batch_size=size, shuffle=True),
    "TensorLoader": lambda size: TensorLoader((ROWS,), batch_size=size, shuffle=True),
    "list": lambda size: [(rows,) for rows in ROWS.split(size)],
}


def state_at(done: int, size: int) -> TrainState:
    """A state so many samples into an epoch, after batches of a size."""
    progress = Progress(step=9, epoch=1, batch=done // size, samples=24 + done, epoch_samples=done)
    return attrs.evolve(TrainState.create(TASK, seed=3), progress=progress)


def rows(items: Any) -> list[float]:
    """The samples of items, in order."""
    return [x for item in items for batch in item.batches for x in batch[0].flatten().tolist()]


@pytest.mark.parametrize("kind", KINDS)
@given(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), st.sampled_from([1, 2, 3, 4, 6, 8, 12]), st.integers(1, 23))
def test_another_batch_size_goes_on_at_the_very_sample(kind: str, old: int, new: int, batch: int) -> None:
    """What follows is what is left of the epoch, whatever the sizes, or a message where the place lies within a batch."""
    done = min(batch, 24 // old - 1) * old
    before = Progress(epoch=1)
    whole = rows(islice(batches(KINDS[kind](old), attrs.evolve(state_at(0, old), progress=before)), 24 // old))
    rest = islice(batches(KINDS[kind](new), state_at(done, old)), (24 - done) // new)
    if done % new:
        with pytest.raises(LoaderError, match=rf"is {done} samples into epoch 1, .* end after {done // new * new} and .*batch_size"):
            next(batches(KINDS[kind](new), state_at(done, old)))
    else:
        assert rows(rest) == whole[done:]


def test_going_back_to_the_earlier_end_is_said_in_all_counts() -> None:
    """The samples that will be seen again are taken out of the counts."""
    progress = state_at(12, 4).progress
    after = placed(Source(KINDS["DataLoader"](8)), progress, earlier=True)
    assert (after.batch, after.epoch_samples, after.samples, after.step) == (1, 8, 24 + 8, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_size_stays_where_it_is(kind: str) -> None:
    """Nothing moves, and the very progress comes back."""
    progress = state_at(12, 4).progress
    assert placed(Source(KINDS[kind](4)), progress) is progress


def test_batches_of_uneven_size_are_counted_one_by_one() -> None:
    """A list says itself where its batches end."""
    uneven = [(part,) for part in ROWS.split([5, 1, 6, 12])]
    assert placed(Source(uneven), state_at(12, 4).progress).batch == 3
    with pytest.raises(LoaderError, match="end after 6 and 12 samples"):
        placed(Source(uneven), state_at(8, 4).progress)


@pytest.mark.parametrize("loader", [zip_longest([ROWS], [ROWS]), iter([ROWS])], ids=["joined", "iterator"])
def test_a_loader_that_cannot_be_counted_is_believed(loader: Any) -> None:
    """So is a state that does not know its samples."""
    progress = state_at(12, 4).progress
    assert placed(Source(loader), progress) is progress
    unknown = attrs.evolve(progress, epoch_samples=0)
    assert placed(Source(KINDS["list"](8)), unknown) is unknown
