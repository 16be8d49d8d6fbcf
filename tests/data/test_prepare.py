"""Laws of `prepare`: made once, whole, and by one of several processes."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from fnlight.data import prepare
from fnlight.errors import LoaderError


def made(path: str) -> None:
    """Write a folder, and note beside it that it was made."""
    os.makedirs(path)
    Path(path, "rows").write_text("1 2 3")
    with open(os.path.join(os.path.dirname(path), "log"), "a", encoding="utf-8") as log:
        log.write("made\n")


def child(path: str, start: Any) -> None:
    """Ask for it as soon as all others do."""
    start.wait()
    assert Path(prepare(path, made), "rows").read_text() == "1 2 3"


def test_one_of_several_processes_makes_it(tmp_path: Path) -> None:
    """The others wait, and find it whole."""
    context = multiprocessing.get_context("fork")
    start, path = context.Barrier(4), str(tmp_path / "data")
    processes = [context.Process(target=child, args=(path, start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "made\n"


def test_what_a_failure_has_left_is_made_again(tmp_path: Path) -> None:
    """A part is no whole, whether a process raised or died."""

    def fails(path: str) -> None:
        made(path)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        prepare(tmp_path / "data", fails)
    assert not (tmp_path / "data").exists()
    assert (Path(prepare(tmp_path / "data", made)) / "rows").exists()


def test_a_function_that_writes_nothing_is_named(tmp_path: Path) -> None:
    """It may have written to another place."""
    with pytest.raises(LoaderError, match=r"make must write a file or a folder to the path that it is given, but .*data.part is not there"):
        prepare(tmp_path / "data", lambda path: None)
