"""A table that a user hands in (TSV, CSV, Parquet, JSONL, or a folder of parts), read as a stream of text cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa

from harness.catalogue.catalogue import nearest_first
from harness.catalogue.json_table import JsonTable
from harness.catalogue.parquet_table import ParquetTable
from harness.catalogue.text_table import Row, TextTable
from harness.core.errors import UserError
from harness.core.files import printable

SUFFIXES = (".tsv", ".csv", ".parquet", ".jsonl")


class Manifest:
    """A manifest and its columns: one file, or the files of a folder one after another.

    Cells of every kind become text by one rule, see harness/catalogue/cells.py.

    Args:
        path: the file or the folder; names in it that begin with a dot or an underscore are passed over.
        delimiter, encoding, quoting: as TextTable has them; each is recognised where it is None.

    Attributes:
        files: what is read, in order.
        columns: names in the order of the first file.
        num_rows: exact for Parquet; for text the number of lines, which serves to estimate the time left.
        said: what was recognised beyond the rules of the suffix.

    Raises:
        UserError: not readable files of one of the four kinds, empty ones, or parts of different columns.
    """

    def __init__(
        self,
        path: Path,
        delimiter: str | None = None,
        encoding: str | None = None,
        quoting: Literal["csv", "none"] | None = None,
    ) -> None:
        self.path = path
        if delimiter is not None:
            delimiter = delimiter.replace("\\t", "\t")
            if len(delimiter) != 1 or delimiter in '"\r\n ':
                raise UserError(f"--delimiter is {delimiter!r}", "Name one character, such as ';' or '\\t'")
        self.files = _files(path)
        self._parts: list[TextTable | ParquetTable | JsonTable] = []
        for file in self.files:
            try:
                if file.suffix.lower() == ".parquet":
                    self._parts.append(ParquetTable(file))
                elif file.suffix.lower() == ".jsonl":
                    self._parts.append(JsonTable(file))
                else:
                    self._parts.append(TextTable(file, delimiter, encoding, quoting))
            except (OSError, pa.ArrowException, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"cannot read the manifest {file}: {reason}") from error
        first = self._parts[0]
        self.columns = first.columns
        if not self.columns:
            raise UserError(f"the manifest {first.path} has no header")
        for part in self._parts:
            if odd := sorted(set(part.columns) ^ set(self.columns)):
                raise UserError(
                    f"{part.path} and {first.path} have different columns: "
                    f"{', '.join(printable(name, 40) for name in odd[:5])} in one of them only",
                    "Write all parts with the same columns",
                )
        self.num_rows = sum(part.num_rows for part in self._parts)
        self.said = list(dict.fromkeys(note for part in self._parts for note in part.said))

    @property
    def is_text(self) -> bool:
        """True where an encoding decides."""
        return isinstance(self._parts[0], TextTable)

    def require(self, column: str, flag: str) -> None:
        """Checks that there is exactly one column `column`, and that it holds text.

        Raises:
            UserError: there is none, or more than one, or another; it names `flag` and the columns there are.
        """
        for part in self._parts:
            if (count := part.columns.count(column)) != 1:
                hint = part.hint(column)
                raise UserError(
                    f"{part.path} has {'no' if count == 0 else count} column{'s' * (count > 1)} {column!r} ({flag})"
                    f"{hint and f'; {hint}'}",
                    "Its columns, most similar first: "
                    f"{', '.join(printable(name, 40) for name in nearest_first(column, part.columns)[:20])}",
                )
            part.check(column)

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """The data rows in order, each with the cells of `columns`; blank lines of a text file are no rows.

        Raises:
            UserError: a Parquet file is damaged within.
        """
        for part in self._parts:
            yield from part.rows(columns)

    def remarks(self) -> list[str]:
        """Oddities among the rows that were read, which may not be meant."""
        return list(dict.fromkeys(note for part in self._parts for note in part.remarks()))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}: unknown kind of manifest {path.suffix!r}", f"Known are {', '.join(SUFFIXES)}")
        return [path]
    shown = sorted(file for file in path.iterdir() if file.name[0] not in "._")
    if folders := [file for file in shown if file.is_dir()]:
        raise UserError(
            f"{path} holds the folder {printable(folders[0].name)}, whose files are not read",
            "Write the table without partition columns, or name one folder of files",
        )
    files = [file for file in shown if file.suffix.lower() in SUFFIXES]
    if len({file.suffix.lower() for file in files}) != 1:
        raise UserError(f"{path} is a folder without parts of one kind", f"Known are {', '.join(SUFFIXES)}")
    return files
