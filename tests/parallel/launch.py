"""Real processes for the tests of this folder: programs of this folder under torchrun, with gloo, on this machine."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def torchrun(
    program: str, ranks: int, *args: object, restarts: int = 0, timeout: float = 240, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder on some ranks; it must end well unless the caller looks at the return code."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}",
        "--monitor-interval=0.1", str(ROOT / "tests" / "parallel" / program), *map(str, args),
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environ}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def ran(program: str, ranks: int, *args: object, **options: object) -> str:
    """What a program printed, once it has ended well on all ranks."""
    done = torchrun(program, ranks, *args, **options)
    assert done.returncode == 0, f"{program} on {ranks} ranks ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
