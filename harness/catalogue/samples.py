"""Rows of samples on their way into a catalogue: their fields, bounds of their texts, tar shards."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import pyarrow as pa

from harness.catalogue.catalogue import ALL_SPLITS, SAMPLE_SCHEMA, shard_name
from harness.catalogue.cells import MOST_TEXT
from harness.catalogue.images import Rejected
from harness.core.errors import UserError
from harness.core.files import printable

KINDS = {"query": "query", "document": "document", "doc": "document"}
MOST_NAME, MOST_PATH = 1024, 4096  # characters of an item id, a class or a split, and of an image path
LENGTHS = {"item": MOST_NAME, "class_key": MOST_NAME, "split": MOST_NAME, "image": MOST_PATH}
QUARANTINE_SCHEMA = pa.schema([("row", pa.int64()), ("image", pa.string()), ("reason", pa.string())])


def sample_row(fields: Mapping[str, str], attributes: Mapping[str, str]) -> tuple[str | None, ...]:
    """A sample's values of SAMPLE_SCHEMA after sample_id, then its attributes, from whatever reader.

    Item, kind, class and split lose the spaces at their ends; texts stay as they are.

    Args:
        fields: image, item and kind; class (the item where it is absent), split, title and description if they exist.
        attributes: value of each attribute.

    Raises:
        Rejected: a needed field is empty or unknown, or a text is too long or holds bytes that were no UTF-8.
    """
    item, kind = fields["item"].strip(), KINDS.get(fields["kind"].strip().lower())
    if not fields["image"]:
        raise Rejected("no image path")
    if not item:
        raise Rejected("no item id")
    if kind is None:
        raise Rejected(f"unknown kind: {fields['kind'][:40]!r}")
    class_key = fields.get("class", item).strip() or None
    split = fields.get("split", "").strip() or ALL_SPLITS
    texts = fields.get("title", ""), fields.get("description", ""), fields["image"], *attributes.values()
    row = item, kind, class_key, split, *texts
    for name, text in zip((*SAMPLE_SCHEMA.names[1:], *attributes), row, strict=True):
        if text is None:
            continue
        if len(text) > (most := LENGTHS.get(name, MOST_TEXT)):
            raise Rejected(f"text too long: {len(text):,} characters of {name}, at most {most:,} are taken")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Rejected(f"not UTF-8: {name}") from None
    return row


def attribute_names(names: str, flag: str) -> list[str]:
    """Names of a comma-separated list.

    Raises:
        UserError: one is taken, twice there or no UTF-8; `flag` says what gave the list.
    """
    attributes = [name.strip() for name in names.split(",") if name.strip()]
    for name in attributes:
        if stored(name) != name:
            raise UserError(f"{flag}: {name!r} is not UTF-8", "Rename it")
        if name in SAMPLE_SCHEMA.names or attributes.count(name) > 1:
            raise UserError(f"{flag}: {name!r} is taken", f"Rename it; taken are {', '.join(SAMPLE_SCHEMA.names)}")
    return attributes


def stored(text: str) -> str:
    """`text` as the quarantine takes it: cut, with '?' for what is no Unicode."""
    return text[:MOST_PATH].encode("utf-8", "replace").decode()


class ShardWriter:
    """Image files into tar shards of about `shard_size` bytes, numbered from `first`; equal files give equal shards."""

    def __init__(self, folder: Path, shard_size: int, first: int = 0) -> None:
        self.num_shards = first
        self._folder, self._shard_size = folder, shard_size
        self._tar: tarfile.TarFile | None = None

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Appends a member; returns its shard and the offset of its bytes there."""
        if self._tar is None or self._tar.offset >= self._shard_size:
            self.close()
            path = self._folder / shard_name(self.num_shards)
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # closed by close()
            self.num_shards += 1
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        self._tar.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps a record of every member
        return self.num_shards - 1, self._tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def close(self) -> None:
        """Finishes the open shard."""
        if self._tar is not None:
            tar, self._tar = self._tar, None
            tar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def commonest(reasons: Counter[str]) -> str:
    """The three commonest reasons and how often each was met, for a terminal."""
    return "; ".join(f"{count:,} x {printable(reason)}" for reason, count in reasons.most_common(3))
