"""Exact vectors of an artefact's documents in one file that is read in place: the last word on the order of what an
index finds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from harness.core.errors import UserError
from harness.core.evenly import evenly

FILE = "vectors.npy"
_ROWS = 4096  # vectors in memory at once


def write_vectors(stage: Path, width: int, dtype: str) -> None:
    """Writes folder/vectors.npy from the parts in their order, with at most _ROWS vectors in memory."""
    parts = [pq.ParquetFile(part) for part in sorted((stage / "documents").glob("part-*.parquet"))]
    shape = (sum(part.metadata.num_rows for part in parts), width)
    with (stage / FILE).open("wb") as out:
        np.lib.format.write_array_header_1_0(
            out, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        )
        for part in parts:
            for batch in part.iter_batches(_ROWS, columns=["embedding"]):
                out.write(batch.column(0).flatten().to_numpy().astype(dtype, copy=False))


def open_vectors(folder: Path, width: int, count: int) -> np.ndarray:
    """The vectors of folder/vectors.npy [count, width], float32 or float16, mapped into memory.

    Raises:
        UserError: the file is damaged, or has another shape or type.
    """
    file = folder / FILE
    try:
        vectors: np.ndarray = np.lib.format.open_memmap(file, mode="r")
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error})", "Export again") from error
    if vectors.shape != (count, width) or vectors.dtype.str not in ("<f4", "<f2") or not vectors.flags.c_contiguous:
        raise UserError(f"{file} does not hold {count:,} vectors of {width} numbers", "Export again")
    return vectors


def read_rows(vectors: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """Writes the vectors of rows int64 [n], each at least 0 and below their number, into float32 [n, d]."""
    if vectors.dtype == out.dtype:
        np.take(vectors, rows, 0, out, "clip")  # "raise" would copy `out`
    else:
        out[:] = np.take(vectors, rows, 0)


def sample(vectors: np.ndarray, rows: int) -> np.ndarray:
    """At most `rows` vectors, evenly spread, float32."""
    return np.asarray(vectors[evenly(len(vectors), rows)], np.float32)
