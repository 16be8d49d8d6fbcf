"""The rank of a process depends only on its environment variables."""

import pytest

from fnlight.errors import ParallelError
from fnlight.parallel import World, first_host, join, named_world


def test_a_shell_within_an_allocation_is_one_process():
    """SLURM's variables of a job say nothing about a process; only those of a step do."""
    assert named_world({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == World()


def test_torchrun_is_believed_before_slurm():
    """torchrun under SLURM: each task starts several processes."""
    both = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert named_world(both) == World(5, 8, 1)


@pytest.mark.parametrize("environ", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "two", "RANK": "0"}])
def test_an_environment_that_contradicts_itself_is_refused(environ):
    """A rank that is missing, beyond the end, or no number."""
    with pytest.raises(ParallelError, match=r"does not give a valid rank and number of processes.*torchrun --nproc-per-node"):
        named_world(environ)


@pytest.mark.parametrize("nodes, host", [("a[01-3]x,b", "a01x"), ("node7", "node7"), ("gpu-[12,14]", "gpu-12"), ("", "")])
def test_the_first_host_of_a_list_is_found(nodes, host):
    """SLURM abbreviates lists of hosts."""
    assert first_host(nodes) == host


def test_processes_that_were_not_told_where_to_meet_are_told_so(monkeypatch):
    """A size without a meeting point is no group."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ParallelError, match="does not say at which address the processes connect: MASTER_ADDR=None"), join():
        pass


def test_what_torch_says_of_the_others_is_told_apart_from_other_errors():
    """An error of a backend is that nobody answers; whatever else is raised in a step stays what it is."""
    for text in ("[gloo/transport/tcp/pair.cc] Connection closed by peer [::1]:1", "NCCL error: remote process exited"):
        found = World(1, 2).lost(RuntimeError(text), "after step 7")
        assert "rank 1 of 2 timed out waiting for the other ranks after step 7" in str(found)
        assert text in str(found)
    assert World(1, 2).lost(RuntimeError("shapes do not fit"), "after step 7") is None
    assert World(1, 2).lost(ValueError("gloo"), "after step 7") is None
