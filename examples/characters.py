"""Train a recurrent net on the characters of a text that every Python brings along: truncated back-propagation through time.

    python examples/characters.py

The text is the language reference that ``help("topics")`` shows, each paragraph once; its last tenth is kept for the test. 32 streams of the
text are read in parallel, 64 characters per step: gradients flow through these; the hidden state is detached, passed to the next step, and
saved with the state. ``bz2`` and ``lzma`` compress the same text, to compare how many bits they need for each further character.

Expected last line: ``bits a character of unseen text: 1.85 (bz2 1.67, lzma 1.77)`` or so; the text differs a little from one Python to another.
"""

import argparse
import bz2
import lzma
import math
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fnlight as fl

STREAMS, LENGTH, HIDDEN = 32, 64, 256


class Net(nn.Module):
    """Characters, shape [B, T], and a hidden state, to scores of the next ones, shape [B, T, characters]."""

    def __init__(self, num_chars: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_chars, 64)
        self.cell = nn.GRU(64, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, num_chars)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, hidden = self.cell(self.embed(x), hidden)
        return self.head(y), hidden


def bits(model: nn.Module, x: Tensor, hidden: Tensor | None) -> tuple[fl.Mean, Tensor]:
    """The bits of a text, each character predicted from those before it, and the hidden state after it."""
    scores, hidden = model(x[:, :-1], hidden)
    loss = F.cross_entropy(scores.flatten(0, 1), x[:, 1:].flatten(), reduction="sum") / math.log(2)
    return fl.Mean(loss, x[:, 1:].numel()), hidden


def train_step(model: nn.Module, batch: Any) -> Any:
    """Under `fl.carry` a step receives what the previous step has returned."""
    loss, hidden = bits(model, *batch)
    return loss, {}, hidden


def eval_step(model: nn.Module, batch: Tensor) -> dict[str, fl.Mean]:
    """The bits per character."""
    return {"bits": bits(model, batch, None)[0]}


def begin(model: nn.Module, batch: Tensor) -> Tensor:
    """The hidden state at the beginning of an epoch."""
    return torch.zeros(1, len(batch), HIDDEN)


def read_text() -> tuple[str, str]:
    """A text for training, and one for the test."""
    paragraphs = dict.fromkeys(part for name in sorted(topics) for part in topics[name].split("\n\n"))
    text = "\n\n".join(paragraphs)
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def side_by_side(ids: Tensor, streams: int, length: int) -> list[Tensor]:
    """A text cut into streams, and these into parts whose last character is the first of the next: shape [streams, length + 1]."""
    rows = ids[: len(ids) // streams * streams].view(streams, -1)
    return [rows[:, i : i + length + 1] for i in range(0, rows.shape[1] - 1, length)]


def compressed(name: str, compress: Any, train: str, test: str) -> str:
    """The bits that a compressor needs for each further character of a text."""
    sizes = [len(compress(text.encode())) for text in (train, train + test)]
    return f"{name} {(sizes[1] - sizes[0]) * 8 / len(test):.2f}"


def main() -> None:
    """Train, test, and let the net write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=6)
    epochs = parser.parse_args().epochs
    train, test = read_text()
    chars = sorted(set(train + test))
    train_ids, test_ids = (torch.tensor([chars.index(c) for c in text]) for text in (train, test))
    batches = side_by_side(train_ids, STREAMS, LENGTH)
    print(f"{len(train):,} characters to train on, {len(test):,} to test; {len(batches)} steps an epoch")

    def configure_optimizers(model: nn.Module) -> fl.Optim:
        schedule = fl.warmup_cosine(warmup=20, total=epochs * len(batches))
        return fl.Optim(torch.optim.AdamW(model.parameters(), lr=5e-3), schedule=schedule)

    with fl.tensors.isolated():
        fl.tensors.seed_generators(0)
        task = fl.Task(Net(len(chars)), train_step, eval_step, configure_optimizers=configure_optimizers)
    step = fl.pipe(train_step, fl.grad(), fl.carry(begin), fl.clip_norm(1.0), fl.apply(), fl.stop_when(fl.max_epochs(epochs)))
    test_batches = [test_ids[: len(test_ids) // 8 * 8].view(8, -1)]
    for state, _ in fl.run(step, fl.TrainState.create(task, seed=0), batches):
        if state.progress.batch == 0:
            print(f"epoch {state.progress.epoch}: {fl.evaluate(state, test_batches)['bits']:.3f} bits a character of the test text")
    print(written(state.module(), chars))
    found = fl.evaluate(state, test_batches)["bits"]
    packers = ", ".join(compressed(name, fn, train, test) for name, fn in {"bz2": bz2.compress, "lzma": lzma.compress}.items())
    print(f"bits a character of unseen text: {found:.2f} ({packers})")


@torch.no_grad()
def written(model: nn.Module, chars: list[str], count: int = 200) -> str:
    """Text that the net generates."""
    draw, hidden, text = torch.Generator().manual_seed(0), None, "The "
    x = torch.tensor([[chars.index(c) for c in text]])
    for _ in range(count):
        scores, hidden = model(x, hidden)
        x = torch.multinomial((1.25 * scores[0, -1]).softmax(-1), 1, generator=draw)[None]
        text += chars[int(x)]
    return text


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
