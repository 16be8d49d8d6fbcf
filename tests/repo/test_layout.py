"""The layout: few things at the top, and nothing that belongs to somebody's machine."""

import subprocess
from pathlib import Path

from tests.repo.source import ROOT, lacking

TOP = {"pyproject.toml", "fnlight", "tests", "examples", "docs", "findings", "README.md", "LICENSE", "CHANGELOG.md"}
PRIVATE = tuple(f"/{place}" for place in ("work/", "tmp/v", "root/", "home/"))


def _files() -> list[Path]:
    """What belongs to the repository: tracked files and new ones that are not ignored; every file where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return [p for name in TOP for p in (ROOT / name).rglob("*") if p.is_file()] + [
            ROOT / name for name in TOP if (ROOT / name).is_file()
        ]
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_the_top_level_holds_what_everybody_expects() -> None:
    """Nothing stands at the top level but the usual files, the four folders, and dotfiles."""
    top = {p.relative_to(ROOT).parts[0] for p in _files()}
    foreign = sorted(name for name in top - TOP if not name.startswith("."))
    assert not foreign, f"outside of the layout: {foreign}; move them into fnlight/, tests/, examples/, docs/ or findings/"


def test_no_file_names_a_place_of_one_machine() -> None:
    """No file holds an absolute path of the machine that it was written on."""
    wrong: list[str] = []
    for path in _files():
        text = path.read_text(encoding="utf-8", errors="replace")
        wrong += [f"{path.relative_to(ROOT)}: {private}" for private in PRIVATE if private in text]
    assert not wrong, lacking(wrong, "paths of one machine:")


def test_files_are_text_of_a_sane_size() -> None:
    """Every file is UTF-8 text below half a megabyte: data and weights are made or fetched, not kept here."""
    wrong = [
        f"{p.relative_to(ROOT)}: {p.stat().st_size:,} bytes" for p in _files() if p.stat().st_size > 500_000 or b"\0" in p.read_bytes()
    ]
    assert not wrong, lacking(wrong, "too large, or not text:")
