"""A table in a text file (CSV, TSV): delimiter, encoding and quoting, and records that cost no others."""

from __future__ import annotations

import codecs
import csv
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from harness.catalogue.cells import MOST_TEXT
from harness.core.errors import UserError

MOST_LINE = 1 << 24  # characters of a line
DELIMITERS = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a bar"}
_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
# One bad character is one lone surrogate, which does not encode: it costs its row.
codecs.register_error("shelfmark.bad", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


class Row(NamedTuple):
    """One data row: the cells of the columns asked for, and what is wrong with the row ('' for nothing).

    Bytes of a cell that are not text of the file's encoding stand there as lone surrogates, which do not encode.
    `data` are the bytes of an image that the table holds itself.
    """

    cells: list[str]
    problem: str = ""
    data: bytes | None = None


class TextTable:
    """A CSV or TSV file with a header.

    Each of the three options is recognised where it is None. The delimiter is that of the suffix unless the header has
    but one cell with it. The encoding is UTF-8 unless the file begins as UTF-16 or UTF-32 do. Quoting is that of CSV,
    except in a TSV with tabs whose header has no quotes.

    Args:
        path: the file.
        delimiter: one character.
        encoding: a name that Python knows.
        quoting: 'csv' for cells in `"`, 'none' for cells as they stand.

    Attributes:
        columns: names in the file's order, without spaces at their ends.
        num_rows: lines below the first; an estimate.
        said: what was recognised beyond the rules of the suffix.

    Raises:
        UserError: the header cannot be read, or the encoding is not known.
        OSError, UnicodeError: the file cannot be read.
    """

    def __init__(
        self,
        path: Path,
        delimiter: str | None = None,
        encoding: str | None = None,
        quoting: Literal["csv", "none"] | None = None,
    ) -> None:
        self.path, self.said = path, list[str]()
        self._spaces = False
        self._quoted_cells = self._long_records = self._taken_lines = 0
        self._tabs = path.suffix.lower() == ".tsv"
        self._encoding = _encoding(path) if encoding is None else encoding
        if encoding is None and self._encoding != "utf-8-sig":
            self.said.append(f"its encoding is {self._encoding}")
        self._delimiter = "\t" if self._tabs else ","
        self._quoting = quoting
        if delimiter is not None:
            self._delimiter = delimiter
        elif len(self._header(self._delimiter)) < 2:
            best = max(DELIMITERS, key=lambda other: len(self._tried(other)))
            if len(self._tried(best)) > 1:
                self._delimiter = best
                self.said.append(f"its cells are separated by {DELIMITERS[best]}")
        header = self._header(self._delimiter)
        if quoting is None and not self._quotes(self._delimiter) and header and all(map(_is_quoted, header)):
            self._quoting = "csv"
            self.said.append("its cells are quoted")
            header = self._header(self._delimiter)
        self._spaces = len(header) > 1 and all(name[:1] == " " for name in header[1:])
        if self._spaces:
            self.said.append("a space follows each delimiter and belongs to no cell")
            header = self._header(self._delimiter)  # a quote may follow the space
        self.columns = [name.strip() for name in header]
        with path.open("rb") as file:
            self.num_rows = max(sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")) - 1, 0)

    def check(self, column: str) -> None:
        """Every column of a text file holds text."""

    def hint(self, column: str) -> str:
        """The flag with which there would be a column of that name, or ''."""
        for other, name in DELIMITERS.items():
            if other != self._delimiter and column in [cell.strip() for cell in self._tried(other)]:
                return f"with cells separated by {name} there is one (--delimiter)"
        return ""

    def remarks(self) -> list[str]:
        """Oddities among the rows that were read, which may not be meant."""
        found = []
        if self._quoted_cells:
            found.append(
                f"{self._quoted_cells:,} rows have cells in quotes, which are kept (--quoting csv removes them)"
            )
        if self._long_records:
            found.append(f"{self._long_records:,} rows go over several lines, {self._taken_lines:,} lines in all")
        return found

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """The data rows in order, each with the cells of `columns`; blank lines are no rows."""
        places, width = [self.columns.index(column) for column in columns], len(self.columns)
        quotes = self._quotes(self._delimiter)
        for record in islice(self._records(self._delimiter, width), 1, None):
            if isinstance(record, str):
                yield Row([""] * len(places), record)
                continue
            self._quoted_cells += not quotes and any(cell[:1] == '"' and _is_quoted(cell) for cell in record)
            wrong = len(record) != width
            yield Row(
                [record[place] if place < len(record) else "" for place in places],
                f"wrong number of cells: {len(record)}, the header has {width}" if wrong else "",
            )

    def _quotes(self, delimiter: str) -> bool:
        if self._quoting is not None:
            return self._quoting == "csv"
        return not (self._tabs and delimiter == "\t")

    def _tried(self, delimiter: str) -> list[str]:
        header = next(self._records(delimiter), [])
        return [] if isinstance(header, str) else header

    def _header(self, delimiter: str) -> list[str]:
        header = next(self._records(delimiter), [])
        if isinstance(header, str):
            raise UserError(f"the manifest {self.path} has no header that can be read: {header}")
        return header

    def _records(self, delimiter: str, width: int | None = None) -> Iterator[list[str] | str]:
        """Records as cells, or as what is wrong with one; then reading goes on with the line after the one where it
        began.

        So a quote that is never closed costs its own line, not those that it seems to hold: where a record of several
        lines is none, or has not `width` cells, all but its first line are read again.
        """
        csv.field_size_limit(MOST_TEXT)
        errors = "surrogateescape" if self._encoding == "utf-8-sig" else "shelfmark.bad"
        try:
            file = self.path.open(encoding=self._encoding, errors=errors, newline="")
        except LookupError as error:
            raise UserError(f"--encoding: {error}", "Name one such as utf-8, utf-16, cp1252 or gb18030") from error
        with file:
            lines = _Lines(file)
            if self._quotes(delimiter):
                reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=self._spaces)
            else:
                reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, skipinitialspace=self._spaces)
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
                    if lines.taken > 1 and width not in (None, len(record)):
                        begun, _ = lines.take_back()
                        yield f"malformed: line {begun}: a quote that is not closed, or a wrong number of cells"
                    elif record:
                        if width and lines.taken > 1:
                            self._long_records += 1
                            self._taken_lines += lines.taken
                        yield record


def _encoding(path: Path) -> str:
    """By the first bytes: those of a byte order mark, or zeros in every other place."""
    with path.open("rb") as file:
        start = file.read(1024)
    for mark, name in _BOMS.items():  # that of UTF-32 begins as that of UTF-16 does
        if start.startswith(mark):
            return name
    zeros = [start[place::2].count(0) for place in (0, 1)]
    for name, many, few in (("utf-16-le", zeros[1], zeros[0]), ("utf-16-be", zeros[0], zeros[1])):
        if many > len(start) // 4 > few:
            return name
    return "utf-8-sig"


def _is_quoted(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"'


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
    def taken(self) -> int:
        """Lines of the record."""
        return len(self._taken)

    def take_back(self) -> tuple[int, bool]:
        """Number of the record's first line, from 1, and whether there were others; those will be read again."""
        first, several = self._read - len(self._taken) + 1, self.taken > 1
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
