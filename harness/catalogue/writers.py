"""Files that grow by appending, so that memory does not grow with the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP, GROUP_TEXT = 8192, 1 << 26  # rows and characters of text after which a row group is written


class NpyWriter:
    """A one-dimensional .npy file whose length is known only at the end; ordinary np.load reads it.

    Args:
        path: the file to write.
        dtype: type of its elements, structured ones included.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.length = 0
        self._dtype = np.dtype(dtype)
        self._file = path.open("wb")
        self._header_bytes = self._write_header()

    def append(self, values: npt.ArrayLike) -> None:
        """Appends `values` [n], converted to the file's type."""
        array = np.asarray(values, dtype=self._dtype)
        self._file.write(array.tobytes())
        self.length += len(array)

    def _write_header(self) -> int:
        # numpy pads the header so that a grown first axis still fits the space of an empty one's.
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.seek(0)
            if self._write_header() != self._header_bytes:
                raise RuntimeError(f"numpy's header changed its size at {self.length} elements")
        finally:
            self._file.close()


class ParquetWriter:
    """Rows into Parquet files of at most `rows_per_part` rows each, in the order of `append`.

    Args:
        path_of_part: path of the n-th file; the first one is written even without rows.
        schema: of every file.
        rows_per_part: None for one file.
    """

    def __init__(self, path_of_part: Callable[[int], Path], schema: pa.Schema, rows_per_part: int | None) -> None:
        self.num_rows = 0
        self._path_of_part, self._schema, self._rows_per_part = path_of_part, schema, rows_per_part
        self._pending: list[Sequence[Any]] = []
        self._pending_text = 0
        self._parts = 0
        self._part_rows = 0
        self._open_part()

    def append(self, row: Sequence[Any]) -> None:
        """Appends one row, its values in the order of the schema."""
        if self._part_rows + len(self._pending) == self._rows_per_part:
            self._flush()
            self._part.close()
            self._open_part()
        self._pending.append(row)
        self._pending_text += sum(len(value) for value in row if isinstance(value, str))
        self.num_rows += 1
        if len(self._pending) == ROW_GROUP or self._pending_text > GROUP_TEXT:
            self._flush()

    def _open_part(self) -> None:
        self._part = pq.ParquetWriter(self._path_of_part(self._parts), self._schema)
        self._parts += 1
        self._part_rows = 0

    def _flush(self) -> None:
        if self._pending:
            columns = [
                pa.array(values, field.type)
                for values, field in zip(zip(*self._pending, strict=True), self._schema, strict=True)
            ]
            self._part.write_batch(pa.record_batch(columns, schema=self._schema))
            self._part_rows += len(self._pending)
            self._pending, self._pending_text = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._flush()
        finally:
            self._part.close()
