"""`Console`: a bar on a terminal, plain lines elsewhere, and never in the way of the training."""

import io
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fnlight.errors import ConfigError
from fnlight.metrics import Text
from fnlight.sinks import Console
from fnlight.state import Record
from tests.repo.source import ROOT


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(*records: tuple[float, Record], **options: Any) -> list[str]:
    """What is printed when records come at given times."""
    clock, stream = Clock(), io.StringIO()
    console = Console(clock=clock, stream=stream, force_terminal=False, **options)
    for clock.now, record in records:
        console(record)
    console.close()
    return stream.getvalue().splitlines()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal in memory, 100 columns wide."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return io.StringIO()


def plain(text: str) -> str:
    """Text without a terminal's control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_line_says_where_the_run_stands() -> None:
    """A line holds steps, epoch, the record's metrics, the rate, and elapsed and remaining time."""
    shown = lines(
        (100.0, Record(50, 0, {"train/loss": 0.123456, "lr": 0.001})),
        (110.0, Record(100, 1, {"train/loss": 0.1, "val/loss": 2e-7})),
        (3810.0, Record(200, 2, {"train/loss": float("nan")})),
        total_steps=1000,
    )
    assert shown == [
        "step 50/1000  epoch 0  train/loss 0.1235  lr 0.001  0:00 elapsed",
        "step 100/1000  epoch 1  train/loss 0.1  val/loss 2e-07  5 steps/s  0:10 elapsed  3:00 left",
        "step 200/1000  epoch 2  train/loss nan  0.0404 steps/s  1:01:50 elapsed  5:29:47 left",
    ]


def test_there_is_a_line_every_few_seconds_and_at_every_evaluation_and_the_last() -> None:
    """Records in between are passed over, but evaluations never, nor the last record."""
    records = [(0.5 * i, Record(i, 0, {"train/loss": 1.0} | ({"val/loss": 2.0} if i == 13 else {}))) for i in range(1, 26)]
    assert [int(line.split()[1]) for line in lines(*records)] == [1, 11, 13, 23, 25]
    assert [int(line.split()[1]) for line in lines(*records, interval=2)] == [1, 5, 9, 13, 17, 21, 25]
    assert len(lines(*records, interval=0)) == 25


@pytest.mark.parametrize("name", ["train/acc", "train_epoch/loss", "lr", "lr/0", "loss"])
def test_training_metrics_do_not_break_the_pace(name: str) -> None:
    """Only names of an evaluation, such as val/loss, are shown at once."""
    assert len(lines(*((0.1 * i, Record(i, 0, {name: 1.0})) for i in range(30)))) == 2


def test_the_last_line_is_printed_once() -> None:
    """A record that was shown is not shown again when the console is closed."""
    assert len(lines((0.0, Record(1, 0, {"train/loss": 1.0})))) == 1


def test_without_a_total_there_is_no_remaining_time() -> None:
    """What is not known is not shown."""
    assert lines((0.0, Record(1, 0, {})), (10.0, Record(3, 0, {})))[1] == "step 3  epoch 0  0.2 steps/s  0:10 elapsed"


def test_a_resumed_run_counts_its_own_steps() -> None:
    """Rate and remaining time know nothing of the steps of an earlier process."""
    shown = lines((0.0, Record(5_000, 5, {})), (10.0, Record(5_010, 5, {})), total_steps=5_020)
    assert shown[1] == "step 5010/5020  epoch 5  1 steps/s  0:10 elapsed  0:10 left"


def test_a_run_past_its_total_has_nothing_left() -> None:
    """Remaining time is never negative."""
    assert lines((0.0, Record(5, 0, {})), (10.0, Record(15, 0, {})), total_steps=10)[1].endswith(
        "15/10  epoch 0  1 steps/s  0:10 elapsed  0:00 left"[3:]
    )


def test_a_console_that_is_closed_or_starts_over_begins_afresh() -> None:
    """After close, and when steps go back, elapsed time and rate begin anew."""
    clock, stream = Clock(), io.StringIO()
    console = Console(clock=clock, stream=stream, force_terminal=False, interval=0)
    for clock.now, step in ((0.0, 10), (1.0, 20), (2.0, 5), (3.0, 6)):
        console(Record(step, 0, {}))
    console.close()
    console.close()
    clock.now = 50.0
    console(Record(7, 0, {}))
    console.close()
    assert [line.split("  ")[2:] for line in stream.getvalue().splitlines()] == [
        ["0:00 elapsed"], ["10 steps/s", "0:01 elapsed"], ["0:00 elapsed"], ["1 steps/s", "0:01 elapsed"], ["0:00 elapsed"],
    ]  # fmt: skip


def test_samples_and_waiting_are_means_since_the_beginning() -> None:
    """Each record tells of the time since the one before; what is shown is that of all of it, and no metric gives way for it."""
    timed = [
        Record(n, 0, {"train/loss": 0.5, "samples/s": rate, "time/data": share})
        for n, rate, share in ((10, 9.0, 0.9), (20, 8.0, 0.5), (30, 20.0, 0.1))
    ]
    shown = lines((100.0, timed[0]), (101.0, timed[1]), (104.0, timed[2]), interval=0)
    assert shown[0] == "step 10  epoch 0  train/loss 0.5  0:00 elapsed"
    assert shown[1] == "step 20  epoch 0  train/loss 0.5  10 steps/s  8 samples/s  data 50%  0:01 elapsed"
    assert shown[2] == "step 30  epoch 0  train/loss 0.5  5 steps/s  17 samples/s  data 20%  0:04 elapsed"


def test_times_are_no_evaluation() -> None:
    """A record of training that tells its times does not break the pace of the lines."""
    timed = {"train/loss": 0.5, "samples/s": 9.0, "time/data": 0.5, "time/step": 0.5}
    assert len(lines(*((100.0 + n, Record(n, 0, timed)) for n in range(1, 5)))) == 2


def test_the_losses_and_three_others_are_shown_unless_names_are_chosen() -> None:
    """By default there are at most five names, those of losses always; chosen names are shown alone."""
    given = {"train/a": 1.0, "train_epoch/a": 9.0, "val/b": 2.0, "lr": 3.0, "val/c": 4.0, "val/loss": 5.0, "train/loss": 6.0}
    record = (0.0, Record(1, 0, given | {"note": Text("x")}))
    assert lines(record) == ["step 1  epoch 0  train/loss 6  val/loss 5  train/a 1  val/b 2  lr 3  0:00 elapsed"]
    assert lines(record, metrics=["val/c", "train/a"]) == ["step 1  epoch 0  val/c 4  train/a 1  0:00 elapsed"]
    assert lines(record, metrics="val/c") == ["step 1  epoch 0  val/c 4  0:00 elapsed"]


def test_the_bar_shows_steps_times_and_the_newest_metrics(screen: io.StringIO) -> None:
    """A terminal shows one bar, redrawn in place, which keeps metrics of records before, and a dash for those to come."""
    clock = Clock()
    console = Console(200, ["train/loss", "val/acc", "val/none"], stream=screen, clock=clock, force_terminal=True)
    console(Record(50, 0, {"train/loss": 0.5}))
    clock.now = 10.0
    console(Record(100, 1, {"val/acc": 0.75}))
    console.close()
    text = plain(screen.getvalue())
    assert re.search(r"epoch 0 ━+[^\n]* 50/200 0:00 elapsed", text)
    assert re.search(r"epoch 1 ━+[^\n]* 100/200 5 steps/s 0:10 elapsed 0:20 left", text)
    assert "train/loss 0.5  val/acc 0.75  val/none -" in text
    assert "\x1b[1A" in screen.getvalue(), "the bar must be redrawn in place"
    assert screen.getvalue().endswith("\x1b[?25h"), "the cursor must be shown again"


def test_the_bar_is_drawn_ten_times_a_second_at_most(screen: io.StringIO) -> None:
    """Many records cost few drawings; evaluations and the last record are drawn all the same."""
    clock = Clock()
    console = Console(stream=screen, clock=clock, force_terminal=True)
    for i in range(1, 101):
        clock.now = i / 100
        console(Record(i, 0, {"train/loss": 1.0} | ({"val/loss": 1.0} if i == 55 else {})))
    console.close()
    drawn = [int(step) for step in re.findall(r"(\d+) steps ", plain(screen.getvalue()))]
    shown = sorted(set(drawn))
    assert 10 <= len(shown) <= 13
    assert {1, 55, 100} <= set(shown)


def test_without_a_total_the_terminal_counts(screen: io.StringIO) -> None:
    """There is no bar without an end, but a count."""
    console = Console(stream=screen, clock=Clock(), force_terminal=True)
    console(Record(7, 0, {}))
    console.close()
    assert "epoch 0 7 steps 0:00 elapsed" in plain(screen.getvalue())
    assert "━" not in screen.getvalue()


def test_the_bar_starts_no_thread_and_leaves_the_streams(screen: io.StringIO) -> None:
    """While a bar is drawn there are as many threads as before, and the streams of the process are not replaced."""
    before = threading.active_count(), sys.stdout, sys.stderr
    console = Console(10, stream=screen, force_terminal=True)
    console(Record(1, 0, {"train/loss": 1.0}))
    during = threading.active_count(), sys.stdout, sys.stderr
    console.close()
    assert before == during


def test_a_bar_that_nobody_closes_gives_the_cursor_back(screen: io.StringIO) -> None:
    """When the console is forgotten its bar ends."""
    console = Console(10, stream=screen, force_terminal=True)
    console(Record(1, 0, {}))
    assert "\x1b[?25h" not in screen.getvalue()
    del console
    assert screen.getvalue().endswith("\x1b[?25h")


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_lines(term: str, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that cannot redraw is no place for a bar."""
    monkeypatch.setenv("TERM", term)
    console = Console(10, stream=screen, clock=Clock(), force_terminal=True)
    console(Record(1, 0, {"train/loss": 1.0}))
    console.close()
    assert screen.getvalue() == "step 1/10  epoch 0  train/loss 1  0:00 elapsed\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stream_that_breaks_ends_the_display_not_the_training(terminal: bool, screen: io.StringIO) -> None:
    """A closed stream, none at all, or a reader that went away raise nothing."""
    read, written = os.pipe()
    os.close(read)
    pipe = io.TextIOWrapper(io.FileIO(written, "w"), write_through=True)
    screen.close()
    for stream in (screen, pipe):
        console = Console(10, stream=stream, force_terminal=terminal)
        for step in range(3):
            console(Record(step, 0, {"val/loss": 1.0}))
        console.close()
        assert console._run is None
    with pytest.raises(BrokenPipeError, match="Broken pipe"):
        pipe.write("what was to be written is lost")
    pipe.close()


def test_no_stream_at_all_is_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without a standard error, as of a windowed program, trains all the same."""
    monkeypatch.setattr(sys, "stderr", None)
    console = Console(10)
    console(Record(1, 0, {"val/loss": 1.0}))
    console.close()
    assert console._run is None


def test_a_stream_of_few_letters_gets_what_it_can_show() -> None:
    """A name that an ASCII stream cannot hold is shown as far as possible."""
    raw = io.BytesIO()
    console = Console(stream=io.TextIOWrapper(raw, "ascii"), clock=Clock(), force_terminal=False)
    console(Record(1, 0, {"val/größe": 1.0}))
    console.close()
    assert raw.getvalue() == b"step 1  epoch 0  val/gr??e 1  0:00 elapsed\n"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"total_steps": -1}, r"Console\(total_steps=...\) must be a number of steps, or None where it is unknown, but got -1"),
        ({"total_steps": 1.5}, r"Console\(total_steps=...\) must be a number of steps"),
        ({"interval": -1}, r"Console\(interval=...\) must be seconds, at least 0, but got -1"),
        ({"interval": float("nan")}, r"Console\(interval=...\) must be seconds"),
        ({"metrics": [1]}, r"Console\(metrics=...\) must be names such as 'val/loss', or None, but got \[1\]"),
    ],
)
def test_what_cannot_mean_anything_is_refused(options: dict[str, Any], message: str) -> None:
    """Arguments are checked when the console is made."""
    with pytest.raises(ConfigError, match=message):
        Console(**options)


PROGRAM = """
import itertools, sys
from fnlight.sinks import Console
from fnlight.state import Record
console = Console(total_steps=3, clock=itertools.count().__next__)
for step in (1, 2, 3):
    console(Record(step, 0, {"train/loss": 0.5, "val/loss": 0.25}))
    print("result", step)
console.close()
print("the end")
"""


def test_in_a_pipe_there_are_plain_lines_and_the_output_is_the_programs_own() -> None:
    """A real process in a pipe writes plain lines to its standard error, and its standard output holds what it printed."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout == "result 1\nresult 2\nresult 3\nthe end\n"
    assert done.stderr.splitlines() == [
        "step 1/3  epoch 0  train/loss 0.5  val/loss 0.25  0:00 elapsed",
        "step 2/3  epoch 0  train/loss 0.5  val/loss 0.25  1 steps/s  0:01 elapsed  0:01 left",
        "step 3/3  epoch 0  train/loss 0.5  val/loss 0.25  1 steps/s  0:02 elapsed  0:00 left",
    ]


def terminal_output(to_terminal: tuple[str, ...], tmp_path: Path) -> tuple[str, str]:
    """What a real process writes to a real terminal, and what it writes to a file, as streams are sent to either."""
    ours, theirs = pty.openpty()
    with (tmp_path / "out").open("wb") as file:
        streams: dict[str, Any] = {name: theirs if name in to_terminal else file for name in ("stdout", "stderr")}
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, **streams)
    os.close(theirs)
    text = b"".join(_all_of(ours)).decode()
    assert process.wait(timeout=120) == 0
    return text.replace("\r\n", "\n"), (tmp_path / "out").read_text()


def _all_of(descriptor: int) -> Iterator[bytes]:
    with os.fdopen(descriptor, "rb", buffering=0) as ours:
        while True:
            try:
                data = ours.read(4096)
            except OSError:  # how Linux says that nobody holds the other end
                return
            if not data:
                return
            yield data


def test_on_a_real_terminal_there_is_a_bar_below_what_is_printed(tmp_path: Path) -> None:
    """A process on a pseudo terminal draws a bar, and what it prints meanwhile stands above, each line whole."""
    text, file = terminal_output(("stdout", "stderr"), tmp_path)
    assert file == ""
    assert "\x1b[?25l" in text, "a bar hides the cursor"
    assert text.index("\x1b[?25h") < text.index("the end"), "a bar that is over shows it again"
    seen = plain(text)
    assert re.search(r"epoch 0 ━+ 3/3 1 steps/s 0:02 elapsed 0:00 left", seen)
    printed = [line for line in seen.replace("\r", "\n").split("\n") if "result" in line or "the end" in line]
    assert [line.strip() for line in printed] == ["result 1", "result 2", "result 3", "the end"]


def test_output_that_goes_to_a_file_stays_there_when_the_bar_is_on_a_terminal(tmp_path: Path) -> None:
    """With ``python train.py > results`` the results are in the file and the bar is on the terminal."""
    text, file = terminal_output(("stderr",), tmp_path)
    assert file == "result 1\nresult 2\nresult 3\nthe end\n"
    assert "result" not in text
    assert "3/3" in plain(text)
