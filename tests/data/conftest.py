"""Reading in this process seeds the global generators; here, as in a run, the caller puts them back."""

from collections.abc import Iterator

import pytest

from fnlight.tensors import isolated


@pytest.fixture(autouse=True)
def _generators() -> Iterator[None]:
    with isolated():
        yield
