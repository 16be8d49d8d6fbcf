"""Training under Ray Train: Ray starts the workers and makes the process group; fit finds this group and trains in it.

    python examples/ray_train.py

It needs ``pip install "fnlight[ray]"``.
Expected last line: ``2 workers, loss 0.0``, or close to it.
"""

import os
import tempfile

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fnlight as fl


def train_step(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def data():
    x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])), batch_size=32, shuffle=True)


def worker(config):
    task = fl.Task(nn.Linear(4, 1), train_step, configure_optimizers=lambda model: torch.optim.Adam(model.parameters(), lr=0.05))
    state = fl.fit(fl.TrainState.create(task, seed=0), data(), fl.FitConfig(max_epochs=config["epochs"], progress=False))
    with tempfile.TemporaryDirectory() as folder:  # Ray keeps what is reported with a checkpoint
        metrics = {"loss": state.history[-1].metrics["train/loss"]}
        checkpoint = ray.train.Checkpoint.from_directory(fl.save(state, folder)) if ray.train.get_context().get_world_rank() == 0 else None
        ray.train.report(metrics, checkpoint=checkpoint)


if __name__ == "__main__":
    scaling, run = ScalingConfig(num_workers=2), RunConfig(name="fnlight", storage_path=os.path.abspath("runs/ray"))
    result = TorchTrainer(worker, train_loop_config={"epochs": 10}, scaling_config=scaling, run_config=run).fit()
    print(f"2 workers, loss {result.metrics['loss']:.1f}")
