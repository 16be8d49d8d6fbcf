"""Fit a mixture of Gaussians to iris flowers by expectation maximisation, with a hand-written step; stop in the middle, and resume.

    python examples/em.py

Nothing is differentiated: each step solves for the weights, means and covariances of the mixture in closed form. The species are not
used; at the end they show how well the three clusters match the three species.

Expected last line: ``145 of 150 flowers are in the cluster of their species, resumed bitwise: True``
"""

import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_iris
from torch import Tensor, nn
from torch.nn import functional as F

import fnlight as fl

FLOOR = 1e-3  # added to the variances, so that no cluster shrinks to a point


class Mixture(nn.Module):
    """Weights, means and covariances of Gaussians; buffers, because no gradient changes them."""

    def __init__(self, x: Tensor, num_clusters: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.full((num_clusters,), 1 / num_clusters))
        self.register_buffer("means", x[torch.randperm(len(x))[:num_clusters]].clone())
        self.register_buffer("covariances", torch.cov(x.T).repeat(num_clusters, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Log of weight times density, shape [samples, clusters]."""
        clusters = torch.distributions.MultivariateNormal(self.means, self.covariances)
        return clusters.log_prob(x[:, None]) + self.weights.log()


@torch.no_grad()
def maximise(store: fl.state.Store, batches: tuple[Tensor, ...], key: int) -> dict[str, Tensor]:
    """One step: first of k-means, for a good initialization, then of expectation maximisation; the loss is the negative log likelihood."""
    model, (x,), memory = store.module, batches, store.memory["em"]
    joint = model(x)
    near = F.one_hot(torch.cdist(x, model.means).argmin(-1), len(model.means)).to(x.dtype)
    shares = near if memory["warm_up"] else joint.softmax(-1)
    memory["warm_up"] -= memory["warm_up"] > 0
    counts = shares.sum(0)
    model.weights.copy_(counts / len(x))
    model.means.copy_(shares.T @ x / counts[:, None])
    away = x[:, None] - model.means
    spread = torch.einsum("nk,nki,nkj->kij", shares, away, away) / counts[:, None, None]
    model.covariances.copy_(spread + FLOOR * torch.eye(x.shape[1], dtype=x.dtype))
    return {"loss": -joint.logsumexp(-1).mean()}


def main() -> None:
    """Fit 60 steps; then again, in two halves with a checkpoint between them; and count."""
    torch.manual_seed(0)
    data = load_iris()
    x, species = torch.tensor(data.data), data.target
    task = fl.Task(
        Mixture(x, 3),
        fl.pipe(maximise, fl.manual(lambda store: {"warm_up": 10}, name="em")),
        predict_step=lambda model, x: model(x).argmax(-1),
    )
    start = fl.TrainState.create(task)
    whole = fl.fit(start, [x], fl.FitConfig(max_steps=60, progress=False))
    for steps in (25, 60):
        state = fl.fit(start, [x], fl.FitConfig(max_steps=steps, dir="runs/em", resume=True, progress=False))
        print(f"log likelihood a flower after {state.progress.step} steps: {-state.history[-1].metrics['train/loss']:.4f}")

    (clusters,) = fl.predict(state, [x])
    table = torch.stack([torch.bincount(clusters[species == s], minlength=3) for s in range(3)])
    agree = table[linear_sum_assignment(table, maximize=True)].sum()
    same = all(torch.equal(value, whole.buffers[name]) for name, value in state.buffers.items())
    print(f"{agree} of 150 flowers are in the cluster of their species, resumed bitwise: {same}")


if __name__ == "__main__":
    main()
