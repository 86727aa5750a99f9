"""Writer of a catalogue's folder for `ingest` and `index`: samples, index, quarantine, catalogue.json."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from harness.catalogue.append import write_meta
from harness.catalogue.catalogue import CATALOGUE_FORMAT, INDEX_DTYPE, SAMPLE_SCHEMA, part_name
from harness.catalogue.samples import QUARANTINE_SCHEMA, stored
from harness.catalogue.writers import ROW_GROUP, NpyWriter, ParquetWriter


class SampleWriter:
    """Writes samples in the order of their ids, and what is quarantined; the shards are written elsewhere.

    Args:
        folder: empty folder of the catalogue.
        attributes: names of its attribute columns.
        rows_per_part: rows of one file of samples/.
        first: id of the first sample.

    Attributes:
        counts: samples by kind, and by split under `split NAME`.
        reasons: quarantined rows by the category of their reason.
    """

    def __init__(self, folder: Path, attributes: Sequence[str], rows_per_part: int, first: int = 0) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self._folder, self._attributes, self._first = folder, list(attributes), first
        self._records: list[tuple[int, ...]] = []
        schema = SAMPLE_SCHEMA
        for name in attributes:
            schema = schema.append(pa.field(name, pa.string()))
        (folder / "samples").mkdir()
        with ExitStack() as stack:
            self._index = stack.enter_context(NpyWriter(folder / "index.npy", INDEX_DTYPE))
            self._samples = stack.enter_context(
                ParquetWriter(lambda part: folder / "samples" / part_name(part), schema, rows_per_part)
            )
            self._quarantine = stack.enter_context(
                ParquetWriter(lambda _: folder / "quarantine.parquet", QUARANTINE_SCHEMA, rows_per_part=None)
            )
            self._stack = stack.pop_all()

    @property
    def next_id(self) -> int:
        """Id of the sample that is accepted next."""
        return self._first + self._samples.num_rows

    def accept(self, row: Sequence[str | None], record: tuple[int, ...]) -> None:
        """Adds a sample: its values of SAMPLE_SCHEMA after sample_id, its attributes, and its INDEX_DTYPE record."""
        self._samples.append((self.next_id, *row))
        self.counts.update((str(row[1]), f"split {row[3]}"))
        self._records.append(record)
        if len(self._records) == ROW_GROUP:
            self._flush()

    def reject(self, number: int, image: str, reason: str) -> None:
        """Quarantines row `number`."""
        self._quarantine.append((number, stored(image), stored(reason)))
        self.reasons[reason.partition(": ")[0]] += 1

    def write_meta(self, name: str, shards: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
        """Writes catalogue.json, after the rest is closed, and returns its content.

        Args:
            name: of the catalogue.
            shards: num_shards, and shard_names where they have names of their own.
            source: what the catalogue was made of.
        """
        splits = {key.removeprefix("split "): self.counts[key] for key in sorted(self.counts) if key[:6] == "split "}
        meta = {
            "format": CATALOGUE_FORMAT,
            "name": name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "num_samples": self._samples.num_rows,
            **shards,
            "num_parts": len(os.listdir(self._folder / "samples")),
            "attributes": self._attributes,
            "counts": {
                "query": self.counts["query"],
                "document": self.counts["document"],
                "quarantined": self._quarantine.num_rows,
                "splits": splits,
            },
            "source": source,
        }
        write_meta(self._folder, meta)
        return meta

    def _flush(self) -> None:
        self._index.append(np.array(self._records, INDEX_DTYPE))
        self._records.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        with self._stack:
            self._flush()
