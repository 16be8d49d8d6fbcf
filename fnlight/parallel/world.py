"""Where this process stands among those that train together, and how it joins them.

fnlight launches no processes: torchrun, SLURM, Ray or a user does, and says so in the environment. `join` makes the process group out of that;
a group that is there already is used as it is.
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
)  # what stands in the errors of torch's backends
_BEAT = 0.5  # seconds, about, between two agreements of a `Pulse`
_LETTING_GO = 0.05  # seconds in which the threads of gloo end what they are about


@attrs.frozen
class World:
    """This process among those that train together.

    Args:
        rank: Its number, from 0 on; the one of rank 0 writes files and logs.
        size: How many there are.
        local_rank: Its number on its machine, which is that of its accelerator.
        group: The process group that they talk in; None is the default one.

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
        """The means over all ranks of some scalars, in one go; nothing is waited for on an accelerator."""
        device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
        found = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device).detach() for v in values])
        distributed.all_reduce(found, group=self.group)
        return list((found / self.size).unbind())

    def gather(self, tree: Any) -> list[Any]:
        """What every rank gives, in their order, on all of them: any tree that a checkpoint can hold, tensors among it; they come on the CPU."""
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
        """Say of an error of torch's network what it says of the others: that they were waited for in vain, and where."""
        try:
            yield
        except RuntimeError as error:
            lost = self.lost(error, where)
            if lost is None:
                raise
            raise lost from error

    def lost(self, error: BaseException, where: str) -> ParallelError | None:
        """What an error of torch says of the others: that they were waited for in vain. None if it is about something else."""
        text = str(error).strip()
        known = isinstance(error, RuntimeError) and not isinstance(error, ParallelError)
        if not known or not (isinstance(error, distributed.DistError) or _SILENCE.search(text)):
            return None
        return ParallelError(
            f"rank {self.rank} of {self.size} has waited in vain for the others {where} ({text.splitlines()[0][:300]}): one of them has "
            "ended, stands still or cannot be reached; look for the first error among the ranks. Started again with resume=True, the run goes on "
            "from its newest checkpoint"
        )

    def apart(self) -> "World":
        """The same ranks in a group of their own, on the CPU: what a thread tells in it is not mixed with what goes on meanwhile."""
        return attrs.evolve(self, group=None if self.size == 1 else distributed.new_group(backend="gloo"))

    def leave(self) -> None:
        """Let go of a group that `apart` made."""
        if self.group is not None:
            distributed.destroy_process_group(self.group)

    def pulse(self, clock: Callable[[], float], signals: Any = None) -> "Pulse":
        """A clock that shows all ranks the same time, and tells all of them of a signal that one has received."""
        return Pulse(self, clock, signals)


class Pulse:
    """A clock that ranks agree on about twice a second, and that stands still in between; made by `World.pulse`.

    It is asked once for every step, so all ranks ask at the same steps; how many steps pass until they next agree is agreed, too. So whatever
    depends on time or on a signal happens at one step on all of them, without communication at every step.

    Args:
        world: The ranks.
        clock: Gives this rank's seconds.
        signals: What listens for signals on this rank; None where nothing does.

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
        """Seconds; in between two agreements those of the last one."""
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
    """A tree as bytes: JSON that says where tensors stand, then the tensors as safetensors.

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

    head = json.dumps(encode(tree, put, "what ranks tell each other"), allow_nan=False).encode()
    return len(head).to_bytes(8, "little") + head + (safetensors.torch.save(tensors) if tensors else b"")


def unpack(data: bytes) -> Any:
    """The tree that `pack` gave.

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
    """Where a group takes small tensors from: the CPU, unless only an accelerator can talk."""
    talks = str(distributed.get_backend_config(group))
    return torch.device("cpu") if "cpu" in talks or "gloo" in talks else torch.device(torch.accelerator.current_accelerator() or "cpu")


def world() -> World:
    """This process in the group that it has joined.

    Returns:
        Rank 0 of 1 where it has joined none.

    Example:
        >>> world().size
        1
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return World()
    rank = distributed.get_rank()
    return World(rank, distributed.get_world_size(), named_world(os.environ).local_rank)


def named_world(environ: Mapping[str, str]) -> World:
    """This process as the environment names it, whether or not it has joined a group.

    Args:
        environ: Variables of torchrun (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``), or those that SLURM gives to each task of a step.

    Returns:
        Rank 0 of 1 where nothing is said.

    Raises:
        ParallelError: If what is said contradicts itself.

    Example:
        >>> named_world({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
        World(rank=1, size=4, local_rank=1)
        >>> named_world({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "3"}).size
        8
    """
    if "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_NUM_TASKS" in environ:  # of a step alone: a shell within an allocation is one process
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return World()
    given = {name: environ.get(name, "0" if name == names[2] else "") for name in names}
    if not all(value.isdecimal() for value in given.values()) or not int(given[names[0]]) < int(given[names[1]]):
        raise ParallelError(
            f"the environment does not say which of how many processes this is: {given}; start the script with "
            "`torchrun --nproc-per-node=2 script.py`, or unset these variables to train in one process"
        )
    rank, size, local = (int(value) for value in given.values())
    return World(rank, size, local)


@contextmanager
def join(*, backend: str | None = None, timeout: float | None = None, sleep: Callable[[float], Any] = time.sleep) -> Iterator[World]:
    """Join the processes that the environment names, for as long as the block lasts.

    A group that was made before is used as it is and left alone. Where this process is alone, nothing is done. After an error the group is left
    as it is: the error is told first, then the process ends, and with it the others.

    Args:
        backend: Such as ``"gloo"``; None lets torch choose for each kind of device.
        timeout: Seconds after which a process that waits for others gives up; None takes torch's own.
        sleep: Waits for seconds, at the end, while the threads of the network end.

    Yields:
        Where this process stands.

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
        distributed.barrier()  # a process that leaves early would look like one that died
    distributed.destroy_process_group()
    # The threads of gloo outlive their group where DDP has held it. What they let go of behind the last collective takes the interpreter, and an
    # interpreter that has ended by then aborts the process.
    sleep(_LETTING_GO)


def _enter(named: World, backend: str | None, timeout: float | None) -> None:
    wait = timedelta(seconds=timeout) if timeout is not None else distributed.default_pg_timeout
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(named.local_rank % torch.accelerator.device_count())
    host, port = _meeting_point(os.environ)
    # Under torchrun its agent holds the store, for all attempts: what a dead attempt has left there must not be read.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = distributed.TCPStore(host, port, named.size, is_master=not agent and named.rank == 0, timeout=wait, wait_for_workers=False)
        prefixed = distributed.PrefixStore(f"fnlight attempt {attempt}", store)
        distributed.init_process_group(backend, store=prefixed, rank=named.rank, world_size=named.size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise ParallelError(
            f"rank {named.rank} of {named.size} cannot meet the others at {host}:{port}: {error}; check that all were started, and that "
            "MASTER_ADDR and MASTER_PORT are the same for all of them"
        ) from error


def _meeting_point(environ: Mapping[str, str]) -> tuple[str, int]:
    """The host and the port where the processes meet."""
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if host is None and "SLURM_STEP_NODELIST" in environ:
        host = first_host(environ["SLURM_STEP_NODELIST"])
    if port is None and "SLURM_JOB_ID" in environ:
        port = str(15000 + int(environ["SLURM_JOB_ID"]) % 20000)  # one for all tasks of a job, another for other jobs
    if not host or port is None or not port.isdecimal():
        raise ParallelError(
            f"nobody says where the processes are to meet: MASTER_ADDR={host!r}, MASTER_PORT={port!r}; torchrun sets both, "
            "otherwise give the host of rank 0 and a free port there"
        )
    return host, int(port)


def first_host(nodes: str) -> str:
    """The first host of a list in SLURM's notation.

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
    """Which part of a stream this process reads, among all workers of all ranks: for the ``__iter__`` of an ``IterableDataset``.

    Returns:
        A number, and how many there are: the i-th part is every entry whose place leaves the rest i.

    Example:
        >>> index, count = stream_part()
        >>> [i for i in range(6) if i % count == index]
        [0, 1, 2, 3, 4, 5]
    """
    here, info = named_world(os.environ), get_worker_info()
    here = here if here.size > 1 else world()
    workers, number = (1, 0) if info is None else (info.num_workers, info.id)
    return here.rank * workers + number, here.size * workers
