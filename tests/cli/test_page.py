"""The pages about the command line and about failed steps show what the commands print."""

import doctest
import shlex
import subprocess
import sys

import pytest

from fnlight.cli import run
from tests.repo.source import ROOT, fences


def commands(page):
    """Each command of a page with what it prints."""
    blocks = [text for _, language, text in fences(page) if language == "text"]
    return [part.split("\n", 1) for block in blocks for part in block.split("$ fnlight ")[1:]]


def leave(page, tmp_path, monkeypatch):
    """Run the program of a page, and go where its files are."""
    subprocess.run(
        [sys.executable, str(ROOT / "tests/repo/run_page.py"), str(page)], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize(("name", "count"), [("command-line", 7), ("failed-steps", 1)])
def test_every_command_of_the_page_prints_what_the_page_says(name, count, tmp_path, monkeypatch, capsys):
    """Commands are run in the order of the page; dots stand for what may differ."""
    page = ROOT / "docs" / f"{name}.md"
    leave(page, tmp_path, monkeypatch)
    found = commands(page)
    assert len(found) == count
    checker = doctest.OutputChecker()
    for command, printed in found:
        code = run(shlex.split(command))
        out = capsys.readouterr().out
        assert code == (1 if command.startswith("diff") else 0), command
        assert checker.check_output(printed, out, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), f"fnlight {command} prints\n{out}"
    if name == "command-line":
        assert sorted(path.name for path in (tmp_path / "runs/a/checkpoints").iterdir()) == ["step-00000030", "step-00000040"]
    sys.modules.pop("train", None)
