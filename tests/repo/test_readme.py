"""The README: a program by line 40 that runs, the two commands that do all the set-up, and a map of the source that is the folder."""

import os
import re
import subprocess

from tests.repo.source import ROOT, fences, nouns
from tests.repo.test_docs import assert_page_runs

README = ROOT / "README.md"


def test_the_first_program_ends_by_line_40() -> None:
    """Whoever opens the README sees a complete program on the first screen."""
    line, _, text = next(f for f in fences(README) if f[1] == "python")
    assert line + len(text.splitlines()) <= 40, f"the first python block of README.md ends on line {line + len(text.splitlines())}"


def test_every_block_runs() -> None:
    """Every Python block of the README runs, one after the other."""
    assert_page_runs(README)


def test_two_commands_do_all_the_set_up() -> None:
    """One command runs the main job and one the tests; each stands in a block of its own."""
    commands = [text.strip() for _, language, text in fences(README) if language == "sh" and text.startswith("pip install torch")]
    assert commands == [
        'pip install torch==2.13.0 -e ".[examples]" && python examples/digits.py',
        'pip install torch==2.13.0 -e ".[test]" && pytest',
    ]


def test_the_map_of_the_source_is_the_folder() -> None:
    """The map names every package and flat module of fnlight, once, each with what it is for, in at most 30 lines."""
    text = README.read_text(encoding="utf-8").split("## Map of the source", 1)[1].split("\n## ", 1)[0]
    rows = [(re.findall(r"`(\w+)(?:/|\.py)`", names), said) for names, said in re.findall(r"^\| (`[^|]+`) \| (.+) \|$", text, re.M)]
    named = [name for names, _ in rows for name in names]
    assert sorted(named) == sorted(nouns()), f"missing: {sorted(nouns() - set(named))}; not there: {sorted(set(named) - nouns())}"
    assert all(said.strip() for _, said in rows)
    assert len(text.strip().splitlines()) <= 30


def test_ci_reads_the_commands_out_of_the_readme() -> None:
    """``.ci/run`` is a program that bash understands, and it holds no copy of the commands."""
    program = ROOT / ".ci" / "run"
    checked = subprocess.run(["bash", "-n", str(program)], capture_output=True, text=True, check=False)
    text = program.read_text(encoding="utf-8")
    assert os.access(program, os.X_OK), "make it executable: chmod +x .ci/run"
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "torch==" not in text
    assert "[test]" not in text
