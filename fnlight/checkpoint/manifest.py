"""`state.json`, the manifest and commit mark of a checkpoint: its content, and how damage to it is detected.

Its first line holds the format and the digest of all that follows; the whole is one JSON object.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from fnlight.checkpoint.head import check
from fnlight.checkpoint.header import no_constant, uncollected, unique
from fnlight.checkpoint.listing import FILES
from fnlight.checkpoint.migrations import FORMAT, migrate
from fnlight.errors import BrokenCheckpointError, CheckpointError

STATE = "state.json"

MAX_BYTES = 1 << 27
"""Bytes of a manifest that are read, and written."""

MAX_VALUES = 1 << 22
"""Values in a manifest, counted by the marks between them."""

_PARTS = re.compile(r"(?:model|optimizer|memory)-[0-9]{5}-of-[0-9]{5}\.safetensors")
_FIRST = re.compile(rb'\{"format": ([0-9]{1,9}), "digest": "(sha256:[0-9a-f]{64})",\n')
_ANY_FORMAT = re.compile(rb'\{"format": ([0-9]{1,9}),')
_WRITER = re.compile(rb'^"fnlight": "([^"\n]{1,40})"', re.MULTILINE)


def belongs(name: str) -> bool:
    """Say whether a file of this name may belong to a checkpoint.

    Args:
        name: The name of a file.

    Returns:
        True for the manifest, the files of tensors, and the parts that these are cut into.

    Example:
        >>> belongs("model-00001-of-00004.safetensors"), belongs("notes.txt")
        (True, False)
    """
    return name in (STATE, *FILES) or _PARTS.fullmatch(name) is not None


def digest_of(data: bytes) -> str:
    """The digest of bytes, with the name of its algorithm.

    Args:
        data: Any bytes.

    Returns:
        ``sha256:`` and 64 hexadecimal digits.

    Example:
        >>> digest_of(b"")[:15]
        'sha256:e3b0c442'
    """
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def render(body: Mapping[str, Any]) -> bytes:
    """The bytes of `state.json`: one line a section.

    Args:
        body: What `encode` gave, by section.

    Returns:
        ASCII bytes, the same for the same body.

    Raises:
        CheckpointError: If the body is nested too deeply, or a number is too long for JSON.

    Example:
        >>> render({"seed": 0}).splitlines()[1:]
        [b'"seed": 0', b'}']
    """
    try:
        lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in body.items()]
    except (RecursionError, ValueError) as error:
        raise CheckpointError(
            f"the state cannot be written as JSON: {error}; do not nest the memory of combinators deeply, nor keep very long integers in it"
        ) from error
    rest = (",\n".join(lines) + "\n}\n").encode("ascii")
    if _many(rest):
        sizes = {key: len(line) for key, line in zip(body, lines, strict=True)}
        raise CheckpointError(
            f"the manifest has {len(rest)} bytes and exceeds the limit of {MAX_BYTES} bytes or {MAX_VALUES} values; keep numbers "
            f"in tensors, or a shorter history: the largest section is {max(sizes, key=lambda key: sizes[key])!r}"
        )
    return f'{{"format": {FORMAT}, "digest": "{digest_of(rest)}",\n'.encode("ascii") + rest


def parse(data: bytes) -> Mapping[str, Any]:
    """Read `state.json`, which may be damaged, or of an older format.

    Args:
        data: The bytes of the file.

    Returns:
        The sections in the present format, all of them checked.

    Raises:
        BrokenCheckpointError: If the bytes are not what was written, or were written by a newer fnlight.

    Example:
        >>> parse(b"{}")
        Traceback (most recent call last):
        fnlight.errors.BrokenCheckpointError: state.json was not written by fnlight, or its first line is damaged
    """
    if _many(data):
        raise BrokenCheckpointError(f"state.json exceeds the limits of fnlight: it has {len(data)} bytes, or too many values")
    found = _ANY_FORMAT.match(data)
    if found and int(found[1]) > FORMAT:
        writer = _WRITER.search(data)
        version = f"fnlight {writer[1].decode('ascii', 'replace')}" if writer else "a newer fnlight"
        raise BrokenCheckpointError(
            f"state.json has format {int(found[1])}, written by {version}, but this fnlight reads formats up to {FORMAT}; install {version} or later"
        )
    first = _FIRST.match(data)
    if not first or not 1 <= int(first[1]) <= FORMAT:
        raise BrokenCheckpointError("state.json was not written by fnlight, or its first line is damaged")
    if digest_of(data[first.end() :]) != first[2].decode("ascii"):
        raise BrokenCheckpointError("state.json is truncated or altered: its digest differs from the one in its first line")
    try:
        with uncollected():
            body = json.loads(data, object_pairs_hook=unique, parse_constant=no_constant, parse_float=_finite)
            body = migrate(body, int(first[1]))
            check(body)
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpointError(f"state.json has content that fnlight does not write: {printable(str(error)):.300}") from error
    return body


def printable(text: str) -> str:
    r"""A text from a file in one line, without what a terminal would obey.

    Args:
        text: Any text.

    Returns:
        The same, with escapes for all that cannot be printed.

    Example:
        >>> print(printable(f"a{chr(27)}[31m"))
        a\x1b[31m
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.40} is too large")
    return value


def _many(data: bytes) -> bool:
    """Say whether a manifest is too large, or of so many values that they would fill the memory."""
    return len(data) > MAX_BYTES or data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES
