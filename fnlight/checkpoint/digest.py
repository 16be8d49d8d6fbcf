"""Digests of files: they detect every kind of damage, at memory speed, but do not protect against deliberate forgery.

Files are digested with XXH3 (128 bits), which costs a twentieth of what writing costs; those of format 1 have SHA-256, which is still read.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import xxhash

KINDS = {"xxh3": 32, "sha256": 64}
"""The kinds of digests that are read, with their hexadecimal digits; the first is written."""

_PIECE = 1 << 20  # bytes; what is hashed while it is still in the processor's cache


class Digest:
    """A digest that is taken piece by piece.

    Args:
        kind: One of `KINDS`.

    Example:
        >>> digest = Digest()
        >>> digest.update(b"abc")
        >>> str(digest)
        'xxh3:06b05ab6733a618578af5f94892f3950'
    """

    def __init__(self, kind: str = "xxh3") -> None:
        self.kind = kind
        self._hash: Any = xxhash.xxh3_128() if kind == "xxh3" else hashlib.new(kind)

    def update(self, data: memoryview | bytes) -> None:
        """Take in the next bytes."""
        self._hash.update(data)

    def __str__(self) -> str:
        return f"{self.kind}:{self._hash.hexdigest()}"


def digest_of_file(readinto: Callable[[memoryview], int | None], kind: str) -> str:
    """The digest of a file on this machine.

    Args:
        readinto: Fills a view from where the last one ended, or a part of it, and says how many bytes.
        kind: One of `KINDS`.

    Returns:
        The kind, a colon, and hexadecimal digits.

    Example:
        >>> with open(__file__, "rb") as file:
        ...     digest_of_file(file.readinto, "sha256")[:7]
        'sha256:'
    """
    digest, piece = Digest(kind), memoryview(bytearray(_PIECE))
    while count := readinto(piece):
        digest.update(piece[:count])
    return str(digest)
