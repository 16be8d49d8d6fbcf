"""``import fnlight`` is cheap and quiet: it brings nothing heavy along and changes nothing of the process."""

import json
import subprocess
import sys

from tests.repo.source import ROOT

HEAVY = (
    "tensorboard torch.utils.tensorboard tensorflow rich matplotlib PIL tyro sklearn scipy torch_optimizer fsspec hypothesis pytest "
    "wandb mlflow comet_ml fnlight.testing fnlight.cli fnlight.report"
)

PROBE = """
import gc, json, logging, os, random, signal, sys, threading, warnings
import numpy, torch

def look():
    loggers = [logging.getLogger(), *(v for v in logging.Logger.manager.loggerDict.values() if isinstance(v, logging.Logger))]
    return {
        "the torch generator": torch.default_generator.get_state().tolist(),
        "the random generator": repr(random.getstate()),
        "the numpy generator": repr(numpy.random.get_state()),
        "the default dtype": str(torch.get_default_dtype()),
        "the default device": str(torch.get_default_device()),
        "grad mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the number of threads": torch.get_num_threads(),
        "float32 precision": torch.get_float32_matmul_precision(),
        "running threads": threading.active_count(),
        "collecting garbage": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()],
        "warnings filters": repr(warnings.filters),
        "signal handlers": {s.name: repr(signal.getsignal(s)) for s in signal.Signals},
        "loggers": {l.name: (l.level, len(l.handlers), l.propagate, l.disabled) for l in loggers},
        "the environment": dict(os.environ),
        "sys.path": list(sys.path),
        "hooks": [repr(sys.excepthook), repr(sys.displayhook), repr(threading.excepthook)],
        "printing": repr(torch._tensor_str.PRINT_OPTS),
    }

before, loaded = look(), set(sys.modules)
import fnlight
after = look()
known = before["loggers"]
after["loggers"] = {name: value for name, value in after["loggers"].items() if name in known}
print(json.dumps({"changed": [k for k in before if before[k] != after[k]], "modules": sorted(set(sys.modules) - loaded)}))
"""


def _probe() -> dict[str, list[str]]:
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout)


def test_importing_fnlight_changes_nothing_and_brings_nothing_heavy() -> None:
    """A fresh process is the same before and after, and loads none of the optional or heavy packages."""
    found = _probe()
    heavy = [m for m in found["modules"] if any(m == h or m.startswith(f"{h}.") for h in HEAVY.split())]
    assert not found["changed"], f"`import fnlight` must leave the process as it was, but changes {found['changed']}"
    assert not heavy, f"`import fnlight` must not bring {heavy[:10]}; import them where they are used"
