"""A table in a JSONL file: one object a line, read as text cells."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.catalogue.cells import text_of
from harness.catalogue.images import Rejected
from harness.catalogue.text_table import Row


class JsonTable:
    """A JSONL file. Values become text by harness/catalogue/cells.py; a line that is not an object costs itself.

    Args:
        path: the file, UTF-8.

    Attributes:
        columns: keys of all lines, in the order in which they come.
        num_rows: exact; blank lines are not rows.
        said: nothing that had to be recognised.

    Raises:
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.said = path, list[str]()
        names: dict[str, None] = {}
        self.num_rows = 0
        for _, values in self._lines():
            names |= dict.fromkeys(values or ())
            self.num_rows += 1
        self.columns = list(names)

    def check(self, column: str) -> None:
        """Every value but a list or an object becomes text; those cost their row."""

    def hint(self, column: str) -> str:
        """No flag changes the columns."""
        return ""

    def remarks(self) -> list[str]:
        """Nothing is seen that may not be meant."""
        return []

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """The rows in order, each with the cells of `columns`; an absent key is an empty cell."""
        for number, values in self._lines():
            if values is None:
                yield Row([""] * len(columns), f"malformed: line {number}: not a JSON object")
                continue
            try:
                yield Row([text_of(values.get(column)) for column in columns])
            except Rejected as rejected:
                yield Row([""] * len(columns), str(rejected))

    def _lines(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Number of each line, from 1, and its object."""
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError):
                    values = None
                yield number, values if isinstance(values, dict) else None
