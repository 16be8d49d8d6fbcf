"""What CI and releases are made with: every action is named by its commit, every package by its hash, and a report has a place to go to."""

import re
from pathlib import Path

import pytest

from tests.repo.source import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
LOCKS = sorted((ROOT / ".github" / "requirements").glob("*.txt"))


def test_the_workflows_are_those_of_the_policy() -> None:
    """There are tests, an audit and a release, which signs what it builds."""
    assert [path.stem for path in WORKFLOWS] == ["audit", "release", "tests"]
    assert "pip-audit --strict" in WORKFLOWS[0].read_text(encoding="utf-8")
    assert "attest-build-provenance@" in WORKFLOWS[1].read_text(encoding="utf-8")
    assert (ROOT / ".github" / "SECURITY.md").is_file()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_named_by_commit_and_may_only_read(path: Path) -> None:
    """A tag can be moved to other code; a commit cannot. What a job may write, it says itself."""
    text = path.read_text(encoding="utf-8")
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert used
    assert [action for action, note in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) or not re.match(r" # v\d", note)] == []
    assert "\npermissions:\n  contents: read\n" in text
    assert "secrets." not in text


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_packages_are_installed_by_hash(path: Path) -> None:
    """Whatever a workflow installs is in a lock, or is this checkout without what it needs."""
    installs = re.findall(r"pip install (.+)", path.read_text(encoding="utf-8"))
    assert [
        line for line in installs if "--require-hashes" not in line and not line.startswith("--no-deps --no-build-isolation -e .")
    ] == []


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_line_of_a_lock_has_a_version_and_hashes(path: Path) -> None:
    """One exact version for each package, with the digest of every file that it may be."""
    text = path.read_text(encoding="ascii")
    entries = [entry for entry in re.sub(r" *\\\n +", " ", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines() if entry]
    assert len(entries) > 20
    assert [entry for entry in entries if not re.fullmatch(r"[\w.-]+(\[\w+\])?==\S+( ; .+?)?( --hash=sha256:[0-9a-f]{64})+", entry)] == []


def test_the_lock_of_the_tests_holds_what_the_project_names() -> None:
    """Each dependency and each package of the extra ``test`` is in the lock, and torch in the version of the README."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    blocks = [re.search(rf"^{name} = \[\n(.*?)^\]", text, re.M | re.S) for name in ("dependencies", "test")]
    wanted = {name for block in blocks if block for name in re.findall(r'^ +"([\w-]+)', block[1], re.M)}
    held = set(re.findall(r"^([\w.-]+)(?:\[\w+\])?==", (ROOT / ".github" / "requirements" / "test.txt").read_text(encoding="ascii"), re.M))
    assert len(wanted) > 15
    assert wanted - held == set()
    (version,) = set(re.findall(r"torch==([\d.]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert f"\ntorch=={version} " in (ROOT / ".github" / "requirements" / "test.txt").read_text(encoding="ascii")
