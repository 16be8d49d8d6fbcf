"""Write the table of all optimizers in docs/optimizers.md from the results of the round-trip test: ``python -m tests.optim.page``."""

import importlib.metadata
import tempfile
import warnings
from pathlib import Path

from tests.optim.table import CASES, LEFT_OUT, Row, prove

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimizers.md"
BEGIN, END = "<!-- written by tests/optim/page.py -->", "<!-- end of what tests/optim/page.py writes -->"
PACKAGES = ("torch", "torch-optimizer", "schedulefree", "pytorch-optimizer")


def versions() -> str:
    """The package versions that the table was tested with."""
    return "Tested with " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES) + "."


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def page(text: str, rows: list[Row]) -> str:
    """The page, with the table replaced by the current results."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{table(rows)}\n{END}{rest.partition(END)[2]}"


def table(rows: list[Row]) -> str:
    """The table with one row per optimizer, and the list of refused ones."""
    lines = [versions(), "", f"{len(rows)} optimizers:", ""]
    lines += ["| name | state per parameter | state per group | needs | resumes |", "|---|---|---|---|---|"]
    lines += [f"| `{r.name}` | {r.memory} | {r.groups} | {r.needs} | {r.resumes} |" for r in rows]
    lines += ["", f"{len(LEFT_OUT)} optimizers are not supported. They are refused before any work:", "", "| name | reason |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {reason} |" for name, reason in LEFT_OUT.items())]) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        proven = [prove(case, Path(place)) for case in CASES.values()]
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), proven), encoding="utf-8")
