"""Docs cannot rot: every Python block of every page runs, every page is in the menu, every link leads somewhere."""

import multiprocessing
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.repo.run_page import run_page
from tests.repo.source import ROOT, fences, lacking

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LANGUAGES = {"python", "pycon", "sh", "text", "toml", "json"}
"""What blocks may be: `python` and `pycon` run; what must not run, such as code of another library, is `text`."""


NEEDS = {"xla.md": "torch_xla"}
"""Pages whose programs need a package that the tests do not install; what does install it runs them, too."""


def assert_page_runs(page: Path) -> None:
    """Run the Python blocks of a page in a process and a folder of their own; the process is a copy of one that has only imported things."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["fnlight", "torch._dynamo"])  # what every page would import first
    with tempfile.TemporaryDirectory() as folder:
        process = processes.Process(target=_run_page, args=(page, folder))
        process.start()
        process.join(timeout=300)
        late = process.is_alive()
        process.kill()
        process.join()
        output = Path(folder, "output").read_text(encoding="utf-8", errors="replace").strip()
    what = "takes more than 300 s" if late else "fails"
    assert process.exitcode == 0, f"a block of {page.name} {what} (try: python tests/repo/run_page.py {page}):\n{output[-6000:]}"


def _run_page(page: Path, folder: str) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", MPLBACKEND="agg")
    with Path("output").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    run_page(page)


def _has_code(page: Path) -> bool:
    return any(language in ("python", "pycon") for _, language, _ in fences(page))


@pytest.mark.parametrize("page", [p for p in PAGES if _has_code(p)], ids=lambda p: str(p.relative_to(DOCS)))
def test_every_block_of_a_page_runs(page: Path) -> None:
    """The Python blocks of a page run, one after the other, in one namespace."""
    if page.name in NEEDS:
        pytest.skip(f"needs {NEEDS[page.name]}; tests/{page.stem} runs it")
    assert_page_runs(page)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_block_says_what_it_is(page: Path) -> None:
    """Every block names its language, so that no program escapes the tests by having none."""
    wrong = [f"{page.name}:{line}: {language or 'nothing'}" for line, language, _ in fences(page) if language not in LANGUAGES]
    assert not wrong, lacking(wrong, f"a block must be one of {sorted(LANGUAGES)}:")


def _pages_of(menu: list[dict[str, Any]]) -> Iterator[str]:
    for entry in menu:
        for below in entry.values():
            yield from [below] if isinstance(below, str) else _pages_of(below)


def test_the_menu_holds_every_page() -> None:
    """The pages in the menu of .zensical.toml are those in docs/, each once, in four groups."""
    nav = tomllib.loads((ROOT / ".zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    menu, pages = list(_pages_of(nav)), sorted(p.relative_to(DOCS).as_posix() for p in PAGES)
    missing, gone = sorted(set(pages) - set(menu)), sorted(set(menu) - set(pages))
    assert sorted(menu) == pages, f"not in the nav of .zensical.toml: {missing}; in it, but not in docs/: {gone}"
    assert [name for entry in nav for name in entry] == ["Home", "Guides", "How-to", "Reference", "Background"]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page leads to a file of this repository, and its anchor to a heading there."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"[a-z]+:", link)]
    wrong = [link for link in links if not _leads_somewhere(page, *link.partition("#")[::2])]
    assert not wrong, f"{page.relative_to(ROOT)} links to what is not there: {wrong}"


def _leads_somewhere(page: Path, file: str, anchor: str) -> bool:
    target = page.parent / file if file else page
    return target.exists() and (not anchor or anchor in _anchors(target))


def _anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
