"""Run the Python blocks of a Markdown page, one after the other, in one namespace: ``python tests/repo/run_page.py PAGE``.

A block of prompts (``>>>``) is run as a doctest. Line numbers in tracebacks are those of the page. Files go to the current folder.
"""

import doctest
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any


def blocks_of(page: Path) -> list[tuple[int, str, str]]:
    """The fenced blocks of a page, by the reader that the tests use."""
    spec = importlib.util.spec_from_file_location("source", Path(__file__).with_name("source.py"))
    assert spec is not None
    assert spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    return source.fences(page)


def run_prompts(line: int, text: str, page: Path, namespace: dict[str, Any]) -> None:
    """Run a block of prompts and compare what it prints."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    test = doctest.DocTestParser().get_doctest(text, {}, str(page), str(page), line - 1)
    test.globs = namespace
    failed, _ = doctest.DocTestRunner(optionflags=flags, verbose=False).run(test, clear_globs=False)
    if failed:
        sys.exit(f"{page}:{line}: a block of prompts prints something else")


def run_page(page: Path) -> None:
    """Run all Python blocks of a page."""
    module = types.ModuleType("__main__")  # so that classes of a page know where they live
    sys.modules["__main__"] = module
    for line, language, text in blocks_of(page):
        if language not in ("python", "pycon"):
            continue
        if text.lstrip().startswith(">>>"):
            run_prompts(line, text, page, module.__dict__)
        else:
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), module.__dict__)


if __name__ == "__main__":
    run_page(Path(sys.argv[1]).resolve())
