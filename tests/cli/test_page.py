"""The page about the command line shows what the commands print."""

import doctest
import shlex
import subprocess
import sys

import pytest

from fnlight.cli import run
from tests.repo.source import ROOT, fences

PAGE = ROOT / "docs" / "command-line.md"


def commands():
    """Each command of the page with what it prints."""
    blocks = [text for _, language, text in fences(PAGE) if language == "text"]
    return [part.split("\n", 1) for block in blocks for part in block.split("$ fnlight ")[1:]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the program of the page leaves."""
    subprocess.run(
        [sys.executable, str(ROOT / "tests/repo/run_page.py"), str(PAGE)], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("train", None)


def test_every_command_of_the_page_prints_what_the_page_says(folder, capsys):
    """Commands are run in the order of the page; dots stand for what may differ."""
    found = commands()
    assert len(found) == 7
    checker = doctest.OutputChecker()
    for command, printed in found:
        code = run(shlex.split(command))
        out = capsys.readouterr().out
        assert code == (1 if command.startswith("diff") else 0), command
        assert checker.check_output(printed, out, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), f"fnlight {command} prints\n{out}"
    left = sorted(path.name for path in (folder / "runs/a/checkpoints").iterdir())
    assert left == ["step-00000030", "step-00000040"]
