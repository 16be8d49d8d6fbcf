"""Ranks as forks of one process that has imported torch and fnlight, so that many of them start in the time of one; run by launch.py.

It is no replacement for torchrun, which starts two ranks in other tests: forks share the order of their sets, and nothing starts them again.
"""

import os
import random
import runpy
import signal
import sys

import numpy as np

import fnlight  # noqa: F401  # for all of the forks


def become(rank: int, ranks: int, port: int) -> None:
    """What torchrun says to a process, and generators that are not those of the other ranks."""
    named = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in named.items()})
    random.seed(rank)
    np.random.seed(rank)  # noqa: NPY002  # the global one


def main(ranks: int, program: str) -> int:
    """Run a program on so many forks; the first that fails ends the others."""
    port = 20000 + os.getpid() % 10000  # below the ports that the system gives out, and of no other process that lives now
    alive = set()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            become(rank, ranks, port)
            runpy.run_path(program, run_name="__main__")
            return 0
        alive.add(pid)
    failed = 0
    while alive:
        pid, status = os.wait()
        alive.discard(pid)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for other in alive:
                os.kill(other, signal.SIGTERM)
    return failed


if __name__ == "__main__":
    _, count, *sys.argv = sys.argv
    sys.exit(main(int(count), sys.argv[0]))
