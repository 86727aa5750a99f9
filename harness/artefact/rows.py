"""Rows of an artefact's documents with their vectors, streamed: memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from harness.artefact.documents import parts_of
from harness.artefact.exact import best_of_blocks
from harness.core.errors import UserError
from harness.core.files import printable

AT_ONCE = 4096  # rows in memory
_KEPT = ("sample_id", "thumbnail", "embedding")


class Rows:
    """The rows of folder/documents/part-*.parquet, in the order of the parts.

    Args:
        folder: the artefact.
        at_once: rows in memory.
        kept: bool [rows], those that are read; None: all.

    Attributes:
        count: number of rows that are read.
        width: of the vectors.
        texts: names of the columns of text: class_key, item, title, description, then the catalogue's attributes.
        shares: names of the columns of float32 with the shares of the embeddings' parts.

    Raises:
        UserError: the files cannot be read, or hold no vectors.
    """

    def __init__(self, folder: Path, at_once: int = AT_ONCE, kept: np.ndarray | None = None) -> None:
        self.folder, self.at_once = folder, at_once
        self._parts = sorted((folder / "documents").glob("part-*.parquet"))
        if not self._parts:
            raise UserError(f"{folder}/documents has no part", "Export again")
        try:
            written = sum(pq.read_metadata(part).num_rows for part in self._parts)
            schema = pq.read_schema(self._parts[0])
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error
        kind = schema.field("embedding").type if "embedding" in schema.names else None
        if not isinstance(kind, pa.FixedSizeListType) or kind.value_type not in (pa.float16(), pa.float32()):
            raise UserError(f"{self._parts[0]} has no column of vectors", "Export again")
        self._kept = np.ones(written, bool) if kept is None else kept
        self.count = int(self._kept.sum())
        self.width: int = kind.list_size
        self.shares = [*parts_of(schema).values()]
        self.texts = [field.name for field in schema if field.type == pa.string() and field.name not in _KEPT]

    def batches(self, columns: Sequence[str], first: int = 0) -> Iterator[pa.Table]:
        """The columns of the rows from `first` on, `at_once` at a time; the last time what is left."""
        held: list[pa.RecordBatch] = []
        try:
            for batch in self._record_batches([*columns], first):
                held.append(batch)
                table = pa.Table.from_batches(held)
                whole = len(table) - len(table) % self.at_once
                for start in range(0, whole, self.at_once):
                    yield table.slice(start, self.at_once)
                held = table.slice(whole).to_batches()
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error
        if any(len(batch) for batch in held):
            yield pa.Table.from_batches(held)

    def _record_batches(self, columns: list[str], skip: int) -> Iterator[pa.RecordBatch]:
        """The columns' record batches without the first `skip` rows; row groups that hold only these are not read."""
        place = 0
        for part in self._parts:
            with pq.ParquetFile(part) as file:
                for group in range(file.metadata.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if skip >= (kept := int(self._kept[place : place + rows].sum())):
                        skip -= kept
                        place += rows
                        continue
                    for batch in file.iter_batches(self.at_once, row_groups=[group], columns=columns):
                        good = batch.filter(pa.array(self._kept[place : place + len(batch)]))
                        place += len(batch)
                        if skip < len(good):
                            yield good.slice(skip).select(columns)
                        skip = max(0, skip - len(good))

    def _unreadable(self, error: Exception) -> UserError:
        reason = printable(" ".join(str(error).split()))
        return UserError(
            f"{self.folder}/documents cannot be read ({reason})", "Copy the artefact again, or export again"
        )


def vectors_of(table: pa.Table) -> np.ndarray:
    """The column embedding, float32 [n, d]."""
    column = table.column("embedding").combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), -1)


def exact_top(rows: Rows, queries: Tensor, k: int, where: tuple[str, str] | None = None) -> tuple[Tensor, Tensor]:
    """The best rows of each query, int64 [n, min(k, rows that pass)], and their scores, float64, best first: exact.

    Args:
        rows: the documents.
        queries: unit vectors, float32 [n, d].
        k: rows wanted.
        where: a column and the text that it must have.
    """

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for number, table in enumerate(rows.batches(["embedding", *([where[0]] if where else [])])):
            ids = torch.arange(number * rows.at_once, number * rows.at_once + len(table))
            vectors = torch.from_numpy(vectors_of(table))
            if where:
                passing = torch.tensor([text == where[1] for text in table.column(where[0]).to_pylist()])
                ids, vectors = ids[passing], vectors[passing]
            yield ids, vectors

    return best_of_blocks(queries, blocks(), k)
