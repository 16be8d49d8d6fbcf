"""Tools for tests: does a task keep the laws that fnlight relies on, is a step pure, are two states bitwise the same.

`check_task` is worth one line in the tests of every project::

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
