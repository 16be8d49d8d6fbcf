"""Balance a pole on a cart: an actor and a critic, each with its own optimizer, on experience that a combinator of one's own brings in.

    python examples/actor_critic.py

There is no dataset: before every update, the combinator `play` lets the current actor steer 32 carts for 32 steps, and passes
the trajectory on as the batch. The positions of the carts are in `state.memory`, so a saved run resumes in the middle of an episode.

Expected last line: ``a greedy actor balances the pole for 200.0 of 200 steps`` or so, above 190 in any case.
"""

from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fnlight as fl

CARTS, STEPS, LIMIT = 32, 32, 200
DISCOUNT, TRACE = 0.99, 0.95
PLAY = 1 << 40  # the stream of random numbers with which the carts are steered


def start(count: int) -> Tensor:
    """Carts at rest, nearly upright: place, speed, angle and its speed, shape [count, 4]."""
    return 0.1 * torch.rand(count, 4) - 0.05


def move(carts: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
    """The carts 1/50 second later, and which poles have fallen; the equations of Barto, Sutton and Anderson (1983)."""
    x, v, angle, spin = carts.unbind(-1)
    force, sin, cos = 20.0 * push - 10.0, angle.sin(), angle.cos()
    pressed = (force + 0.05 * spin.square() * sin) / 1.1
    swing = (9.8 * sin - cos * pressed) / (0.5 * (4 / 3 - 0.1 * cos.square() / 1.1))
    rate = pressed - 0.05 * swing * cos / 1.1
    carts = torch.stack([x + 0.02 * v, v + 0.02 * rate, angle + 0.02 * spin, spin + 0.02 * swing], -1)
    return carts, (carts[:, 0].abs() > 2.4) | (carts[:, 2].abs() > 0.2095)


class ActorCritic(nn.Module):
    """An actor and a critic."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
        self.critic = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))


def play() -> fl.Combinator:
    """A combinator that replaces the batch of a step by new trajectories."""

    def init(store: fl.state.Store) -> dict[str, Tensor]:
        with fl.tensors.isolated():
            torch.manual_seed(0)
            return {"carts": start(CARTS), "age": torch.zeros(CARTS)}

    @torch.no_grad()
    def experience(store: fl.state.Store) -> dict[str, Tensor]:
        carts, age = store.memory["play"]["carts"], store.memory["play"]["age"]
        seen, pushes, falls, ends = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
        for _ in range(STEPS):
            push = torch.distributions.Categorical(logits=store.module.actor(carts)).sample()
            after, fallen = move(carts, push)
            age += 1
            over = fallen | (age >= LIMIT)
            for each, value in ((seen, carts), (pushes, push), (falls, fallen), (ends, over)):
                each.append(value)
            carts = torch.where(over[:, None], start(CARTS), after)
            age = torch.where(over, 0.0, age)
        store.memory["play"] = {"carts": carts, "age": age}
        return {"carts": torch.stack([*seen, carts]), "push": torch.stack(pushes), "fallen": torch.stack(falls), "over": torch.stack(ends)}

    def wrap(step: Any) -> Any:
        def played(state: fl.TrainState, batch: Any) -> Any:
            fl.tensors.seed_generators(fl.tensors.fold_in(state.key, PLAY))
            lived = experience(state.live)
            return step(state, attrs.evolve(fl.data.Item.of(batch, state=state), batches=(lived,), samples=CARTS * STEPS))

        return played

    return fl.Combinator("play", wrap, "step", "step", init=init)


@torch.no_grad()
def advantages(model: ActorCritic, lived: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The advantage of each push, and the return of its state; shapes [steps, carts]."""
    worth = model.critic(lived["carts"]).squeeze(-1)
    better, found = torch.zeros(CARTS), list[Tensor]()
    for t in reversed(range(STEPS)):
        surprise = 1.0 + DISCOUNT * worth[t + 1] * ~lived["over"][t] - worth[t]
        better = surprise + DISCOUNT * TRACE * better * ~lived["over"][t]
        found.append(better)
    gained = torch.stack(found[::-1])
    return gained, gained + worth[:-1]


def steer(model: ActorCritic, lived: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the actor: pushes with a positive advantage become more likely; an entropy term keeps it exploring."""
    gained, _ = advantages(model, lived)
    policy = torch.distributions.Categorical(logits=model.actor(lived["carts"][:-1]))
    gained = (gained - gained.mean()) / (gained.std() + 1e-6)
    entropy = policy.entropy().mean()
    return -(policy.log_prob(lived["push"]) * gained).mean() - 0.01 * entropy, {"entropy": entropy}


def judge(model: ActorCritic, lived: dict[str, Tensor]) -> Tensor:
    """The loss of the critic."""
    _, returns = advantages(model, lived)
    return F.mse_loss(model.critic(lived["carts"][:-1]).squeeze(-1), returns)


def eval_step(model: ActorCritic, count: int) -> dict[str, fl.Mean]:
    """For how many steps a greedy actor balances poles."""
    carts, up, lasted = start(count), torch.ones(count, dtype=torch.bool), torch.zeros(count)
    for _ in range(LIMIT):
        carts, fallen = move(carts, model.actor(carts).argmax(-1))
        up = up & ~fallen
        lasted += up
    return {"steps": fl.Mean(lasted.sum(), count)}


def configure_optimizers(model: ActorCritic) -> dict[str, torch.optim.Optimizer]:
    """The critic learns faster."""
    return {"actor": torch.optim.Adam(model.actor.parameters(), lr=4e-3), "critic": torch.optim.Adam(model.critic.parameters(), lr=1e-2)}


def main() -> None:
    """Train until a greedy actor balances every pole, for 400 updates at most."""
    torch.manual_seed(0)
    task = fl.Task(ActorCritic(), {"actor": steer, "critic": judge}, eval_step, configure_optimizers=configure_optimizers)
    step = fl.pipe(
        task.train_step,
        fl.grad(),
        fl.clip_norm(1.0),
        fl.apply(),
        play(),
        fl.evaluate_every([20], every=fl.steps(20)),
        fl.stop_when(fl.reached("val/steps", LIMIT) | fl.max_steps(400)),
    )
    print(step)
    for state, _ in fl.run(step, fl.TrainState.create(task, seed=0), [None] * 20):
        if state.progress.step % 20 == 0:
            print(f"update {state.progress.step:3}: {state.history[-1].metrics['val/steps']:.1f} steps")
    print(state)
    print(f"a greedy actor balances the pole for {fl.evaluate(state, [100])['steps']:.1f} of {LIMIT} steps")


if __name__ == "__main__":
    main()
