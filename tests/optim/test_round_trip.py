"""Every optimizer goes on from a file as if nothing had happened."""

from pathlib import Path

import pytest

from fnlight import tree
from fnlight.checkpoint import load, save
from fnlight.pipe import pipe
from fnlight.state import TrainState
from fnlight.update import apply, grad
from tests.optim.table import CASES, train_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:This overload of .* is deprecated:UserWarning"),  # what torch_optimizer calls
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),  # what torch's SparseAdam makes
]


@pytest.mark.parametrize("name", CASES)
def test_going_on_from_a_file_equals_going_on(name: str, tmp_path: Path) -> None:
    """Saved after three steps and loaded, the next two steps are bitwise those of the uninterrupted training."""
    case = CASES[name]
    task, batches, step = case.task(), case.batches(5), pipe(train_step, grad(), apply())
    state = TrainState.create(task, seed=4)
    for batch in batches[:3]:
        state, _ = step(state, batch)
    loaded = load(save(state, str(tmp_path / "state")), task)
    assert loaded.progress == state.progress
    for batch in batches[3:]:
        state, _ = step(state, batch)
        loaded, _ = step(loaded, batch)
    assert list(tree.differences(dict(loaded.params), dict(state.params))) == []
    found, wanted = (s.live.optim.optimizer.state_dict() for s in (loaded, state))
    assert list(tree.differences(found, wanted)) == []
