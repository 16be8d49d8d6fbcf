"""A program: go on from checkpoints in a process of its own. Arguments: task, folder, the last step, steps to go on from."""

import sys
from itertools import islice
from pathlib import Path

import torch

from fnlight import load, run, save
from tests.laws.combinators import pipe_with
from tests.laws.tasks import TASKS
from tests.laws.test_resume import loader_of

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    case, folder, total = TASKS[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3])
    for k in map(int, sys.argv[4:]):
        step = pipe_with("all of them", case.make(), folder, case.batches())
        state = load(folder / f"{k}", case.make())
        save(list(islice(run(step, state, loader_of(case)), total - k))[-1][0], folder / f"from-{k}")
