"""The laws of tests/laws on XLA's device: the same functions, on the same tasks and combinators.

By default every combinator, most of them in one pipe, and the tasks that differ most; ``FNLIGHT_XLA=all`` tries each combinator alone on each task.
A process keeps the code of all that XLA has compiled in it, and the system ends it when that lies in too many places, after some hundred tests: then
take them in parts, such as ``-k "mlp"``, and those of the recurrent net one by one, since torch_xla keeps its layers from one to the next.
"""

import os

import pytest

from tests.laws.combinators import EVERYTHING, OTHERS, PRODUCT
from tests.laws.tasks import TASKS
from tests.laws.test_accumulation import test_gradients_of_micro_batches_are_those_of_the_whole as law_3
from tests.laws.test_donation import test_after_a_step_its_input_cannot_be_read_and_its_output_can as law_7
from tests.laws.test_purity import test_a_step_twice_from_one_state_gives_bitwise_the_same as law_1
from tests.laws.test_resume import test_a_file_holds_the_state_and_going_on_from_it_is_going_on as law_2
from tests.xla.device import moved

WHOLE = ("mlp with BatchNorm and dropout",)
DROPPED = ("compile", "profile")  # XLA compiles by itself, and has a profiler of its own
REFUSED = [
    ("recurrent net", choice) for choice in ("recompute", EVERYTHING)
]  # torch's checkpointing refuses torch_xla's own recurrent layers
CHOSEN = [
    (name, choice)
    for name, choice in PRODUCT
    if choice not in DROPPED
    and (name, choice) not in REFUSED
    and (
        os.environ.get("FNLIGHT_XLA") == "all" or (choice == EVERYTHING and name in WHOLE) or (choice in OTHERS and name == "frozen parts")
    )
]


@pytest.fixture(autouse=True)
def tasks_on_xla(monkeypatch):
    """Every task lies on the device."""
    for name, case in TASKS.items():
        monkeypatch.setitem(TASKS, name, moved(case))


@pytest.mark.parametrize(("name", "choice"), CHOSEN)
def test_purity_resume_and_donation(name, choice, tmp_path):
    """Laws 1, 2, 6 and 7: a step is a function, going on from a file is going on, what is read is what was written, a donated state is gone."""
    for law in (law_1, law_2, law_7):
        assert law(name, choice, tmp_path / law.__name__) is None  # it raises where it is broken


@pytest.mark.parametrize("name", ["tied weights", "frozen parts"])
def test_accumulation(name):
    """Law 3: micro-batches of uneven sizes give the gradient of the whole."""
    assert law_3(name, (1, 7, 3)) is None
