"""Every optimizer goes on from a file as if nothing had happened, and the page of all optimizers says so."""

from pathlib import Path

import pytest

from tests.optim.page import PAGE, page, versions
from tests.optim.table import CASES, found, prove

pytestmark = [
    pytest.mark.filterwarnings("ignore:This overload of .* is deprecated:UserWarning"),  # what torch_optimizer calls
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),  # what torch's SparseAdam makes
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_optimizer"),
]


@pytest.mark.parametrize("name", CASES)
def test_going_on_from_a_file_equals_going_on(name: str, tmp_path: Path) -> None:
    """Saved after three steps and loaded, the next two steps are bitwise those of the uninterrupted training."""
    row = prove(CASES[name], tmp_path)
    assert row.name == name


def test_the_page_of_all_optimizers_is_what_the_proof_finds() -> None:
    """The table in docs/optimizers.md says of each optimizer what is found here, with the versions that it names."""
    text = PAGE.read_text(encoding="utf-8")
    if versions() not in text:
        pytest.skip(f"the page was written with other versions than these: {versions()}")
    assert page(text, [found(case) for case in CASES.values()]) == text, (
        "docs/optimizers.md is out of date; write it anew with: python -m tests.optim.page"
    )
