"""What the tests on XLA share."""

from typing import Any

import attrs

from fnlight import TrainState, parallel
from fnlight.state import Task
from fnlight.tensors import map_tensors
from tests.laws.tasks import Case


def on_xla(tree: Any) -> Any:
    """A tree of tensors on the device."""
    return map_tensors(lambda tensor: tensor.to("xla"), tree)


@attrs.frozen
class CaseOnXLA(Case):
    """A task whose model lies on the device, and its data there too."""

    def batches(self, num_batches: int = 3) -> list[Any]:
        """As before, on the device."""
        return on_xla(Case.batches(self, num_batches))


def moved(case: Case) -> CaseOnXLA:
    """The same case on the device."""

    def make() -> Task:
        task = case.make()
        return attrs.evolve(task, model=TrainState.create(task, place=parallel.xla()).module())

    return CaseOnXLA(make, case.data, case.trains, case.kind)


def num_compiles() -> int:
    """How often XLA has compiled in this process."""
    from torch_xla.debug.metrics import metric_data

    found = metric_data("CompileTime")
    return 0 if found is None else found[0]
