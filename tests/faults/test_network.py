"""A network that is slow changes nothing; one that is cut ends the ranks with an error that says so, and the run resumes.

Two hosts are two network namespaces with a cable between them: for whoever may make them, as root on Linux may.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fnlight import newest, verify
from tests.repo.source import ROOT

PROGRAM = ROOT / "tests" / "parallel" / "linked.py"
PATIENCE = 5  # seconds that a rank waits for the other


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


class Hosts:
    """Two hosts, of which one can be reached from the other by one cable."""

    def __init__(self) -> None:
        number = os.getpid()
        self.names, self.net = [f"fn{number}a", f"fn{number}b"], f"10.{200 + number % 50}.{number // 50 % 250}"

    def build(self) -> None:
        ends = [f"v{name}" for name in self.names]
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", self.names[0], "type", "veth", "peer", "name", ends[1], "netns", self.names[1])
        for rank, (name, end) in enumerate(zip(self.names, ends, strict=True)):
            ip("-n", name, "addr", "add", f"{self.net}.{rank + 1}/24", "dev", end)
            for device in ("lo", end):
                ip("-n", name, "link", "set", device, "up")

    def tear_down(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=30)

    def slow(self) -> None:
        """From one of them on, a modem's rate."""
        words = ["tc", "qdisc", "add", "dev", f"v{self.names[0]}", "root", "tbf", "rate", "400kbit", "burst", "4kb", "latency", "400ms"]
        subprocess.run(["ip", "netns", "exec", self.names[0], *words], check=True, capture_output=True, timeout=30)

    def cut(self) -> None:
        ip("-n", self.names[0], "link", "set", f"v{self.names[0]}", "down")

    def mend(self) -> None:
        ip("-n", self.names[0], "link", "set", f"v{self.names[0]}", "up")

    def start(self, folder: Path, steps: int, patience: float = 60) -> list[subprocess.Popen[str]]:
        """One rank on each host."""
        return [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, str(PROGRAM), str(patience), str(folder), str(steps)],
                env={
                    **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": f"{self.net}.1", "MASTER_PORT": "29500",
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": f"v{name}",
                },
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank, name in enumerate(self.names)
        ]  # fmt: skip


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    found = Hosts()
    if shutil.which("ip") is None or shutil.which("tc") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs root, ip and tc")
    try:
        found.build()
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        found.tear_down()
        pytest.skip(f"needs to make network namespaces: {error}")
    yield found
    found.tear_down()


def ended(ranks: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str]]:
    """The code of each, and what it said."""
    found = []
    for rank in ranks:
        try:
            said = rank.communicate(timeout=timeout)[1]
        finally:
            rank.kill()
        found.append((rank.returncode, said))
    return found


def ran(hosts: Hosts, folder: Path, steps: int) -> dict[str, object]:
    """The result of a run that nothing happens to."""
    folder.mkdir(exist_ok=True)
    assert [code for code, _ in ended(hosts.start(folder, steps))] == [0, 0]
    return json.loads((folder / "result.json").read_text())


def until_saved(ranks: list[subprocess.Popen[str]], folder: Path) -> None:
    """Wait for the first checkpoint."""
    while newest(folder / "run") is None:
        with pytest.raises(subprocess.TimeoutExpired, match="timed out after"):  # it goes on
            ranks[0].wait(0.05)


def test_a_slow_network_and_a_slow_rank_change_nothing(hosts, tmp_path):
    """At a modem's rate, and with a rank that stands still for a second, a run ends in the very weights that it would have had."""
    wanted = ran(hosts, tmp_path / "fast", 12)
    hosts.slow()
    (tmp_path / "slow").mkdir()
    ranks = hosts.start(tmp_path / "slow", 12)
    until_saved(ranks, tmp_path / "slow")
    ranks[1].send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired, match="timed out after"):  # it waits
        ranks[0].wait(1)
    ranks[1].send_signal(signal.SIGCONT)
    assert [code for code, _ in ended(ranks)] == [0, 0]
    assert json.loads((tmp_path / "slow" / "result.json").read_text()) == wanted


def test_a_network_that_is_cut_ends_both_ranks_and_loses_nothing(hosts, tmp_path):
    """Both say what they waited for, once their patience ends; the checkpoint is sound, and from it on all is as if nothing had been."""
    folder = tmp_path / "cut"
    folder.mkdir()
    ranks = hosts.start(folder, 10**6, patience=PATIENCE)
    until_saved(ranks, folder)
    hosts.cut()
    for rank, (code, said) in enumerate(ended(ranks, 6 * PATIENCE)):
        assert code == 1
        assert re.search(
            rf"ParallelError: rank {rank} of 2 timed out waiting for the other ranks after step \d+ \(.*(Timed out|[Cc]onnection)", said
        ), said[-3000:]
    found = newest(folder / "run")
    assert verify(found) == []
    hosts.mend()
    steps = int(Path(found).name.removeprefix("step-")) + 3
    assert ran(hosts, folder, steps) == ran(hosts, tmp_path / "whole", steps)
