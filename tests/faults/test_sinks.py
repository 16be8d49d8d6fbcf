"""A sink that fails costs its own records and nothing else."""

import errno
import json
import os
import resource
import warnings
from pathlib import Path

import pytest
import torch

from fnlight import JSONL, FitConfig, TrainState, fit, last, load, newest, steps
from fnlight.errors import FaultWarning, StepError
from fnlight.testing import RecordingSink, assert_trees_equal, tiny_batches, tiny_task
from tests.faults.processes import in_a_child


class Moody:
    """A sink that fails at some records."""

    def __init__(self, fails, error=None):
        self.fails, self.error, self.taken = fails, error or ConnectionError("the server hung up"), []

    def __call__(self, record):
        if record.step in self.fails:
            raise self.error
        self.taken.append(record.step)

    def close(self):
        if "close" in self.fails:
            raise self.error


def trained(*sinks, max_steps=6, **options):
    config = FitConfig(max_steps=max_steps, sinks=sinks, log_every=steps(1), device="cpu", progress=False, **options)
    return fit(TrainState.create(tiny_task(), seed=1), tiny_batches(num_batches=8), config)


def test_training_goes_on_and_the_run_is_marked():
    """The others get every record, the failing one is told of once and asked again, and the weights are those of a run without faults."""
    moody, fine = Moody({2, 3}), RecordingSink()
    with pytest.warns(
        FaultWarning, match=r"the sink <.*Moody object> failed at step 2 and misses that record: ConnectionError: the server hung up"
    ) as caught:
        state = trained(moody, fine)
    assert [w.category for w in caught] == [FaultWarning]
    assert moody.taken == [1, 4, 5, 6]
    assert list(fine.steps("train/loss")) == [1, 2, 3, 4, 5, 6]
    (entry,) = state.memory["failed_sinks"].values()
    assert entry == {"first": 2, "last": 3, "records": 2, "error": "ConnectionError: the server hung up"}
    del state.store.memory["failed_sinks"]
    assert_trees_equal(state, trained(RecordingSink()))


def test_the_mark_is_saved_and_a_resumed_run_tells_again(tmp_path):
    """A checkpoint says what was missed before it; the count goes on, under the same name."""
    options = {"dir": tmp_path, "save_every": steps(1), "keep": last(9)}
    with pytest.warns(FaultWarning, match="failed at step 2"):
        trained(Moody({2, 5}), max_steps=3, **options)
    marks = list(load(newest(tmp_path), tiny_task()).memory["failed_sinks"].values())
    assert [(m["first"], m["records"]) for m in marks] == [(2, 1)]
    with pytest.warns(FaultWarning, match="failed at step 5"):
        state = trained(Moody({2, 5}), resume=True, **options)
    assert [(m["first"], m["last"], m["records"]) for m in state.memory["failed_sinks"].values()] == [(2, 5, 2)]


def test_a_sink_that_cannot_be_closed_is_told_of_and_the_others_are_closed():
    """The end of a run is no time for an error either."""
    fine = RecordingSink()
    with pytest.warns(
        FaultWarning, match=r"failed in close\(\): ConnectionError: the server hung up; what it was given last may be missing"
    ):
        trained(Moody({"close"}), fine)
    assert (fine.flushed, fine.closed) == (1, 1)


def test_a_metric_that_is_no_number_is_the_tasks_fault_and_raised(tmp_path):
    """An error of fnlight's own is about the run, not about the sink."""

    def bad(record):
        raise StepError("metric 'x' must be one number")

    with pytest.raises(StepError, match="must be one number"):
        trained(bad)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_log_whose_disk_fails_for_a_while_holds_whole_lines(tmp_path, code):
    """While it is so records are missed, not torn; afterwards the log goes on."""
    log = JSONL(tmp_path / "log.jsonl")
    broken = []

    class Device:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if len(broken) < 2:
                broken.append(self.file.write(data[: len(data) // 2]))
                raise OSError(code, os.strerror(code))
            return self.file.write(data)

    def opening(record):
        log(record)
        if not isinstance(log._file, Device):
            log._file = Device(log._file)

    with pytest.warns(FaultWarning, match=f"failed at step 2 .*{os.strerror(code)}"):
        state = trained(opening)
    log.close()
    lines = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [1, 4, 5, 6]
    assert state.memory["failed_sinks"]["opening"]["records"] == 2


def test_a_log_on_a_full_disk_is_left_whole_by_a_real_process(tmp_path):
    """The system itself refuses to let the file grow: training ends as it would have, and every line of the log is whole."""

    def run():
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = trained(JSONL(tmp_path / "log.jsonl"))
        return json.dumps([[str(w.message) for w in caught], state.progress.step, state.memory["failed_sinks"]])

    code, text = in_a_child(run)
    assert code == 0, text
    messages, step, failed = json.loads(text)
    assert ["File too large" in message for message in messages] == [True]
    assert (step, [f["last"] for f in failed.values()]) == (6, [6])
    text = Path(tmp_path / "log.jsonl").read_text()
    assert text.endswith("}\n")
    assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(1, text.count("\n") + 1))


def test_a_vanished_directory_of_a_log_is_survived(tmp_path):
    """Whoever deletes the log's directory under a running training loses the log, not the training."""
    log, folder = JSONL(tmp_path / "logs" / "log.jsonl"), tmp_path / "logs"

    def sink(record):
        if record.step == 3:
            log.close()
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        log(record)

    state = trained(sink)
    assert state.progress.step == 6
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [3, 4, 5, 6]
    log.close()
