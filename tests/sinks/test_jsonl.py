"""`JSONL`: lines that any reader reads, whole ones only, and none twice."""

import json
import math
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fnlight.errors import ConfigError
from fnlight.metrics import Figure, Histogram, Image, Mean, Text
from fnlight.sinks import JSONL
from fnlight.state import Record
from tests.repo.source import ROOT


def strict(line: str) -> Any:
    """Read a line as the standard says, which knows no NaN."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def rows(path: Path) -> list[Any]:
    """All lines, each of which must be whole."""
    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [strict(line) for line in text.split("\n")[:-1]]


def steps(path: Path) -> list[int]:
    """The steps of all lines."""
    return [row["step"] for row in rows(path)]


def test_one_line_a_record(tmp_path: Path) -> None:
    """A line holds step, epoch and the metrics as floats; media are left out."""
    sink, path = JSONL(tmp_path / "log.jsonl"), tmp_path / "log.jsonl"
    media = {"i": Image(torch.zeros(2, 2)), "h": Histogram(torch.zeros(2)), "f": Figure(None), "t": Text("x")}
    numbers = {"a": 1, "b": torch.tensor(0.5, dtype=torch.bfloat16), "c": Mean(3.0, 2), "ü": True}
    sink(Record(10, 1, {**numbers, **media}))
    sink(Record(20, 2, {"a": 0.1}))
    sink.close()
    assert path.read_text(encoding="utf-8").splitlines() == [
        '{"step": 10, "epoch": 1, "metrics": {"a": 1.0, "b": 0.5, "c": 1.5, "ü": 1.0}}',
        '{"step": 20, "epoch": 2, "metrics": {"a": 0.1}}',
    ]


@given(st.dictionaries(st.text(), st.floats(), max_size=5), st.integers(0, 2**53), st.integers(0, 2**31))
def test_any_names_and_any_floats_are_read_back_exactly(metrics: dict[str, float], step: int, epoch: int) -> None:
    """A strict parser reads every record back bit by bit; ``float`` turns NaN and the infinities into what they were."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            json.dumps(list(metrics), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            metrics = {}  # half a character cannot be written
        sink = JSONL(Path(folder) / "log.jsonl")
        sink(Record(step, epoch, metrics))
        sink.close()
        (row,) = rows(Path(folder) / "log.jsonl")
    assert (row["step"], row["epoch"], row["metrics"].keys()) == (step, epoch, metrics.keys())
    for name, value in metrics.items():
        read = float(row["metrics"][name])
        assert (math.isnan(value) and math.isnan(read)) or (read == value and math.copysign(1, read) == math.copysign(1, value))
        assert isinstance(row["metrics"][name], float) == math.isfinite(value)


def test_a_resumed_run_leaves_no_duplicates(tmp_path: Path) -> None:
    """Reopening at step s drops the lines of steps from s on, and no others."""
    path = tmp_path / "log.jsonl"
    for first in (10, 30, 20):
        sink = JSONL(path)
        for step in range(first, first + 30, 10):
            sink(Record(step, first, {}))
        sink.close()
    assert [(row["step"], row["epoch"]) for row in rows(path)] == [(10, 10), (20, 20), (30, 20), (40, 20)]


def test_a_run_that_starts_over_without_closing_leaves_no_duplicates(tmp_path: Path) -> None:
    """A step below the last one counts as reopening."""
    sink = JSONL(tmp_path / "log.jsonl")
    for step in (10, 20, 30, 15, 20):
        sink(Record(step, 0, {}))
    sink.close()
    assert steps(tmp_path / "log.jsonl") == [10, 15, 20]


def test_two_records_of_one_step_are_two_lines(tmp_path: Path) -> None:
    """Nothing is dropped while a file is open: training and evaluation may come one after the other."""
    sink = JSONL(tmp_path / "log.jsonl")
    sink(Record(10, 0, {"train/loss": 1.0}))
    sink(Record(10, 0, {"val/loss": 2.0}))
    sink.close()
    assert [row["metrics"] for row in rows(tmp_path / "log.jsonl")] == [{"train/loss": 1.0}, {"val/loss": 2.0}]


def test_a_line_torn_anywhere_is_repaired(tmp_path: Path) -> None:
    """Wherever a killed run broke off, the whole lines stay and the torn one goes."""
    path = tmp_path / "log.jsonl"
    sink = JSONL(path)
    for step in (1, 2):
        sink(Record(step, 0, {"loss": 0.5}))
    sink.close()
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        sink(Record(3, 0, {}))
        sink.close()
        assert steps(path) == [*range(1, whole[:cut].count(b"\n") + 1), 3]


def test_zeros_behind_the_end_are_repaired(tmp_path: Path) -> None:
    """Zeros, which a file system may leave after a power failure, are no line."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1, "epoch": 0, "metrics": {}}\n{"step": 2' + bytes(100))
    sink = JSONL(path)
    sink(Record(2, 0, {}))
    sink.close()
    assert steps(path) == [1, 2]


@pytest.mark.parametrize("text", ['{"text": "mine"}\n', "[\n1\n]", "step,epoch\n1,0\n", "[1]\n", "\n", "notes"])
def test_a_file_of_somebody_else_is_left_alone(text: str, tmp_path: Path) -> None:
    """A file that is no log is neither cut nor continued, and the error says so."""
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="this file holds lines that are no records, so it is left alone; give the path of a new file"):
        JSONL(path)(Record(1, 0, {}))
    assert path.read_text() == text


def test_a_disk_that_fills_up_within_a_line_leaves_whole_lines(tmp_path: Path) -> None:
    """A line that does not fit is taken back, the error names the file, and once there is room the log goes on."""
    program = """
import resource, sys
from fnlight.sinks import JSONL
from fnlight.state import Record
sink = JSONL(sys.argv[1])
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
try:
    for step in range(100):
        sink(Record(step, 0, {"loss": 0.5}))
except OSError as error:
    print(step, error)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
sink(Record(step, 0, {"loss": 0.5}))
"""
    path = tmp_path / "log.jsonl"
    done = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    failed = int(done.stdout.split()[0])
    assert f"cannot write '{path}': File too large" in done.stdout
    assert steps(path) == list(range(failed + 1))
    assert failed >= 2


def test_a_killed_run_leaves_lines_that_the_next_one_continues(tmp_path: Path) -> None:
    """After SIGKILL at any moment every line but the last is whole, and the next run goes on behind them."""
    program = """
import itertools, sys
from fnlight.sinks import JSONL
from fnlight.state import Record
sink = JSONL(sys.argv[1])
for step in itertools.count():
    sink(Record(step, 0, {"loss": 0.5}))
    if step == 1000:
        print("on the way", flush=True)
"""
    path = tmp_path / "log.jsonl"
    with subprocess.Popen([sys.executable, "-c", program, path], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on the way\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    last = path.read_bytes().count(b"\n")
    assert last > 1000
    sink = JSONL(path)
    sink(Record(last, 0, {}))
    sink.close()
    assert steps(path) == list(range(last + 1))
