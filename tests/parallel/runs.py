"""Run under torchrun by test_elastic.py: a run of fit in which a rank may fail, as the arguments say; results are in DIR/result.json."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import fnlight as fl
from tests.parallel.trajectories import Noisy, listed, numbers, plain, task

RANK, ATTEMPT = int(os.environ.get("RANK", "0")), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class Watched(Noisy):
    """Samples that note which of them were read, and break what they are told to break at a sample number of this rank."""

    def __init__(self, folder, fault, at):
        super().__init__(24)
        self.folder, self.fault, self.left = folder, fault if RANK == 1 and ATTEMPT == 0 else "", at

    def __getitem__(self, i):
        self.left -= 1
        if self.left == 0 and self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.left == 0 and self.fault == "raise":
            raise ValueError(f"sample {i} cannot be read")
        with open(f"{self.folder}/read-{ATTEMPT}-{RANK}.txt", "a") as file:
            file.write(f"{i}\n")
        return super().__getitem__(i)


def main(folder, fault="", steps="12", at="9"):
    state = fl.TrainState.create(task(plain), seed=3)
    loader = DataLoader(Watched(folder, fault, int(at)), batch_size=12, shuffle=True)
    config = fl.FitConfig(
        max_steps=int(steps), dir=f"{folder}/run", resume=True, save_every=fl.steps(1), progress=False, ema=0.9,
        sinks=fl.JSONL(f"{folder}/log.jsonl"), log_every=fl.steps(3),
    )  # fmt: skip
    state = fl.fit(state, fl.Loaders(loader, listed(2, 6)), config)
    if RANK == 0:
        found = {"weights": numbers(state.params), "history": [dict(r.metrics) for r in state.history], "stopped": state.stopped}
        Path(folder, "result.json").write_text(json.dumps({**found, "step": state.progress.step, "samples": state.progress.samples}))
    return state


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    fl.main(lambda: main(*sys.argv[1:]))
