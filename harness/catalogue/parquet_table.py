"""A table in a Parquet file, read piece by piece as text cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harness.catalogue.cells import MOST_BYTES, is_text, texts
from harness.catalogue.images import Rejected
from harness.catalogue.text_table import Row
from harness.core.errors import UserError
from harness.core.files import printable

BATCH_BYTES = 1 << 26  # that are read at once, where a row has fewer


class ParquetTable:
    """A Parquet file. Cells become text by harness/catalogue/cells.py.

    A column of image structs, as Hugging Face's `datasets` writes them, gives their path, and their bytes where they
    have any.

    Args:
        path: the file.

    Attributes:
        columns: names in the file's order, without spaces at their ends.
        num_rows: exact.
        said: nothing that had to be recognised.

    Raises:
        OSError, pa.ArrowException: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.said = path, list[str]()
        with pq.ParquetFile(path) as file:
            self._schema = file.schema_arrow
            self.num_rows: int = file.metadata.num_rows
        self.columns = [name.strip() for name in self._schema.names]

    def check(self, column: str) -> None:
        """Raises UserError where the column holds neither text nor what becomes text."""
        kind = self._schema.field(self.columns.index(column)).type
        if pa.types.is_nested(kind) and not _is_image(kind):
            raise UserError(
                f"{self.path}: column {printable(column, 40)!r} is not text ({printable(str(kind), 80)})",
                "Write one value for each row, or name another column",
            )

    def hint(self, column: str) -> str:
        """No flag changes the columns."""
        return ""

    def remarks(self) -> list[str]:
        """Nothing is seen that may not be meant."""
        return []

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """The rows in order, each with the cells of `columns`.

        Raises:
            UserError: the file is damaged within, or a column holds what is no text.
        """
        raw = [self._schema.names[self.columns.index(column)] for column in columns]
        names, read = list(dict.fromkeys(raw)), 0
        try:
            for batch in self._batches(names):
                cells = {name: self._cells(batch.column(name), read) for name in names}
                images = next((_bytes(batch.column(name)) for name in raw if _is_image(batch.column(name).type)), None)
                for place, row in enumerate(zip(*(cells[name] for name in raw), strict=True)):
                    yield _row(row, columns, images[place] if images else None)
                read += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path} is damaged after row {read:,} ({error})", "Write it again") from error

    def _batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        """The columns `names`, at most BATCH_BYTES at once where a row has fewer: a dictionary holds a text once that a
        million rows may share.
        """
        with pq.ParquetFile(self.path) as file:
            coded_names = [leaf for name in names for leaf in _texts_of(file.schema_arrow.field(name))]
            with pq.ParquetFile(self.path, read_dictionary=coded_names) as coded:
                for group in range(file.num_row_groups):
                    sizes = file.metadata.row_group(group)
                    longest = _longest(coded, group, coded_names)
                    row_bytes = max(1, longest, sizes.total_byte_size // max(sizes.num_rows, 1))
                    # No text is that long, so every row that has it is refused: it is not unpacked for each.
                    source = coded if longest > MOST_BYTES * len(coded_names) else file
                    yield from source.iter_batches(max(1, min(8192, BATCH_BYTES // row_bytes)), [group], names)

    def _cells(self, column: pa.Array, first: int) -> list[str | Rejected]:
        """Cells as text; of image structs their path, or the number of the row, counted from `first`."""
        if not _is_image(column.type):
            return texts(column)
        paths = texts(pc.struct_field(column, "path"))
        return [
            path or (f"{self.path.name}#{number}" if data else "")
            for number, (path, data) in enumerate(zip(paths, _bytes(column), strict=True), first)
        ]


def _row(cells: Sequence[str | Rejected], columns: Sequence[str], image: bytes | None) -> Row:
    for cell, column in zip(cells, columns, strict=True):
        if isinstance(cell, Rejected):
            kept = ["" if isinstance(other, Rejected) else other for other in cells]
            return Row(kept, f"{cell} in column {column!r}", image)
    return Row(list(cells), "", image)  # type: ignore[arg-type]


def _is_image(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {"path", "bytes"} == {kind.field(n).name for n in range(kind.num_fields)}


def _texts_of(field: pa.Field) -> list[str]:
    """Paths of what a dictionary may hold of a column: the column, or the parts of an image struct."""
    if not _is_image(field.type):
        return [field.name] * is_text(field.type)
    children = [field.type.field(number) for number in range(field.type.num_fields)]
    return [f"{field.name}.{child.name}" for child in children if is_text(child.type)]


def _bytes(column: pa.Array) -> list[bytes | None]:
    data = pc.struct_field(column, "bytes")
    if not pa.types.is_dictionary(data.type):
        return list(data.cast(pa.large_binary()).to_pylist())
    values = [*data.dictionary.cast(pa.large_binary()).to_pylist(), None]  # place -1 for null
    return [values[place] for place in data.indices.fill_null(-1).to_pylist()]


def _longest(coded: pq.ParquetFile, group: int, names: list[str]) -> int:
    """Bytes of the longest texts in the dictionaries of the columns `names`, together: what one row may have."""
    if not names:
        return 0
    batch = next(coded.iter_batches(1, [group], names), None)
    columns = [] if batch is None else batch.columns
    leaves = [leaf for column in columns for leaf in (column.flatten() if _is_image(column.type) else [column])]
    found = [leaf.dictionary for leaf in leaves if pa.types.is_dictionary(leaf.type)]
    return sum(pc.max(pc.binary_length(dictionary)).as_py() or 0 for dictionary in found)
