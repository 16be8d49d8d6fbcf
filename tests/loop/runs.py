"""What the tests of this folder share: a run to its end, and a sink that keeps what it is given."""

from fnlight.gradients import grad
from fnlight.loop import run
from fnlight.pipe import pipe
from fnlight.step import apply
from tests.small_runs import created, loader, train_step


def ran(*combinators, state=None, data=None, fn=train_step, **options):
    """The last state of a run, and what it yielded."""
    state = state or created(fn)
    step = pipe(fn, grad(), apply(), *combinators)
    found = list(run(step, state, data or loader(), **options))
    return found[-1][0], found


class Recorder:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.records, self.calls = [], []

    def __call__(self, record):
        self.records.append(record)

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")
