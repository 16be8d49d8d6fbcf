"""The process group: the rank of this process, the number of ranks, and how a process joins the group.

fnlight launches no processes: torchrun, SLURM, Ray or a user does, and sets environment variables. `join` makes the process group from them;
a group that exists already is used unchanged.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import attrs
import safetensors.torch
import torch
from torch import Tensor, distributed
from torch.utils.data import get_worker_info

from fnlight.checkpoint import decode, encode
from fnlight.errors import ParallelError

_SILENCE = re.compile(
    r"gloo/|NCCL error|ProcessGroup(Gloo|NCCL)|Connection (closed|reset) by peer"
)  # texts in the errors of torch's backends
_BEAT = 0.5  # approximate seconds between two agreements of a `Pulse`
_LETTING_GO = 0.05  # seconds in which the threads of gloo finish their work


@attrs.frozen
class World:
    """The rank of this process, and the number of processes that train together.

    Args:
        rank: Number of this process, from 0; rank 0 writes files and logs.
        size: Number of processes.
        local_rank: Number of this process on its machine, which is also the index of its accelerator.
        group: Their process group; None is the default one.

    Example:
        >>> World()
        World(rank=0, size=1, local_rank=0)
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = attrs.field(default=None, eq=False, repr=False)

    def all_reduce_sum(self, numbers: Sequence[int]) -> list[int]:
        """The sums over all ranks of some whole numbers."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.int64, device=_device(self.group))
        distributed.all_reduce(found, group=self.group)
        return found.tolist()

    def all_reduce_max(self, numbers: Sequence[float]) -> list[float]:
        """The largest over all ranks of some numbers."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64, device=_device(self.group))
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self.group)
        return found.tolist()

    def mean(self, *values: Any) -> list[Tensor]:
        """The means over all ranks of some scalars, in one message, without a host sync on an accelerator."""
        device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
        found = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device).detach() for v in values])
        distributed.all_reduce(found, group=self.group)
        return list((found / self.size).unbind())

    def gather(self, tree: Any) -> list[Any]:
        """All-gather a tree: a list of the trees of all ranks, in rank order; any tree that a checkpoint can hold, with tensors on the CPU."""
        if self.size == 1:
            return [tree]
        mine, device = pack(tree), _device(self.group)
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.size)]
        distributed.all_gather(sizes, torch.tensor([len(mine)], device=device), group=self.group)
        most = max(int(size) for size in sizes)
        padded = torch.frombuffer(bytearray(mine.ljust(most, b"\0")), dtype=torch.uint8).to(device)
        parts = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(self.size)]
        distributed.all_gather(parts, padded, group=self.group)
        return [unpack(part[: int(size)].cpu().numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    @contextmanager
    def waiting(self, where: str) -> Iterator[None]:
        """Turn a network error of torch into a `ParallelError`: timed out waiting for the other ranks, and where."""
        try:
            yield
        except RuntimeError as error:
            lost = self.lost(error, where)
            if lost is None:
                raise
            raise lost from error

    def lost(self, error: BaseException, where: str) -> ParallelError | None:
        """The `ParallelError` for a network error of torch (timed out waiting for the other ranks); None for any other error."""
        text = str(error).strip()
        known = isinstance(error, RuntimeError) and not isinstance(error, ParallelError)
        if not known or not (isinstance(error, distributed.DistError) or _SILENCE.search(text)):
            return None
        return ParallelError(
            f"rank {self.rank} of {self.size} timed out waiting for the other ranks {where} ({text.splitlines()[0][:300]}): one of them has "
            "ended, hangs or cannot be reached; look for the first error among the ranks. A run of fit that is started again with resume=True "
            "resumes from its newest checkpoint"
        )

    def apart(self) -> "World":
        """The same ranks in a separate group, on the CPU: a thread that communicates in it does not disturb other communication."""
        return attrs.evolve(self, group=None if self.size == 1 else distributed.new_group(backend="gloo"))

    def leave(self) -> None:
        """Destroy a group that `apart` made."""
        if self.group is not None:
            distributed.destroy_process_group(self.group)

    def pulse(self, clock: Callable[[], float], signals: Any = None) -> "Pulse":
        """A clock that gives all ranks the same time, and tells all of them about a signal that one has received."""
        return Pulse(self, clock, signals)


class Pulse:
    """A clock on which ranks agree about twice a second; in between it returns the same time. Made by `World.pulse`.

    It is called once per step, so all ranks call it at the same steps; they also agree on the number of steps until the next agreement. So
    whatever depends on time or on a signal happens at the same step on all ranks, without communication at every step.

    Args:
        world: The ranks.
        clock: Gives this rank's seconds.
        signals: The signal handler of this rank; None if there is none.

    Example:
        >>> Pulse(World(), lambda: 7.0, None)()
        7.0
    """

    def __init__(self, world: World, clock: Callable[[], float], signals: Any) -> None:
        self.world, self.clock, self.signals = world, clock, signals
        self.begun, self.now, self.left, self.every = clock(), 0.0, 0, 1
        if signals is not None:
            signals.shared = True

    def __call__(self) -> float:
        """Seconds; between two agreements those of the last one."""
        self.left -= 1
        if self.left < 0:
            self._agree()
        return self.begun + self.now

    def _agree(self) -> None:
        passed, signals = self.clock() - self.begun, self.signals
        per_step = max(passed - self.now, 1e-6) / self.every
        wanted = min(max(1, int(_BEAT / per_step)), 4 * self.every) if self.world.rank == 0 else 0
        self.now, number, every = self.world.all_reduce_max([passed, 0 if signals is None else signals.number, wanted])
        self.left = self.every = int(every) or 1
        self.left -= 1
        if signals is not None:
            signals.agreed(int(number))


def pack(tree: Any) -> bytes:
    """Encode a tree as bytes: JSON with the positions of tensors, then the tensors as safetensors.

    Args:
        tree: Any tree that a checkpoint can hold.

    Returns:
        Bytes, for `unpack`.

    Example:
        >>> unpack(pack({"a": (1, torch.ones(2))}))
        {'a': (1, tensor([1., 1.]))}
    """
    tensors: dict[str, Tensor] = {}

    def put(_: str, tensor: Tensor) -> str:
        name = str(len(tensors))
        tensors[name] = tensor.detach().cpu().contiguous().clone()
        return name

    head = json.dumps(encode(tree, put, "a message between ranks"), allow_nan=False).encode()
    return len(head).to_bytes(8, "little") + head + (safetensors.torch.save(tensors) if tensors else b"")


def unpack(data: bytes) -> Any:
    """Decode the bytes that `pack` returned.

    Args:
        data: Bytes.

    Returns:
        The tree, tensors on the CPU.

    Example:
        >>> unpack(pack([float("inf"), None]))
        [inf, None]
    """
    end = 8 + int.from_bytes(data[:8], "little")
    tensors = safetensors.torch.load(data[end:]) if len(data) > end else {}
    return decode(json.loads(data[8:end]), tensors.__getitem__)


def _device(group: Any) -> torch.device:
    """The device of small tensors that a group sends: the CPU, unless only its accelerator backend can communicate."""
    talks = str(distributed.get_backend_config(group))
    return torch.device("cpu") if "cpu" in talks or "gloo" in talks else torch.device(torch.accelerator.current_accelerator() or "cpu")


def world() -> World:
    """Return the rank of this process and the size of the group that it has joined.

    Returns:
        Rank 0 of 1 if it has joined none.

    Example:
        >>> world().size
        1
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return World()
    rank = distributed.get_rank()
    return World(rank, distributed.get_world_size(), named_world(os.environ).local_rank)


def named_world(environ: Mapping[str, str]) -> World:
    """Return the rank of this process and the number of processes from the environment, whether or not it has joined a group.

    Args:
        environ: Variables of torchrun (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``), or those that SLURM gives to each task of a step.

    Returns:
        Rank 0 of 1 if none of these variables is set.

    Raises:
        ParallelError: If the variables contradict each other.

    Example:
        >>> named_world({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
        World(rank=1, size=4, local_rank=1)
        >>> named_world({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "3"}).size
        8
    """
    if "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_NUM_TASKS" in environ:  # set only within a step: a shell within an allocation is one process
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return World()
    given = {name: environ.get(name, "0" if name == names[2] else "") for name in names}
    if not all(value.isdecimal() for value in given.values()) or not int(given[names[0]]) < int(given[names[1]]):
        raise ParallelError(
            f"the environment does not give a valid rank and number of processes: {given}; start the script with "
            "`torchrun --nproc-per-node=2 script.py`, or unset these variables to train in one process"
        )
    rank, size, local = (int(value) for value in given.values())
    return World(rank, size, local)


@contextmanager
def join(*, backend: str | None = None, timeout: float | None = None, sleep: Callable[[float], Any] = time.sleep) -> Iterator[World]:
    """Join the processes that the environment names, for the duration of the block.

    A group that exists already is used unchanged and not destroyed. In a single process nothing is done. After an error the group is not
    destroyed either: the error is raised, this process ends, and so do the others.

    Args:
        backend: Such as ``"gloo"``; None lets torch choose for each device type.
        timeout: Seconds after which a process that waits for other ranks fails; None takes torch's default.
        sleep: A function of seconds, called at the end, while the network threads finish.

    Yields:
        The rank of this process and the number of processes.

    Raises:
        ParallelError: If the environment contradicts itself, or the others cannot be reached.

    Example:
        >>> with join() as found:
        ...     found.size
        1
    """
    named = World() if distributed.is_available() and distributed.is_initialized() else named_world(os.environ)
    if named.size == 1:
        yield world()
        return
    _enter(named, backend, timeout)
    yield named
    with named.waiting("at the end"):
        distributed.barrier()  # a process that leaves early would look like one that crashed
    distributed.destroy_process_group()
    # If DDP has used the group, the threads of gloo outlive it. What they free after the last collective needs the interpreter; if the
    # interpreter has shut down by then, the process aborts.
    sleep(_LETTING_GO)


def _enter(named: World, backend: str | None, timeout: float | None) -> None:
    wait = timedelta(seconds=timeout) if timeout is not None else distributed.default_pg_timeout
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(named.local_rank % torch.accelerator.device_count())
    host, port = _meeting_point(os.environ)
    # Under torchrun its agent holds the store for all attempts: entries of a failed attempt must not be read.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = distributed.TCPStore(host, port, named.size, is_master=not agent and named.rank == 0, timeout=wait, wait_for_workers=False)
        prefixed = distributed.PrefixStore(f"fnlight attempt {attempt}", store)
        distributed.init_process_group(backend, store=prefixed, rank=named.rank, world_size=named.size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise ParallelError(
            f"rank {named.rank} of {named.size} cannot connect to the other ranks at {host}:{port}: {error}; check that all were started, and "
            "that MASTER_ADDR and MASTER_PORT are the same for all of them"
        ) from error


def _meeting_point(environ: Mapping[str, str]) -> tuple[str, int]:
    """The host and the port at which the processes connect."""
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if host is None and "SLURM_STEP_NODELIST" in environ:
        host = first_host(environ["SLURM_STEP_NODELIST"])
    if port is None and "SLURM_JOB_ID" in environ:
        port = str(15000 + int(environ["SLURM_JOB_ID"]) % 20000)  # one for all tasks of a job, another for other jobs
    if not host or port is None or not port.isdecimal():
        raise ParallelError(
            f"the environment does not say at which address the processes connect: MASTER_ADDR={host!r}, MASTER_PORT={port!r}; torchrun sets "
            "both; with another launcher set them to the host of rank 0 and a free port there"
        )
    return host, int(port)


def first_host(nodes: str) -> str:
    """Return the first host of a list in SLURM's notation.

    Args:
        nodes: Such as ``"node[03-05,7],other"``.

    Returns:
        Its name.

    Example:
        >>> first_host("node[03-05,7],other"), first_host("one,two")
        ('node03', 'one')
    """
    found = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    return "" if found is None else "".join(part or "" for part in found.groups())


def stream_part() -> tuple[int, int]:
    """Return which part of a stream this process reads, among all workers of all ranks: for the ``__iter__`` of an ``IterableDataset``.

    Returns:
        An index i and a count n: this process reads every entry whose position modulo n is i.

    Example:
        >>> index, count = stream_part()
        >>> [i for i in range(6) if i % count == index]
        [0, 1, 2, 3, 4, 5]
    """
    here, info = named_world(os.environ), get_worker_info()
    here = here if here.size > 1 else world()
    workers, number = (1, 0) if info is None else (info.num_workers, info.id)
    return here.rank * workers + number, here.size * workers
