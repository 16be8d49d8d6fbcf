"""What torch's compiler leaves behind in a process."""

import pytest


@pytest.fixture(autouse=True)
def compiler_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler hands an address to its modules through the environment."""
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")
