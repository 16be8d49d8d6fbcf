"""A program: train a run whose checkpoints are at a URL. Arguments: the URL, the step at which to be killed or 0; prints the weights."""

import json
import os
import signal
import sys

import torch

import fnlight as fl
from tests.checkpoint.golden import eval_step, model, momentum, shuffled, train_step, values

if __name__ == "__main__":
    torch.set_num_threads(1)
    left = [int(sys.argv[2])]

    def dying(net, batch):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(net, batch)

    task = fl.Task(model(), dying, eval_step, configure_optimizers=momentum)
    config = fl.FitConfig(
        max_steps=12, ema=0.9, dir=sys.argv[1], save_every=fl.steps(2), keep=fl.last(2), resume=True, progress=False, device="cpu"
    )
    print(json.dumps(values(fl.fit(fl.TrainState.create(task, seed=7), shuffled(), config))))
