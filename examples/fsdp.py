"""Train a small transformer that is sharded over all processes, save it, and read the checkpoint in one process.

    python examples/fsdp.py
    torchrun --nproc-per-node=2 examples/fsdp.py

Expected last line: ``the share of words guessed right is 1.0000`` or so, above 0.9 in any case.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fnlight as fl
from fnlight.tensors import local

WORDS, LENGTH = 11, 16


class Transformer(nn.Module):
    """Blocks between an embedding and a head; each block of the list is gathered on its own."""

    def __init__(self, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width), nn.Linear(width, WORDS)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0.0, batch_first=True, norm_first=True) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next words, shape [batch * length, words]."""
        x, mask = self.words(x) + self.places.weight[: x.shape[1]], nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x.flatten(0, 1))


def train_step(model: nn.Module, batch: Tensor) -> Tensor:
    """The loss of the next word."""
    return F.cross_entropy(model(batch[:, :-1]), batch[:, 1:].flatten())


def eval_step(model: nn.Module, batch: Tensor) -> dict[str, fl.Mean]:
    """How often the next word is guessed, once the rule can be seen."""
    guessed = model(batch[:, :-1]).argmax(-1).view(len(batch), -1)
    right = guessed[:, 2:] == batch[:, 3:]
    return {"right": fl.Mean(right.sum(), right.numel())}


def sentences(number: int, count: int = 64) -> Tensor:
    """Sentences of words that count up, each with its own first word and increment, shape [count, length]."""
    generator = torch.Generator().manual_seed(number)
    first, step = torch.randint(WORDS, (2, count, 1), generator=generator)
    return (first + step * torch.arange(LENGTH)) % WORDS


def main() -> None:
    """Train sharded, save, and evaluate the saved state in one process."""
    torch.manual_seed(0)
    task = fl.Task(Transformer(), train_step, eval_step, configure_optimizers=lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3))
    config = fl.FitConfig(max_steps=400, clip_norm=1.0, dir="runs/fsdp", resume=True, save_every=fl.steps(200), progress=False)
    with fl.parallel.join() as world:  # all processes that torchrun has started; a single process without torchrun
        state = fl.TrainState.create(task, seed=0, place=fl.parallel.fsdp())
        state = fl.fit(state, fl.Loaders(train=[sentences(i) for i in range(100)]), config)
        score = fl.evaluate(state, [sentences(1000), sentences(1001), sentences(1002)])
        held = sum(local(p).numel() for p in state.store.params)
        print(f"rank {world.rank} of {world.size} holds {held:,} of {sum(p.numel() for p in state.store.params):,} parameters", flush=True)
    if world.rank == 0:  # the other processes have left: one process can read what several have saved
        state = fl.load("runs/fsdp", task)
        assert fl.evaluate(state, [sentences(1000), sentences(1001), sentences(1002)])["right"] == score["right"]
        print(f"the share of words guessed right is {score['right']:.4f}")


if __name__ == "__main__":
    main()
