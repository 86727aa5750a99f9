"""Damage to a file, of every kind that a checksum must see."""

from __future__ import annotations

from collections.abc import Iterator


def damages(content: bytes) -> Iterator[bytes | None]:
    """`content` with a byte changed in its first, middle and last place, cut, emptied; None: removed."""
    for place in (0, len(content) // 2, -1):
        changed = bytearray(content)
        changed[place] ^= 1
        yield bytes(changed)
    yield from (content[: len(content) // 2], b"", None)
