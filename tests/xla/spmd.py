"""A program: train on as many XLA devices as ``CPU_NUM_DEVICES`` says. Arguments: a folder, and a name in `PLACES`; prints how often it compiled."""

import os
import sys
from pathlib import Path

import attrs
import torch
from torch import nn

from fnlight import FitConfig, Loaders, Optim, Task, TrainState, fit, parallel, restore, save, steps, warmup_cosine
from fnlight.testing import tiny_batches, tiny_task
from tests.xla.device import num_compiles

PLACES = {
    "one": {},
    "data": {"mesh": {"data": 4}},
    "model": {"mesh": {"data": 2, "model": 2}, "shard": {"0.weight": ("model", None), "2": (None, "model")}},
}
"""One device; batches over four; batches over two, and the weights of both layers over two."""


def task() -> Task:
    """Without random numbers, which several devices draw in another order; the last layer has no bias, so that a pattern means its weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))
    optimizers = lambda model: Optim(torch.optim.AdamW(model.parameters(), lr=1e-2), warmup_cosine(warmup=3, total=20))
    return attrs.evolve(tiny_task(), model=model, configure_optimizers=optimizers)


if __name__ == "__main__":
    folder, name = Path(sys.argv[1]), sys.argv[2]
    place = parallel.xla(**PLACES[name])
    # batches of 6 are divided unevenly
    loaders = Loaders(
        train=[*tiny_batches(num_batches=3, batch_size=8), *tiny_batches(num_batches=1)], val=tiny_batches(num_batches=2, seed=1)
    )
    config = FitConfig(max_epochs=3, clip_norm=0.5, ema=0.9, dir=folder / "run", save_every=steps(3), progress=False)
    state = fit(TrainState.create(task(), place=place), loaders, config)
    save(state, folder / "end")
    resumed = restore(folder / "end", like=TrainState.create(task(), place=place))
    again = fit(resumed, loaders, FitConfig(max_epochs=4, clip_norm=0.5, ema=0.9, progress=False))
    save(again, folder / "further")
    if name == "model":
        from torch_xla import _XLAC

        held = [t for s in (state, again) for t in (s.params["0.weight"], s.opt_state["0.weight"]["exp_avg"], s.memory["ema"]["0.weight"])]
        specs = {_XLAC._get_xla_sharding_spec(tensor) for tensor in held}
        assert len(specs) == 1, specs
        assert "devices=[2,1,2]" in specs.pop()
    print(num_compiles(), os.environ.get("XLA_USE_SPMD"))
