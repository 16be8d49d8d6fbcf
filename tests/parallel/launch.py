"""Real processes for the tests of this folder: programs of this folder under torchrun or as forks, with gloo, on this machine."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def torchrun(
    program: str, ranks: int, *args: object, restarts: int = 0, timeout: float = 240, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder on some ranks; it must end well unless the caller looks at the return code."""
    options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    return _python(["-m", "torch.distributed.run", *options, _at(program), *args], timeout, environ)


def forked(program: str, ranks: int, *args: object, timeout: float = 240, **environ: str) -> subprocess.CompletedProcess[str]:
    """The same on forks of one process, which takes a fraction of the time."""
    return _python([_at("forked.py"), ranks, _at(program), *args], timeout, environ)


def ran(program: str, ranks: int, *args: object, **options: object) -> str:
    """What a program printed, once it has ended well on all ranks: two under torchrun, more as forks."""
    done = (torchrun if ranks <= 2 else forked)(program, ranks, *args, **options)
    assert done.returncode == 0, f"{program} on {ranks} ranks ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _at(program: str) -> Path:
    return ROOT / "tests" / "parallel" / program


def _python(command: list[object], timeout: float, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environ}
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
