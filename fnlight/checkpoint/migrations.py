"""Formats of the manifest: what each changed, as a pure function from the sections of one format to those of the next.

A checkpoint of an older format is read as if it were of the present one. To change the format: add a function at the end of
`MIGRATIONS`, and run ``python -m tests.checkpoint.golden``, which keeps checkpoints of the new format beside those of the older ones.

- Format 1: the first; its files have SHA-256 digests.
- Format 2: files have faster digests, and ``progress`` says how many samples of the epoch are done, so that a run can go on with another
  batch size.
- Format 3: tensors of which ranks hold parts lie in one file a rank; ``layouts`` says how they are cut.
"""

from collections.abc import Callable, Mapping
from typing import Any

Body = Mapping[str, Any]


def samples_of_the_epoch(body: Body) -> Body:
    """From format 1 to 2: ``progress.epoch_samples``, which is known in the first epoch and between epochs, and else 0, as unknown.

    Args:
        body: The sections of format 1.

    Returns:
        Those of format 2.

    Example:
        >>> samples_of_the_epoch({"progress": {"epoch": 2, "batch": 0, "samples": 64}})["progress"]["epoch_samples"]
        0
    """
    progress = body.get("progress")
    if not isinstance(progress, dict):
        return body  # which will be refused
    known = bool(progress.get("batch")) and progress.get("epoch") == 0
    return {**body, "progress": {**progress, "epoch_samples": progress.get("samples", 0) if known else 0}}


def in_one_part(body: Body) -> Body:
    """From format 2 to 3: ``layouts``, of which there are none, for nothing was cut.

    Args:
        body: The sections of format 2.

    Returns:
        Those of format 3.

    Raises:
        ValueError: If there are layouts, which format 2 does not have: a digit of the format was altered.

    Example:
        >>> in_one_part({"seed": 0})
        {'seed': 0, 'layouts': []}
    """
    if "layouts" in body:
        raise ValueError("its format is given as 2 or older, but it has layouts, which only format 3 has")
    return {**body, "layouts": []}


MIGRATIONS: tuple[Callable[[Body], Body], ...] = (samples_of_the_epoch, in_one_part)
"""The n-th maps format n to format n + 1."""

FORMAT = len(MIGRATIONS) + 1
"""The format that is written."""


def migrate(body: Body, format: int) -> Body:
    """Bring the sections of a manifest to the present format.

    Args:
        body: The sections; they stay as they are.
        format: Their format, from 1 on.

    Returns:
        The sections in the format that is written today.

    Example:
        >>> migrate({"progress": {"epoch": 0, "batch": 3, "samples": 12}}, format=1)["progress"]["epoch_samples"]
        12
    """
    for step in MIGRATIONS[format - 1 :]:
        body = step(body)
    return body
