"""Every optimizer can be resumed, and the page of all optimizers has the results."""

from pathlib import Path

import pytest

from tests.optim.page import PAGE, page, versions
from tests.optim.table import CASES, found, prove

pytestmark = [
    pytest.mark.filterwarnings("ignore:This overload of .* is deprecated:UserWarning"),  # a call in torch_optimizer
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),  # from torch's SparseAdam
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_optimizer"),
]


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_training_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    """Saved after three steps and loaded, the next two steps are bit-identical to those of the uninterrupted training."""
    row = prove(CASES[name], tmp_path)
    assert row.name == name


def test_the_page_of_all_optimizers_has_the_results_of_this_test() -> None:
    """The table in docs/optimizers.md equals the results here, for the package versions that it names."""
    text = PAGE.read_text(encoding="utf-8")
    if versions() not in text:
        pytest.skip(f"the page was written with other versions than these: {versions()}")
    assert page(text, [found(case) for case in CASES.values()]) == text, (
        "docs/optimizers.md is out of date; write it anew with: python -m tests.optim.page"
    )
