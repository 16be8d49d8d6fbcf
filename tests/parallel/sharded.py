"""Run under torchrun by test_fsdp.py: cases by name, one after the other; prints the result of each as JSON."""

import json
import os
import signal
import sys
from pathlib import Path

import attrs
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import DataLoader, TensorDataset

import fnlight as fl
from fnlight.tensors import is_sharded, local
from tests.laws.combinators import ENTRIES, pipe_with
from tests.parallel.steps import cut, data, plain, weighted

torch.use_deterministic_algorithms(True)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks between a first and a last layer; seven wide, so that no part is even."""

    def __init__(self, width=7, normed=False):
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(4, width), nn.ModuleList([Block(width), Block(width)]), nn.Linear(width, 3)
        self.norm = nn.BatchNorm1d(width) if normed else nn.Identity()

    def forward(self, x):
        x = self.norm(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def net(synced=None, **options):
    with fl.tensors.isolated():
        torch.manual_seed(0)
        return Net(**options) if synced is None else synced(Net(**options))


def hooked_net():
    model = net()
    model.first.weight.register_hook(lambda grad: 2 * grad)
    return model


def evaluated(model, batch):
    loss, metrics = plain(model, batch)
    return {"loss": fl.Mean(loss * len(batch[0]), len(batch[0])), **metrics}


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5)


def make(loss_fn=plain, optimizer=adamw, **options):
    return fl.Task(net(**options), loss_fn, evaluated, lambda model, batch: model(batch[0]), configure_optimizers=optimizer)


def batches(world, group=1, steps=4, sizes=None):
    """The batches of four steps, of which each rank has its part."""
    sizes = sizes if sizes is not None else [8 // world.size] * world.size
    for i in range(steps):
        whole = [data(group * i + j, sum(sizes)) for j in range(group)]
        yield [cut(batch, sizes, world.rank) for batch in whole] if world.size > 1 else whole


def numbers(named):
    return {name: (p.full_tensor() if is_sharded(p) else p).detach().flatten().tolist() for name, p in named.items()}


def trained(state, step, given):
    metrics = {}
    for group in given:
        state, metrics = step(state, fl.data.Item.of(*group, state=state))
    return state, metrics


def by_hand(place=None, *given, loss_fn=plain, group=1, sizes=None, optimizer=adamw, buffers=False, **options):
    """Weights after four steps, with averages and the last norm if there are any."""
    grads, steps = [part for part in given if part.takes != "step"], [part for part in given if part.takes == "step"]
    step = fl.pipe(loss_fn, fl.grad(), *grads, fl.apply(), *steps)
    state = fl.TrainState.create(make(loss_fn, optimizer, **options), seed=3, place=place)
    state, metrics = trained(step.start(state), step, batches(here(state), group, sizes=sizes))
    return told(state, metrics) | (numbers(state.buffers) if buffers else {})


def here(state):
    return fl.parallel.World() if state.store.place is None else state.store.place.world


def told(state, metrics):
    found = numbers(state.params)
    for name in ("ema", "swa"):
        tree = state.memory.get(name, {})
        found |= {f"{name}.{n}": v for n, v in numbers(tree.get("weights", tree)).items()}
    return found | ({"grad_norm": [float(metrics["grad_norm"])]} if "grad_norm" in metrics else {})


def torch_by_hand(world, group=1, clip=None, policy=None):
    """The same with torch alone."""
    model, options = net(), {} if policy is None else {"mp_policy": policy}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for given in batches(world, group):
        for j, batch in enumerate(given):
            model.set_requires_gradient_sync(j == group - 1)
            (plain(model, batch)[0] / group).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return numbers(dict(model.named_parameters()))


LAWS = (
    "weighted", "accumulate by epoch", "microbatch", "skip_nonfinite", "clip_adaptive", "clip_each", "clip_quantile", "grad_noise", "clip_value",
    "clip_norm", "cast", "freeze", "unfreeze_at", "ema", "ema with warm-up, now and then", "swa", "check_finite", "epoch_means",
)  # fmt: skip
"""Combinators of the list of laws whose update does not depend on how a batch is spread."""


def with_entry(choice, place, folder):
    """Weights after four steps of two batches with a combinator of the list of laws."""
    task = make()
    step = pipe_with(choice, task, Path(folder), [data(50)])
    state = fl.TrainState.create(task, seed=3, place=place)
    return told(*trained(step.start(state), step, batches(here(state), 2)))


def said(fn):
    """What an error says; None if there is none."""
    try:
        fn()
    except (fl.errors.FnlightError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def values():
    """A sharded state as a value: copied, as a plain module, evaluated, predicted with."""
    state = fl.TrainState.create(make(), seed=3, place=fl.parallel.fsdp())
    step = fl.pipe(plain, fl.grad(), fl.clip_norm(0.1), fl.apply(), fl.ema(0.5))
    state, _ = trained(step.start(state), step, batches(here(state), steps=2))
    twin, before = state.copy(), numbers(state.params)
    state, _ = trained(state, step, batches(here(state), steps=2))
    kept = numbers(twin.params) == before
    twin, _ = trained(twin, step, batches(here(twin), steps=2))
    same = numbers(twin.params) == numbers(state.params)
    module = state.module()
    module.requires_grad_(False)
    weights = numbers(state.params)
    scores = fl.evaluate(state, [data(5)], weights="ema"), fl.evaluate(state, [data(5)])
    return {
        "kept": kept, "same": same, "module": module(data(9)[0]).flatten().tolist(), "whole": not any(map(is_sharded, module.parameters())),
        "scores": scores, "predicted": torch.cat(fl.collect(fl.predict(state, [data(9)]))).flatten().tolist(), "untouched": numbers(state.params) == weights,
        "parts": [list(local(p).shape) for p in state.store.params[:1]], "memory": list(local(state.opt_state["first.weight"]["exp_avg"]).shape),
        "average": list(local(state.memory["ema"]["first.weight"]).shape),
    }  # fmt: skip


def parted(place=None, own=False):
    """Weights after three steps in parts of two samples, where ranks have three and two of them, or five and one of their own."""
    step = fl.pipe(weighted, fl.grad(), fl.accumulate(1), fl.microbatch(2), fl.apply(), fl.stop_when(fl.max_steps(3)))
    state = fl.TrainState.create(make(weighted), seed=3, place=place)
    whole, rank = [data(i, 6 if own else 5) for i in range(3)], here(state).rank
    alike = fl.sharded([cut(batch, [5, 1], rank) for batch in whole]) if own and place is not None else whole
    return numbers([each for each, _ in fl.run(step, state, alike)][-1].params)


def partly(model, batch):
    return model.last(model.first(batch[0])).sum()


def refusals(world):
    """What is said of input that makes no sense."""
    create = fl.TrainState.create
    plain_state = create(make())
    step = fl.pipe(partly, fl.grad(), fl.apply())
    lbfgs = make(optimizer=lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1))
    sharded = net()
    fully_shard(sharded)
    scattered = net()
    scattered.last.to("meta")
    return {
        "mesh": said(lambda: create(make(), place=fl.parallel.fsdp({"data": 3}))),
        "dimensions": said(lambda: create(make(), place=fl.parallel.fsdp({"tensor": world.size}))),
        "state": said(lambda: fl.parallel.fsdp().place(plain_state)),
        "cut": said(lambda: fl.parallel.fsdp().place(sharded)),
        "devices": said(lambda: fl.parallel.fsdp().place(scattered)),
        "moved": said(lambda: create(make(), place=fl.parallel.fsdp()).to("meta")),
        "partly": said(lambda: trained(create(make(partly), place=fl.parallel.fsdp()), step, batches(world))),
        "closure": said(lambda: trained(create(lbfgs, place=fl.parallel.fsdp()), fl.pipe(plain, fl.grad(), fl.apply()), batches(world))),
        "plan": said(
            lambda: create(make(), place=fl.parallel.fsdp({"data": 1, "tensor": 2}, tensor_parallel={"block.*": ColwiseParallel()}))
        ),
        "hook": said(lambda: create(attrs.evolve(make(), model=hooked_net()), place=fl.parallel.fsdp())),
        "no tensor": said(lambda: create(make(), place=fl.parallel.fsdp(tensor_parallel={"blocks.*.up": ColwiseParallel()}))),
        "method": said(lambda: create(make(), place=fl.parallel.fsdp(methods=["encode"]))),
    }


def two(folder, world):
    """What two ranks find."""
    sharded, bf16 = fl.parallel.fsdp(), MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    yield "plain", by_hand(sharded)
    yield "torch plain", torch_by_hand(world)
    yield "accumulated", by_hand(sharded, fl.accumulate(2), group=2)
    yield "torch accumulated", torch_by_hand(world, 2)
    yield "clipped", by_hand(sharded, fl.clip_norm(0.1))
    yield "torch clipped", torch_by_hand(world, 1, 0.1)
    yield "bf16", by_hand(fl.parallel.fsdp(mixed_precision="bf16"))
    yield "torch bf16", torch_by_hand(world, policy=bf16)
    yield "counted", by_hand(sharded, fl.accumulate(2), loss_fn=weighted, group=2, sizes=[5, 3])
    yield "offloaded", by_hand(fl.parallel.fsdp(offload=True, reshard=False, policy=(nn.Linear,)))
    yield "normed", by_hand(sharded, normed=True)
    yield (
        "synced",
        by_hand(sharded, loss_fn=weighted, sizes=[5, 3], optimizer=sgd, normed=True, synced=fl.parallel.sync_batchnorm, buffers=True),
    )
    of_torch = nn.SyncBatchNorm.convert_sync_batchnorm
    yield "synced, of torch", by_hand(sharded, loss_fn=weighted, sizes=[5, 3], optimizer=sgd, normed=True, synced=of_torch, buffers=True)
    yield "parted", parted(sharded)
    yield "parted, own data", parted(sharded, own=True)
    yield "scaled", by_hand(sharded, fl.loss_scale(init=2.0**127, interval=2), loss_fn=half)
    for name in LAWS:
        yield name, with_entry(name, sharded, folder)
    yield "values", values()
    yield "refusals", refusals(world)


half = fl.pipe(plain, fl.autocast(torch.float16))
PLAN = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}


def four(folder, world):
    """What four ranks find."""
    given = fl.clip_norm(0.1), fl.ema(0.9)
    yield "hsdp", by_hand(fl.parallel.hsdp({"replicate": 2, "shard": 2}), *given)
    tensor = fl.parallel.fsdp({"data": 2, "tensor": 2}, tensor_parallel=PLAN)
    yield "tensor parallel", by_hand(tensor, *given)
    yield "counted, tensor parallel", by_hand(tensor, *given, loss_fn=weighted, sizes=[5, 3])
    yield (
        "synced, tensor parallel",
        by_hand(tensor, loss_fn=weighted, sizes=[5, 3], optimizer=sgd, normed=True, synced=fl.parallel.sync_batchnorm, buffers=True),
    )
    for name in ("clip_each", "clip_adaptive", "grad_noise"):
        yield f"{name}, tensor parallel", by_hand(tensor, ENTRIES[name].build(Path(folder), None))
    yield "ends", world.gather(ends(tensor, folder, world))


def ends(place, folder, world):
    """Where runs end that rank 1 alone has a reason to end: its clock is fast, and it is sent a signal; and where the second goes on to."""
    loader = DataLoader(TensorDataset(*data(0, 24)), batch_size=8, shuffle=True)
    clock = iter(range(0, 10**7, 7 if world.rank == 1 else 1))
    step = fl.pipe(plain, fl.grad(), fl.apply(), fl.stop_when(fl.max_time(60)))
    timed = [s for s, _ in fl.run(step, fl.TrainState.create(make(), seed=3, place=place), loader, clock=lambda: float(next(clock)))][-1]
    calls = iter(range(10**7))

    def told_to_end(model, batch):
        if next(calls) == 7 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(model, batch)

    def fitted(loss_fn, **options):
        config = fl.FitConfig(dir=Path(folder, "ends"), resume=True, progress=False, **options)
        return fl.fit(fl.TrainState.create(make(loss_fn), seed=3, place=place), loader, config)

    ended = fitted(told_to_end, max_epochs=100_000, signals=True)
    gone_on = fitted(told_to_end, max_steps=ended.progress.step + 2)
    return [[state.stopped, state.progress.step] for state in (timed, ended, gone_on)]


def main(cases, folder):
    with fl.parallel.join() as world:
        found = dict(globals()[cases](folder, world))
    Path(folder, f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
