"""`CSV`: a table that keeps everything, also when columns are added on the way."""

import csv
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fnlight.errors import ConfigError
from fnlight.metrics import Image
from fnlight.sinks import CSV
from fnlight.state import Record


def rows(path: Path) -> list[dict[str, str]]:
    """The rows below the header, read by the standard module."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def write(path: Path, *records: Record) -> None:
    """Open, write and close."""
    sink = CSV(path)
    for record in records:
        sink(record)
    sink.close()


def test_one_row_a_record(tmp_path: Path) -> None:
    """The header is step, epoch and the names; media are left out, missing cells are empty."""
    path = tmp_path / "log.csv"
    write(path, Record(1, 0, {"b": 0.1, "a": torch.tensor(2), "i": Image(torch.zeros(2, 2))}), Record(2, 1, {"a": float("inf")}))
    assert path.read_text() == "step,epoch,b,a\n1,0,0.1,2.0\n2,1,,inf\n"


def test_a_new_name_widens_the_table_and_keeps_every_cell(tmp_path: Path) -> None:
    """Names that turn up later get a column of their own; rows before have an empty cell there."""
    path = tmp_path / "log.csv"
    write(path, Record(1, 0, {}), Record(2, 0, {"a": 1.0}), Record(3, 0, {"b": 2.0, "c": 3.0}), Record(4, 0, {"a": 4.0}))
    assert path.read_text() == "step,epoch,a,b,c\n1,0,,,\n2,0,1.0,,\n3,0,,2.0,3.0\n4,0,4.0,,\n"
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


RECORDS = st.lists(st.dictionaries(st.text(st.characters(codec="utf-8")), st.floats(), max_size=4), max_size=6)


@given(RECORDS)
def test_whatever_was_recorded_is_read_back(given_metrics: list[dict[str, float]]) -> None:
    """Any names on one line and any floats come back exactly, in whatever order names turn up."""
    metrics = [{n: v for n, v in m.items() if n.splitlines() == [n] and n not in ("step", "epoch")} for m in given_metrics]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.csv"
        write(path, *(Record(step, 0, m) for step, m in enumerate(metrics)))
        found = rows(path) if metrics else []
    assert [int(row["step"]) for row in found] == list(range(len(metrics)))
    for row, expected in zip(found, metrics, strict=True):
        values = {name: float(cell) for name, cell in row.items() if name not in ("step", "epoch") and cell}
        assert values.keys() == expected.keys()
        assert all(values[n] == v or (math.isnan(v) and math.isnan(values[n])) for n, v in expected.items())


def test_a_resumed_run_leaves_no_duplicates_and_keeps_its_columns(tmp_path: Path) -> None:
    """Reopening at step s drops the rows from s on; the columns stay, and new ones may come at once."""
    path = tmp_path / "log.csv"
    write(path, *(Record(step, 0, {"a": 1.0}) for step in (10, 20, 30)))
    write(path, Record(20, 1, {"b": 2.0}), Record(30, 1, {"a": 3.0}))
    assert path.read_text() == "step,epoch,a,b\n10,0,1.0,\n20,1,,2.0\n30,1,3.0,\n"


def test_a_run_that_starts_over_without_closing_leaves_no_duplicates(tmp_path: Path) -> None:
    """A step below the last one counts as reopening; two records of one step are two rows."""
    path = tmp_path / "log.csv"
    write(path, *(Record(step, 0, {"a": 1.0}) for step in (10, 20, 30, 15, 15)))
    assert [row["step"] for row in rows(path)] == ["10", "15", "15"]


def test_a_row_torn_anywhere_is_repaired(tmp_path: Path) -> None:
    """Wherever a killed run broke off, header included, the whole rows stay and the torn one goes."""
    path = tmp_path / "log.csv"
    write(path, Record(1, 0, {"a": 0.25}), Record(2, 0, {"a": 0.75}))
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        write(path, Record(3, 0, {"a": 0.125}))
        found = [(row["step"], row["a"]) for row in rows(path)]
        kept = max(whole[:cut].count(b"\n") - 1, 0)
        assert found == [*[("1", "0.25"), ("2", "0.75")][:kept], ("3", "0.125")]


def test_a_failure_while_widening_leaves_the_table_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wider table is written beside the old one and put in its place at once, or not at all."""
    path = tmp_path / "log.csv"
    sink = CSV(path)
    sink(Record(1, 0, {"a": 1.0}))
    before = path.read_bytes()

    def full(*_: Any) -> None:
        assert path.read_bytes() == before
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"CSV\('.*log.csv'\) cannot write .* No space left on device; free some space and resume"):
            sink(Record(2, 0, {"b": 2.0}))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("log.csv", before)]
    sink(Record(2, 0, {"b": 2.0}))
    sink.close()
    assert path.read_text() == "step,epoch,a,b\n1,0,1.0,\n2,0,,2.0\n"


def test_widening_keeps_a_link_and_the_rights_of_the_file(tmp_path: Path) -> None:
    """A link stays a link, and what others may read they may read afterwards."""
    (tmp_path / "real").mkdir()
    path = tmp_path / "log.csv"
    path.symlink_to(tmp_path / "real" / "log.csv")
    write(path, Record(1, 0, {"a": 1.0}))
    path.chmod(0o640)
    write(path, Record(2, 0, {"b": 1.0}))
    assert path.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert [row["step"] for row in rows(path)] == ["1", "2"]


@pytest.mark.parametrize("text", ["name,age\nx,1\n", "step,epoch\nfirst,0\n", "notes", "\n", 'step,epoch,"x\n'])
def test_a_file_of_somebody_else_is_left_alone(text: str, tmp_path: Path) -> None:
    """A file that is no such table is neither cut nor continued, and the error says so."""
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=r"this file is no table with columns step,epoch,...; it is left alone; give the path of a new file"
    ):
        write(path, Record(1, 0, {"a": 1.0}))
    assert path.read_text() == text


@pytest.mark.parametrize("name", ["step", "epoch", "two\nlines", ""])
def test_a_name_that_cannot_head_a_column_is_refused(name: str, tmp_path: Path) -> None:
    """A metric called like a column that is there, or with a line break, is an error and no lost value."""
    with pytest.raises(ConfigError, match="a column must have a name of its own on one line; rename it"):
        CSV(tmp_path / "log.csv")(Record(1, 0, {name: 1.0}))
    assert list(tmp_path.iterdir()) == []
