"""Replicas that join and leave while the others keep training, with torchft (``pip install "fnlight[torchft]"``), which tracks the replicas.

    python examples/replicas.py

starts torchft's lighthouse and two replicas. One of them is killed at step 20 and started again: the other keeps training alone, and sends its state to
the restarted one. Expected last line: ``both hold the same weights at step 200``.

The function `replicated` does all of this. It makes two combinators: one averages gradients over the present replicas, and skips a step in which
a replica was lost; the other lets a replica that joins continue from the state of a present one, which is sent as a checkpoint.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import attrs
import torch
from torch import nn
from torch.distributed import TCPStore
from torch.nn import functional as F
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer

import fnlight as fl

NUMBER, LIFE = int(os.environ.get("REPLICA", "0")), int(os.environ.get("LIFE", "0"))
STEPS = 200


def replicated(manager):
    """A combinator of gradients, and one of steps, for replicas that `manager` coordinates."""
    now = {}

    def export():
        """The state of this replica, as the files of a checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            fl.save(now["state"], f"{folder}/state")
            return {
                file.name: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in Path(folder, "state").iterdir()
            }

    def heal(files):
        """Load the state of another replica; the seed, and so the order of the data, remains that of this replica."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "state").mkdir()
            for name, content in files.items():
                Path(folder, "state", name).write_bytes(content.numpy().tobytes())
            now["state"] = attrs.evolve(fl.restore(f"{folder}/state", like=now["state"]), seed=now["state"].seed)

    def together(grad_fn):
        def averaged(store, batches, key):
            found = grad_fn(store, batches, key)
            for work in [manager.allreduce(value) for value in found.values if value is not None]:
                work.wait()
            return found if manager.should_commit() else found._replace(finite=False)  # a replica was lost: skip the step

        return averaged

    def joining(step):
        def joined(state, batch):
            now["state"] = state
            manager.start_quorum()  # calls export or heal where a replica joins
            return step(now.pop("state"), batch)

        return joined

    manager.register_state_dict_fn("fnlight", heal, export)
    gradients = fl.Combinator("replicated", together, takes="grad", gives="grad")
    return gradients, fl.Combinator("joining", joining, takes="step", gives="step")


def train_step(model, batch):
    time.sleep(0.05)  # as a large model would take
    x, y = batch
    return F.mse_loss(model(x), y)


def dies(state):
    """A stop rule that never stops: in the first process of replica 1 it kills the process, as a failing machine would."""
    if NUMBER == 1 and LIFE == 0 and state.progress.step == 20:
        os.kill(os.getpid(), signal.SIGKILL)


def train():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # for this replica only, which is one process
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=10)), load_state_dict=None, state_dict=None, min_replica_size=1, use_async_quorum=False,
        rank=0, world_size=1, store_addr="127.0.0.1", store_port=store.port, replica_id=f"replica_{NUMBER}",
    )  # fmt: skip
    gradients, joining = replicated(manager)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    task = fl.Task(model, train_step, configure_optimizers=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3))
    x = torch.randn(3200, 4, generator=torch.Generator().manual_seed(NUMBER))  # each replica has its own data
    loader = fl.TensorLoader((x, x.sum(1, keepdim=True)), batch_size=32, shuffle=True)
    step = fl.pipe(train_step, fl.grad(), gradients, fl.clip_norm(1.0), fl.apply(), joining, fl.stop_when(fl.max_steps(STEPS) | dies))
    for state, _ in fl.run(step, fl.TrainState.create(task, seed=NUMBER), loader):  # noqa: B007  # the last one is printed
        pass
    print(f"{state.progress.step} {sum(p.double().sum() for p in state.params.values()):.9f}")
    manager.shutdown(wait=False)


def main():
    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=1, join_timeout_ms=1000, heartbeat_timeout_ms=1000)
    environ = {**os.environ, "TORCHFT_LIGHTHOUSE": lighthouse.address()}

    def begin(number, life):
        return subprocess.Popen(
            [sys.executable, __file__], env={**environ, "REPLICA": str(number), "LIFE": str(life)}, stdout=subprocess.PIPE, text=True
        )

    first, second = begin(0, 0), begin(1, 0)
    assert second.wait() == -signal.SIGKILL
    second = begin(1, 1)
    ends = [each.communicate()[0].splitlines()[-1] for each in (first, second)]
    assert ends[0] == ends[1], ends
    print(f"both hold the same weights at step {ends[0].split()[0]}")
    lighthouse.shutdown()


if __name__ == "__main__":
    train() if "REPLICA" in os.environ else main()
