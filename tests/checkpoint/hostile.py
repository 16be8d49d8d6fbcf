"""A program: read hostile files under limits of memory and time. Argument: a folder of cases; prints how each ended as JSON."""

import json
import resource
import sys
import time
import warnings
from pathlib import Path

import fnlight as fl
from tests.checkpoint.golden import CASES

MORE = 1 << 30  # bytes of address space that reading may take beyond what the program has already
SECONDS = 60  # of processor time, for all cases


def attempt(place, task, state):
    begun = time.process_time()
    try:
        fl.load_weights(state, place) if place.suffix == ".safetensors" else fl.load(place, task)
        end = "read"
    except Exception as error:  # noqa: BLE001  # what kind it is, is the question
        end = f"{type(error).__name__}: {error}"
    return {"end": end[:400], "seconds": time.process_time() - begun}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    task = CASES["momentum"].task()
    state = fl.TrainState.create(task)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MORE, taken + MORE))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    print(json.dumps({place.name: attempt(place, task, state) for place in sorted(Path(sys.argv[1]).iterdir())}))
