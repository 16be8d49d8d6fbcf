"""Two ranks: the second ends silently where the first waits for it; the error of the first is printed, one line for each place.

python waiting.py
"""

import json
import os
import socket
import sys

import torch
from torch import distributed

import fnlight as fl
from fnlight.parallel import ddp, join
from fnlight.testing import tiny_batches, tiny_task


def meet(place: str, rank: int) -> None:
    """Come to the place, where rank 1 ends."""
    with join(timeout=20):
        if place == "start":
            _end(rank)
            fl.fit(fl.TrainState.create(tiny_task()), tiny_batches(), fl.FitConfig(max_steps=1, progress=False))
        state = fl.TrainState.create(tiny_task(), place=ddp())
        if place == "evaluation":
            _end(rank)
            fl.evaluate(state, tiny_batches())
        if place == "prediction":
            outputs = fl.predict(state, tiny_batches())
            _end(rank)
            fl.collect(outputs)
        _end(rank)


def _end(rank: int) -> None:
    """Rank 1 ends, once the other has joined: that one would otherwise find nobody to join."""
    store = distributed.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["joined"])
        os._exit(0)
    store.set("joined", "")


def said(place: str) -> str:
    """What rank 0 says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    readable, writable = os.pipe()
    for rank in (0, 1):
        if os.fork() == 0:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
            try:
                meet(place, rank)
            except BaseException as error:  # noqa: BLE001  # it is what is printed
                os.write(writable, f"{type(error).__name__}: {error}".encode())
            os._exit(0)
    os.close(writable)
    for _ in (0, 1):
        os.wait()
    with os.fdopen(readable) as file:
        return file.read()


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({place: said(place) for place in ("start", "evaluation", "prediction", "end")}, sys.stdout)
