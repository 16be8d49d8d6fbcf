"""The exit code of a script says how it ended."""

import signal

import attrs
import pytest
import torch

from fnlight import TrainState, main
from fnlight.errors import Interrupted
from fnlight.testing import tiny_task

STATE = TrainState.create(tiny_task())
TERMINATED, DONE = (attrs.evolve(STATE, stopped=reason) for reason in ("SIGTERM", "3 epochs done"))


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (None, 0), (STATE, 0), (DONE, 0), (TERMINATED, 143), (attrs.evolve(STATE, stopped="SIGINT"), 130), ([DONE, TERMINATED], 143),
        ({"a": TERMINATED, "b": DONE}, 143), ((), 0), (3, 3), (True, 0), ("SIGTERM", 0), (0.5, 0), (torch.tensor(1.0), 0), (torch.ones(2), 0),
    ],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_signal_that_ended_a_run(result, code):
    """128 and the number of the signal where a returned state was stopped by one, else 0."""
    with pytest.raises(SystemExit) as end:
        main(lambda: result)
    assert end.value.code == code


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [(Interrupted("SIGUSR1"), 128 + signal.SIGUSR1, "SIGUSR1 came before"), (KeyboardInterrupt(), 130, "by Ctrl-C")],
)
def test_what_a_signal_cut_short_ends_without_a_traceback(error, code, says, capsys):
    """An interrupted evaluation and a second Ctrl-C say so in a line."""

    def fn():
        raise error

    with pytest.raises(SystemExit) as end:
        main(fn)
    assert end.value.code == code
    assert says in capsys.readouterr().err


def test_an_error_passes_through():
    """A bug in a script keeps its traceback."""
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        main(lambda: 1 / 0)
