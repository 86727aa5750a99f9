"""A table that a user hands in (TSV, CSV or Parquet by the suffix), read as a stream of text cells."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harness.catalogue.catalogue import nearest_first
from harness.core.errors import UserError
from harness.core.files import printable

SUFFIXES = (".tsv", ".csv", ".parquet")
MOST_TEXT = 1 << 20  # characters of a cell; a longer one costs its row
MOST_BYTES = 4 * MOST_TEXT  # of its UTF-8
MOST_LINE = 1 << 24  # characters of a line of a text file
BATCH_BYTES = 1 << 26  # of a Parquet file that are read at once, where a row has fewer


class Row(NamedTuple):
    """One data row: the cells of the columns asked for, or what is wrong with the row ('' for nothing).

    Bytes of a cell that are no UTF-8 stand there as lone surrogates, which do not encode.
    """

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
                header = next(self._records(), [])
                if isinstance(header, str):
                    raise UserError(f"the manifest {path} has no header that can be read: {header}")
                self.columns, self.num_rows = header, self._count_lines()
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the manifest {path}: {getattr(error, 'strerror', None) or error}") from error
        if not self.columns:
            raise UserError(f"the manifest {path} has no header")

    def require(self, column: str, flag: str) -> None:
        """Raises UserError, naming `flag` and the columns there are, unless there is exactly one column `column`."""
        count = self.columns.count(column)
        if count != 1:
            raise UserError(
                f"{self.path} has {'no' if count == 0 else count} column{'s' * (count > 1)} {column!r} ({flag})",
                "Its columns, most similar first: "
                f"{', '.join(printable(name, 40) for name in nearest_first(column, self.columns)[:20])}",
            )

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """The data rows in order, each with the cells of `columns`; blank lines of a text file are no rows.

        Raises:
            UserError: a Parquet file is damaged within, or a column of it holds what is no text.
        """
        return self._parquet_rows(columns) if self._is_parquet else self._text_rows(columns)

    def _text_rows(self, columns: Sequence[str]) -> Iterator[Row]:
        places = [self.columns.index(column) for column in columns]
        records = self._records(len(self.columns))
        next(records)
        for record in records:
            if isinstance(record, str):
                yield Row([""] * len(places), record)
                continue
            cells = [record[place] if place < len(record) else "" for place in places]
            wrong = len(record) != len(self.columns)
            yield Row(
                cells, f"wrong number of cells: {len(record)}, the header has {len(self.columns)}" if wrong else ""
            )

    def _records(self, width: int | None = None) -> Iterator[list[str] | str]:
        """Records as cells, or as what is wrong with one; then reading goes on with the line after the one where it
        began.

        So a quote that is never closed costs its own line, not those that it seems to hold: where a record of several
        lines is none, or has not `width` cells, all but its first line are read anew.
        """
        csv.field_size_limit(MOST_TEXT)
        # Bytes that are no UTF-8 cost their own row, not the run.
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = _Lines(file)
            if self.path.suffix.lower() == ".tsv":
                reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                reader = csv.reader(lines, strict=True)
            while True:
                lines.begin()
                try:
                    record = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    begun, several = lines.take_back()
                    open_quote = several or str(error) == "unexpected end of data"
                    yield f"malformed: line {begun}: {'a quote that is not closed' if open_quote else error}"
                else:
                    if lines.several and width not in (None, len(record)):
                        begun, _ = lines.take_back()
                        yield f"malformed: line {begun}: a quote that is not closed, or a wrong number of cells"
                    elif record:
                        yield record

    def _count_lines(self) -> int:
        with self.path.open("rb") as file:
            return max(sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")) - 1, 0)

    def _parquet_rows(self, columns: Sequence[str]) -> Iterator[Row]:
        names, read = list(dict.fromkeys(columns)), 0
        try:
            for batch in self._batches(names):
                texts = {name: self._texts(name, batch.column(name)) for name in names}
                for cells in zip(*(texts[name] for name in columns), strict=True):
                    if None in cells:
                        column = columns[cells.index(None)]
                        reason = f"text too long: column {column!r} has more than {MOST_TEXT:,} characters"
                        yield Row([cell or "" for cell in cells], reason)
                    else:
                        yield Row(list(cells))
                read += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path} is damaged after row {read:,} ({error})", "Write it again") from error

    def _batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        """The columns `names`, at most BATCH_BYTES at once where a row has fewer: a dictionary holds a text once that a
        million rows may share.
        """
        with pq.ParquetFile(self.path) as file:
            coded_names = [field.name for field in file.schema_arrow if field.name in names and _is_text(field.type)]
            with pq.ParquetFile(self.path, read_dictionary=coded_names) as coded:
                for group in range(file.num_row_groups):
                    sizes = file.metadata.row_group(group)
                    longest = _longest(coded, group, coded_names)
                    row_bytes = max(1, longest, sizes.total_byte_size // max(sizes.num_rows, 1))
                    # No text is that long, so every row that has it is refused: it is not unpacked for each.
                    source = coded if longest > MOST_BYTES * len(coded_names) else file
                    yield from source.iter_batches(max(1, min(8192, BATCH_BYTES // row_bytes)), [group], names)

    def _texts(self, name: str, column: pa.Array) -> list[str | None]:
        """The cells of a column as text, those of null as '', those that are far too long as None."""
        if pa.types.is_dictionary(column.type):
            texts = [*self._texts(name, column.dictionary), ""]  # place -1 for null
            return [texts[place] for place in column.indices.fill_null(-1).to_pylist()]
        if not _is_text(column.type):
            try:
                column = column.cast(pa.string())
            except pa.ArrowException as error:
                raise UserError(f"{self.path}: column {name!r} is no text ({error})") from error
        data = column.cast(pa.large_binary())
        fits = pc.fill_null(pc.less_equal(pc.binary_length(data), MOST_BYTES), True)
        cells = iter(data.filter(fits).to_pylist())
        return [(next(cells) or b"").decode("utf-8", "surrogateescape") if fit else None for fit in fits.to_pylist()]


def _is_text(kind: pa.DataType) -> bool:
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return text or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _longest(coded: pq.ParquetFile, group: int, names: list[str]) -> int:
    """Bytes of the longest texts in the dictionaries of the columns `names`, together: what one row may have."""
    if not names:
        return 0
    batch = next(coded.iter_batches(1, [group], names), ())
    return sum(pc.max(pc.binary_length(column.dictionary)).as_py() or 0 for column in batch)


class _Lines:
    """The lines of a file, of which those that a record took can be taken back, all but the first."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._again: deque[str] = deque()
        self._taken: list[str] = []
        self._read = 0

    def begin(self) -> None:
        """Begins a record."""
        self._taken.clear()

    @property
    def several(self) -> bool:
        """True for a record of more than one line."""
        return len(self._taken) > 1

    def take_back(self) -> tuple[int, bool]:
        """Number of the record's first line, counted from 1, and whether there were others; those will be read again."""
        first, several = self._read - len(self._taken) + 1, self.several
        self._again.extendleft(reversed(self._taken[1:]))
        self._read = first
        return first, several

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._file.readline(MOST_LINE)
        if not line:
            raise StopIteration
        self._read += 1
        self._taken.append(line)
        if len(line) == MOST_LINE and not line.endswith(("\n", "\r")):
            while (rest := self._file.readline(MOST_LINE)) and not rest.endswith(("\n", "\r")):
                pass
            raise csv.Error(f"more than {MOST_LINE:,} characters")
        return line
