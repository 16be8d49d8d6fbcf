"""A runtime that is stricter than a user's: one thread, deterministic kernels, seeded generators, and no test that leaves traces."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

import fnlight  # noqa: F401  # before doctests are collected, so that `fnlight.fit` is the function everywhere
from tests.smoke import holds_smoke, is_smoke

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("MPLBACKEND", "agg")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as it is behind `nohup pytest &`, where Ctrl-C is for others
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

# The same examples every time; `--hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("default")

_OWN = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")  # variables of pytest, and of the first graph that torch 2.9 makes
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2", "SIGHUP") if name in dir(signal)))


_LONG = (
    "test_examples.py", "test_compiled_steps.py", "test_elastic.py", "test_resume.py", "test_law.py", "test_saved.py", "test_microbatch.py",
    "test_network.py", "test_purity.py", "test_kills.py", "test_fsdp.py", "test_compiled.py", "test_ranks.py",
)  # fmt: skip
"""Files that take more than twenty seconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that of several processes none is left with one of them when the others have ended."""
    places = {name: i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(_LONG)))
    for item in items:
        if is_smoke(item.nodeid):
            item.add_marker("smoke")


def pytest_configure(config: pytest.Config) -> None:
    """With `-m smoke`, no docstrings are searched for examples, either."""
    if config.getoption("markexpr") == "smoke":
        config.option.doctestmodules = False


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m smoke`, other files are not even imported, which would take longer than the tests."""
    if config.getoption("markexpr") != "smoke":
        return None
    home = Path(__file__).parent
    inside = collection_path.is_relative_to(home) and collection_path != home
    return True if inside and not holds_smoke(collection_path.relative_to(home).as_posix()) else None


def _process() -> dict[str, Any]:
    """What a test must leave as it found it; cheap to look at."""
    root = logging.getLogger()
    return {
        "the working directory": Path.cwd(),
        "the default dtype": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly detection": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn-only determinism": torch.is_deterministic_algorithms_warn_only_enabled(),
        "the number of threads": torch.get_num_threads(),
        "float32 precision": torch.get_float32_matmul_precision(),
        "signal handlers": [signal.getsignal(number) for number in _SIGNALS],
        "the environment": {k: v for k, v in os.environ.items() if k not in _OWN},
        "logging": (root.level, logging.root.manager.disable),
        "threads that keep the process alive": {t.name for t in threading.enumerate() if not t.daemon},
    }


@pytest.fixture(autouse=True)
def _leaves_no_traces() -> Iterator[None]:
    """Seed torch's generator as pytest-randomly does the others; fail a test that leaves the process changed."""
    torch.default_generator.manual_seed(0)
    before = _process()
    yield
    after = _process()
    changed = [f"{name}: {before[name]!r} became {after[name]!r}" for name in before if before[name] != after[name]]
    if changed:
        pytest.fail("this test leaves the process changed; use monkeypatch or a with statement:\n  " + "\n  ".join(changed), pytrace=False)
