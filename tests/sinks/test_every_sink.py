"""What holds for every sink: nothing before the first record, any number of closes, and a text that makes it again."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fnlight as fl
from fnlight.errors import ConfigError, StepError
from fnlight.fit import parse
from fnlight.sinks import CSV, JSONL, Console, TensorBoard, fan_out
from fnlight.state import Record

FILES = [pytest.param(lambda p: JSONL(p / "a" / "log.jsonl"), id="JSONL"), pytest.param(lambda p: CSV(p / "a" / "log.csv"), id="CSV")]
FILES.append(pytest.param(lambda p: TensorBoard(p / "a" / "b", hparams={"lr": 0.1}), id="TensorBoard"))
TEXTS = [
    "JSONL('log.jsonl')",
    'CSV("runs/it\'s.csv")',
    "TensorBoard('runs/a')",
    "TensorBoard('runs/a', hparams={'lr': 0.1, 'name': 'b'})",
    "Console()",
    "Console(total_steps=100, metrics=('val/loss',), interval=1, force_terminal=False)",
]


@pytest.mark.parametrize("make", FILES)
def test_nothing_is_created_before_the_first_record(make: Any, tmp_path: Path) -> None:
    """A sink that got no record leaves no file and no directory, however often it is flushed and closed."""
    sink = make(tmp_path)
    sink.flush()
    sink.close()
    sink.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", FILES)
def test_a_sink_makes_parents_and_closes_twice_and_opens_again(make: Any, tmp_path: Path) -> None:
    """Parent directories are made, a second close does nothing, and a record after it is written like any other."""
    sink = make(tmp_path)
    for step in (1, 2):
        sink(Record(step, 0, {"loss": float(step)}))
        sink.flush()
        sink.close()
        sink.close()
    written = b"".join(path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file())
    assert written.count(b"loss") in (1, 2), "one column, or one entry a record"
    assert len(written) > 30
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("make", FILES)
def test_what_was_recorded_can_be_read_at_once(make: Any, tmp_path: Path) -> None:
    """A record is in the file when the call returns, without a flush, so a killed run loses nothing that was recorded."""
    sink = make(tmp_path)

    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())

    sizes = [0]
    for step in range(1, 4):
        sink(Record(step, 0, {"loss": 0.5}))
        sizes.append(size())
    sink.flush()
    assert sizes == sorted(set(sizes))
    assert size() == sizes[-1], "flush had something left to write"
    sink.close()


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_of_a_sink_makes_it_again(text: str) -> None:
    """``repr`` is source text that a configuration reads back."""
    assert repr(parse(text)) == text


def test_a_path_object_is_written_as_text(tmp_path: Path) -> None:
    """A ``Path`` gives the same sink as its text."""
    assert repr(JSONL(tmp_path / "x")) == repr(JSONL(str(tmp_path / "x")))


@pytest.mark.parametrize("kind", [JSONL, CSV, TensorBoard])
@pytest.mark.parametrize("path", ["", None, 3, b"log"])
def test_what_is_no_path_is_refused_when_the_sink_is_made(kind: Any, path: Any) -> None:
    """A path that cannot be one is an error before any work."""
    with pytest.raises(ConfigError, match=rf"{kind.__name__}\(path\) must be the path of a file or directory to write to, but got"):
        kind(path)


@pytest.mark.parametrize("kind", [JSONL, CSV, TensorBoard])
def test_an_address_is_refused_rather_than_made_a_directory(kind: Any) -> None:
    """Sinks write to local paths only, and say so."""
    with pytest.raises(ConfigError, match="writes to local paths only, but got 's3://bucket/log'"):
        kind("s3://bucket/log")


@pytest.mark.parametrize("make", FILES)
def test_a_place_that_cannot_be_written_is_named(make: Any, tmp_path: Path) -> None:
    """The error says which sink, which path and what to do, and stays an error of the operating system."""
    (tmp_path / "a").write_text("a file where a directory should be")
    sink = make(tmp_path)
    with pytest.raises(OSError, match=rf"{type(sink).__name__}\('.*a.*\) cannot write '{tmp_path}/a/.*give (another path|a path)"):
        sink(Record(1, 0, {"loss": 0.5}))
    (tmp_path / "a").unlink()
    sink(Record(1, 0, {"loss": 0.5}))
    sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device here")
@pytest.mark.parametrize("kind", [JSONL, CSV])
def test_a_full_disk_is_named(kind: Any) -> None:
    """The error of a full disk says to free some space."""
    sink = kind("/dev/full")
    with pytest.raises(
        OSError, match=r"'/dev/full'\) cannot write '/dev/full': No space left on device; free some space and resume the run"
    ):
        sink(Record(1, 0, {"loss": 0.5}))
    sink.close()


@pytest.mark.parametrize("kind", [JSONL, CSV])
def test_a_directory_in_place_of_a_file_is_named(kind: Any, tmp_path: Path) -> None:
    """A path that is a directory asks for the name of a file."""
    with pytest.raises(IsADirectoryError, match="give the name of a file in that directory"):
        kind(tmp_path)(Record(1, 0, {"loss": 0.5}))


@pytest.mark.parametrize("make", [*FILES, pytest.param(lambda p: Console(stream=io.StringIO(), force_terminal=False), id="Console")])
@pytest.mark.parametrize("value", ["0.5", None, torch.zeros(2), object()])
def test_a_metric_that_is_no_number_is_named(make: Any, value: Any, tmp_path: Path) -> None:
    """The error names the metric, the step and the type."""
    sink = make(tmp_path)
    with pytest.raises(
        StepError, match=rf"metric 'note' at step 7 must be one number or media such as fl.Image, but is {type(value).__name__}"
    ):
        sink(Record(7, 0, {"note": value}))
    sink.close()


def test_fan_out_gives_each_record_to_all_in_order() -> None:
    """Every sink gets every record, in the order of the sinks; plain functions do."""
    seen: list[tuple[str, int]] = []
    sink = fan_out(lambda r: seen.append(("a", r.step)), lambda r: seen.append(("b", r.step)))
    sink(Record(1, 0, {}))
    sink(Record(2, 0, {}))
    sink.flush()
    sink.close()
    assert seen == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_a_sink_that_fails_does_not_keep_a_record_from_the_others(tmp_path: Path) -> None:
    """The others write what the failing one could not, and its error is raised afterwards; so it is with close."""

    class Failing:
        def __call__(self, record: Any) -> None:
            raise ValueError("the first one broke")

        close = flush = lambda self: (_ for _ in ()).throw(ValueError("the first one broke"))

    after = JSONL(tmp_path / "log.jsonl")
    sink = fan_out(Failing(), after)
    for call in (lambda: sink(Record(1, 0, {})), sink.flush, sink.close):
        with pytest.raises(ValueError, match="the first one broke"):
            call()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "epoch": 0, "metrics": {}}\n'
    assert after._file is None


def test_fan_out_reads_as_it_is_written() -> None:
    """``repr`` is source text; functions show their name."""
    assert repr(fan_out(JSONL("a"), fan_out(CSV("b")), print)) == "fan_out(JSONL('a'), fan_out(CSV('b')), print)"


def test_fan_out_refuses_what_is_no_sink() -> None:
    """A path is no sink."""
    with pytest.raises(ConfigError, match=r"fan_out takes functions of a record, but got str: 'log\.jsonl'"):
        fan_out(JSONL("a"), "log.jsonl")


def test_a_training_that_is_done_again_from_the_middle_is_logged_once(tmp_path: Path) -> None:
    """Three epochs, then the last two again from the state of the first: every file holds each step once."""

    def train_step(model: Any, batch: Any) -> Any:
        return model(batch).square().mean()

    task = fl.Task(torch.nn.Linear(2, 1), train_step, configure_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    made = JSONL(tmp_path / "log.jsonl"), CSV(tmp_path / "log.csv"), TensorBoard(tmp_path / "tb")
    loaders = fl.Loaders(train=[torch.ones(1, 2)] * 4)

    def train(state: Any, epochs: int) -> Any:
        config = fl.FitConfig(max_epochs=epochs, sinks=made, log_every=fl.steps(2), progress=False, device="cpu")
        return fl.fit(state, loaders, config)

    first = train(fl.TrainState.create(task), 1)
    train(first, 3)
    once = made[0].path, Path(made[0].path).read_text(), Path(made[1].path).read_text()
    train(first, 3)
    assert once == (made[0].path, Path(made[0].path).read_text(), Path(made[1].path).read_text())
    assert [json.loads(line)["step"] for line in once[1].splitlines()] == [2, 4, 6, 8, 10, 12]
    shown = EventAccumulator(str(tmp_path / "tb"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]
