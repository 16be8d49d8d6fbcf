"""Tools for tests: check a task against the laws that fnlight relies on, check that a step is pure, and compare states bit by bit.

`check_task` fits on one line in the tests of a project::

    fl.testing.check_task(task, next(iter(loader)))
"""

from fnlight.errors import TaskCheckError
from fnlight.testing.check import TaskReport, check_task
from fnlight.testing.compare import assert_pure, assert_trees_equal, trees_equal
from fnlight.testing.tiny import RecordingSink, tiny_batches, tiny_task

__all__ = [
    "RecordingSink",
    "TaskCheckError",
    "TaskReport",
    "assert_pure",
    "assert_trees_equal",
    "check_task",
    "tiny_batches",
    "tiny_task",
    "trees_equal",
]
