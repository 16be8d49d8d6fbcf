"""Tests on XLA's CPU backend; they are skipped where there is no torch_xla, or nobody asks for them.

Importing torch_xla replaces parts of torch for the whole process, so it is asked for, as `.ci/run` does in an environment of its own:
``PJRT_DEVICE=CPU pytest tests/xla``.
"""

import os
from importlib.util import find_spec
from typing import Any

import pytest

ASKED = "PJRT_DEVICE" in os.environ and find_spec("torch_xla") is not None


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Skip them where nobody asks for them."""
    for item in items if not ASKED else ():
        if item.path.parent.name == "xla":
            item.add_marker(pytest.mark.skip(reason="needs torch_xla, and PJRT_DEVICE=CPU to ask for it"))


@pytest.fixture(scope="session", autouse=True)
def _runtime() -> None:
    """What the import leaves in the environment is there before a test looks."""
    if ASKED:
        # a third of the time to compile
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
        import torch_xla  # noqa: F401
