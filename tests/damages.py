"""Damage to a file, of every kind that a checksum must see."""

from __future__ import annotations

from collections.abc import Iterator


def damages(content: bytes, places: int = 3) -> Iterator[bytes | None]:
    """`content` with a byte changed, in turn at so many places from first to last, cut, emptied; None: removed."""
    for place in [(len(content) - 1) * number // (places - 1) for number in range(places)]:
        changed = bytearray(content)
        changed[place] ^= 1
        yield bytes(changed)
    yield from (content[: len(content) // 2], b"", None)
