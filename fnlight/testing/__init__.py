"""Tools for tests: check a task against the laws that fnlight relies on, check that a step is pure, and compare states bit by bit.

`check_task` fits on one line in the tests of a project::

    fl.testing.check_task(task, next(iter(loader)))
    print(fl.testing.check_loader(loader))
"""

from fnlight.errors import LoaderCheckError, TaskCheckError
from fnlight.testing.check import TaskReport, check_task
from fnlight.testing.compare import assert_pure, assert_trees_equal, trees_equal
from fnlight.testing.loaders import LoaderReport, check_loader
from fnlight.testing.tiny import RecordingSink, tiny_batches, tiny_task

__all__ = [
    "LoaderCheckError",
    "LoaderReport",
    "RecordingSink",
    "TaskCheckError",
    "TaskReport",
    "assert_pure",
    "assert_trees_equal",
    "check_loader",
    "check_task",
    "tiny_batches",
    "tiny_task",
    "trees_equal",
]
