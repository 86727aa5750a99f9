"""A table that a user hands in (TSV, CSV or Parquet by the suffix), read as a stream of text cells."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from harness.data.catalogue import nearest_first
from harness.errors import UserError

SUFFIXES = (".tsv", ".csv", ".parquet")


class Row(NamedTuple):
    """One data row: the cells of the columns asked for, or what is wrong with the row ('' for nothing)."""

    cells: list[str]
    problem: str = ""


class Manifest:
    """A manifest and its columns.

    TSV and CSV are UTF-8 with a header; a TSV has no quoting, a CSV quotes with `"`. Cells of a Parquet file become
    text, its nulls the empty text.

    Args:
        path: the file.

    Attributes:
        columns: names in the file's order.
        num_rows: exact for Parquet; for text the number of lines, which serves to estimate the time left.

    Raises:
        UserError: not a readable file of one of the three kinds, or an empty one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}: unknown kind of manifest {path.suffix!r}", f"Known are {', '.join(SUFFIXES)}")
        self._is_parquet = path.suffix.lower() == ".parquet"
        try:
            if self._is_parquet:
                with pq.ParquetFile(path) as file:
                    self.columns: list[str] = list(file.schema_arrow.names)
                    self.num_rows: int = file.metadata.num_rows
            else:
                self.columns = next((record for record in self._records() if isinstance(record, list)), [])
                self.num_rows = self._count_lines()
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"cannot read the manifest {path}: {getattr(error, 'strerror', None) or error}") from error
        if not self.columns:
            raise UserError(f"the manifest {path} has no header")

    def require(self, column: str, flag: str) -> None:
        """Raises UserError, naming `flag` and the columns there are, unless there is exactly one column `column`."""
        count = self.columns.count(column)
        if count != 1:
            raise UserError(
                f"{self.path} has {'no' if count == 0 else count} column{'s' * (count > 1)} {column!r} ({flag})",
                f"Its columns, most similar first: {', '.join(nearest_first(column, self.columns))}",
            )

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """The data rows in order, each with the cells of `columns`; blank lines of a text file are no rows."""
        return self._parquet_rows(columns) if self._is_parquet else self._text_rows(columns)

    def _text_rows(self, columns: Sequence[str]) -> Iterator[Row]:
        places = [self.columns.index(column) for column in columns]
        width = len(self.columns)
        records = self._records()
        next(records)
        for record in records:
            if isinstance(record, str):
                yield Row([""] * len(places), f"malformed: {record}")
                continue
            cells = [record[place] if place < len(record) else "" for place in places]
            if len(record) != width:
                yield Row(cells, f"wrong number of cells: {len(record)}, the header has {width}")
            elif not _is_unicode(cells):
                yield Row([cell.encode("utf-8", "replace").decode() for cell in cells], "not UTF-8")
            else:
                yield Row(cells)

    def _records(self) -> Iterator[list[str] | str]:
        """Records as cells, or as the csv module's complaint; reading goes on with the line after a bad one."""
        # Bytes that are no UTF-8 cost their own row, not the run.
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if self.path.suffix.lower() == ".tsv":
                reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                reader = csv.reader(file, strict=True)
            while True:
                try:
                    record = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield str(error)
                else:
                    if record:
                        yield record

    def _count_lines(self) -> int:
        with self.path.open("rb") as file:
            return max(sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")) - 1, 0)

    def _parquet_rows(self, columns: Sequence[str]) -> Iterator[Row]:
        names = list(dict.fromkeys(columns))
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(batch_size=8192, columns=names):
                texts = {}
                for name in names:
                    try:
                        texts[name] = batch.column(name).cast(pa.string()).fill_null("").to_pylist()
                    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                        raise UserError(f"{self.path}: column {name!r} is no text ({error})") from error
                for cells in zip(*(texts[name] for name in columns), strict=True):
                    yield Row(list(cells))


def _is_unicode(cells: list[str]) -> bool:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True
