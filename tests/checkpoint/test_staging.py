"""Staging: the copy is not changed by later writes to the tensors."""

import threading

import pytest
import torch

from fnlight.checkpoint import Background, Buffers


def test_staged_tensors_are_bitwise_those_of_the_moment() -> None:
    """All dtypes and strides; later changes do not show, and the second time the same memory is filled."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64)
    tensors = {str(d): torch.arange(6).reshape(2, 3).to(d) for d in dtypes}
    tensors |= {"turned": torch.randn(3, 4).T, "spread": torch.ones(1).expand(4), "empty": torch.empty(0), "scalar": torch.tensor(3.0)}
    tensors |= {"conjugate": torch.randn(3, dtype=torch.complex64).conj()}
    before, buffers = {name: t.clone() for name, t in tensors.items()}, Buffers()
    staged, wait = buffers.stage({"a": tensors})
    wait()
    where = {name: t.data_ptr() for name, t in staged["a"].items()}
    for name, tensor in tensors.items():
        if name != "spread":
            tensor.zero_()
        assert torch.equal(staged["a"][name], before[name]), name
        assert staged["a"][name].dtype == before[name].dtype
    again, _ = buffers.stage({"a": tensors})
    assert {name: t.data_ptr() for name, t in again["a"].items()} == where
    assert torch.equal(again["a"]["turned"], tensors["turned"])


def test_buffers_follow_what_is_saved() -> None:
    """A tensor of another shape gets other memory, and that of one that is gone is given back."""
    buffers = Buffers()
    buffers.stage({"a": {"x": torch.ones(2), "y": torch.ones(3)}})
    staged, _ = buffers.stage({"a": {"x": torch.ones(5)}})
    assert staged["a"]["x"].shape == (5,)
    assert list(buffers._held) == [("a", "x")]


def test_a_job_is_done_at_once_where_no_thread_can_be_started(monkeypatch) -> None:
    """At the limit of threads a save takes longer, but takes place."""
    monkeypatch.setattr("threading.Thread.start", _refuse)
    done, background = [], Background()
    background.begin(lambda: done.append(1))
    assert background.idle
    background.wait()
    assert done == [1]


def _refuse(_):
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("behind", [True, False], ids=["behind the start", "before it"])
def test_a_job_is_done_once_where_a_signal_is_raised_in_the_middle_of_its_start(monkeypatch, behind) -> None:
    """torch raises in a signal's handler that a worker has died: the error comes through, and two do not write into one folder."""
    start, go_on = threading.Thread.start, threading.Event()

    def interrupted(thread):
        if behind:
            start(thread)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    def job():
        go_on.wait(10) if behind else None
        done.append(1)

    monkeypatch.setattr("threading.Thread.start", interrupted)
    done, background = [], Background()
    with pytest.raises(RuntimeError, match="is killed by signal"):
        background.begin(job)
    assert background.idle is not behind
    go_on.set()
    assert background.wait()
    assert done == [1]
