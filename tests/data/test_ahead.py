"""Workers of the next epoch start before the one under way ends: the same data is read, and no process is left over."""

import multiprocessing
import os
import signal
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from fnlight.data import Loaders, Source, batches
from fnlight.errors import LoaderError
from fnlight.fit import FitConfig, fit
from fnlight.gradients import grad
from fnlight.loop import run, stop_when
from fnlight.pipe import pipe
from fnlight.state import TrainState
from fnlight.step import apply
from fnlight.testing import assert_trees_equal, tiny_task
from fnlight.triggers import max_steps
from tests.data.loaders import Noisy, Numbers, state_at

WORKERS: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": "fork"}


def alive() -> int:
    """Workers that live."""
    return len(multiprocessing.active_children())


@pytest.fixture(autouse=True)
def _nobody_is_left() -> Any:
    assert alive() == 0
    yield
    assert alive() == 0


def loader_of(data: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=2, shuffle=True, **{**WORKERS, **options})


def values(items: Any, count: int) -> list[Any]:
    """What the first items hold, and where they stand."""
    return [(item.batches[0].tolist(), item.epoch, item.batch, item.last) for item in islice(items, count)]


@pytest.mark.parametrize(("length", "start", "count"), [(3, (0, 0), 7), (9, (1, 3), 8), (20, (2, 1), 20)])
def test_batches_are_those_of_workers_that_start_late(length: int, start: tuple[int, int], count: int) -> None:
    """Order and random numbers of each sample do not depend on when its worker was started; from any place on, over short epochs too."""
    at = state_at(seed=5, epoch=start[0], batch=start[1])
    early, late = (values(batches(Source(loader_of(Noisy(length)), ahead=ahead), at), count) for ahead in (True, False))
    assert early == late


def test_workers_of_the_next_epoch_are_there_before_this_one_ends() -> None:
    """As soon as the last batch of an epoch has been given to a worker, those of the next epoch start."""
    items = batches(loader_of(Numbers(40)), state_at())
    seen = [(item.epoch, item.batch, alive()) for item in islice(items, 22)]
    counts = {(epoch, batch): count for epoch, batch, count in seen}
    assert counts[0, 1] == 2
    assert counts[0, 20] == 4
    assert counts[1, 1] == 2
    items.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator


@pytest.mark.parametrize(("ahead", "expected"), [(False, 2), (1, 2), (2, 4)])
def test_no_worker_starts_for_an_epoch_that_will_not_be_read(ahead: Any, expected: int) -> None:
    """A source that knows how many epochs there are, or was told not to, starts none in vain."""
    items = batches(Source(loader_of(Numbers(8)), ahead=ahead), state_at())
    assert [alive() for _ in islice(items, 4)][-1] == expected
    items.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator


def test_fit_starts_none_behind_its_last_epoch() -> None:
    """With `max_epochs`, the workers of each epoch but the first start early, and none beyond the last."""
    counts: list[int] = []
    base = tiny_task()

    def train_step(model: Any, batch: Any) -> Any:
        counts.append(alive())
        return model(torch.ones(2, 4)).square().mean()

    task = type(base)(base.model, train_step, configure_optimizers=base.configure_optimizers)
    for ahead, expected in ((True, 4), (False, 2)):
        counts.clear()
        config = FitConfig(max_epochs=2, progress=False, device="cpu", workers_ahead=ahead)
        fit(TrainState.create(task), Loaders(train=loader_of(Numbers(8))), config)
        assert (counts[3], counts[7]) == (expected, 2)


@pytest.mark.parametrize("count", [4, 5, 8])
def test_a_run_that_stops_leaves_no_worker(count: int) -> None:
    """At the end of an epoch, where the next one's workers have started, and in the middle of one."""
    task = tiny_task()
    step = pipe(lambda model, batch: model(torch.ones(2, 4)).square().mean(), grad(), apply(), stop_when(max_steps(count)))
    *_, (state, _) = run(step, TrainState.create(task), Source(loader_of(Numbers(8))))
    assert state.progress.step == count
    assert alive() == 0


def test_an_error_of_the_next_epoch_is_raised_when_it_is_its_turn() -> None:
    """What fails while workers start early says so where it would have without that, behind the epoch under way."""

    class Failing(torch.utils.data.SequentialSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Any:
            if self.epoch:
                raise ValueError("no order for this epoch")
            return iter(range(len(self.data_source)))

    data = Numbers(8)
    items = batches(DataLoader(data, batch_size=2, sampler=Failing(data), **WORKERS), state_at())
    assert len(list(islice(items, 4))) == 4
    with pytest.raises(ValueError, match="no order for this epoch"):
        next(items)


def test_a_worker_that_dies_early_is_named_when_its_epoch_begins() -> None:
    """A worker of the next epoch that is killed while this one goes on does not end this one."""
    items = batches(loader_of(Numbers(40)), state_at())
    before: set[int] = set()
    for item in islice(items, 20):
        before = before or {process.pid or 0 for process in multiprocessing.active_children()}
        if item.last:
            for process in multiprocessing.active_children():
                if process.pid not in before:
                    os.kill(process.pid or 0, signal.SIGKILL)
                    process.join()
    with pytest.raises(LoaderError, match="this worker process loaded data and died"):
        list(islice(items, 20))


def test_a_run_that_goes_on_is_the_same(tmp_path: Any) -> None:
    """Stopped between two epochs, where workers had started for nothing, and gone on from there: bitwise the run that was not."""
    task = tiny_task()
    step = pipe(lambda model, batch: (model(batch[0][:, :1].float().expand(-1, 4)) * batch[0][0, 1]).square().mean(), grad(), apply())
    loader = loader_of(Pairs(8))
    states = [state.copy() for state, _ in islice(run(step, TrainState.create(task), loader), 8)]
    for k in (3, 4, 5):
        resumed = list(islice(run(step, states[k - 1], loader), 8 - k))[-1][0]
        assert_trees_equal(resumed, states[-1])


class Pairs(Numbers):
    """A number and a draw."""

    def __getitem__(self, index: int) -> Any:
        return (torch.tensor([float(index), torch.rand(()).item()]),)


class Stream(torch.utils.data.IterableDataset[Any]):
    """Numbers with a draw each, as many for every worker."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Any:
        return (number + torch.rand(1) for number in range(self.length))


def stream_of(length: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(Stream(length), batch_size=2, **{**WORKERS, **options})


@pytest.mark.filterwarnings("ignore::fnlight.errors.LoaderWarning")  # a stream is skipped by reading it
@pytest.mark.parametrize(
    ("start", "options"), [((0, 0), {}), ((1, 1), {}), ((0, 0), {"persistent_workers": True}), ((0, 0), {"num_workers": 0})]
)
def test_a_stream_yields_what_it_does_where_workers_start_late(start: tuple[int, int], options: dict[str, Any]) -> None:
    """Also from within an epoch on, with workers that persist, and with none."""
    if not options.get("num_workers", 2):
        options = {**options, "multiprocessing_context": None}
    at = state_at(seed=5, epoch=start[0], batch=start[1])
    early, late = (values(batches(Source(stream_of(6, **options), ahead=ahead), at), 15) for ahead in (True, False))
    assert early == late
    assert {item[1] for item in early} >= {start[0] + 1, start[0] + 2}
    assert early[0][0] != early[6 - start[1]][0]  # another epoch draws other numbers


def test_workers_of_a_stream_are_there_when_its_last_batch_is_handed_out() -> None:
    """They start while the last step, the evaluation and the checkpoint are under way; none beyond the last epoch."""
    items = batches(Source(stream_of(6), ahead=2), state_at())
    counts = [(item.epoch, item.last, alive()) for item in islice(items, 12)]
    assert [count for _, last, count in counts if last] == [2, 0]  # those of the ended epoch are gone
    items.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator


@pytest.mark.parametrize("count", [5, 6, 7])
def test_a_run_over_a_stream_that_stops_leaves_no_worker(count: int) -> None:
    """At the last batch of an epoch, where the next one's workers have started, and beside it."""
    step = pipe(lambda model, batch: model(torch.ones(2, 4)).square().mean(), grad(), apply(), stop_when(max_steps(count)))
    *_, (state, _) = run(step, TrainState.create(tiny_task()), Source(stream_of(6)))
    assert state.progress.step == count
    assert alive() == 0
