"""What the benchmarks share: who measured what on which machine, and where it is written down."""

import os
import platform
import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def header():
    """Versions and machine, for the line above a table."""
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {_processor()} ({os.cpu_count()} cores seen), one thread a process"
    )


def _processor():
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        names = []
    return names[0].strip() if names else platform.machine()


def write_section(name, text, page=PAGE):
    """Put a text between the marks of a section of the page: ``<!-- name -->`` and ``<!-- /name -->``."""
    before = page.read_text(encoding="utf-8")
    found = re.search(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", before, re.S)
    if found is None:
        raise ValueError(f"{page.name} has no section between <!-- {name} --> and <!-- /{name} -->")
    page.write_text(before[: found.end(1)] + text.strip() + "\n" + before[found.start(2) :], encoding="utf-8")
