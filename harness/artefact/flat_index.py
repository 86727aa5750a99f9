"""FAISS's exact inner-product index as a file: written without holding the vectors, read only if its head and size are
as expected.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from harness.core.errors import UserError

FILE = "index.faiss"
_ROWS = 4096  # vectors in memory at once


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        UserError: it is not installed, or its libraries are missing.
    """
    try:
        import faiss
    except Exception as error:  # faiss-gpu without CUDA's libraries raises more than ImportError
        raise UserError(f"faiss does not import ({error})", "Install faiss-cpu or faiss-gpu, not both") from error
    return faiss


def write_index(stage: Path, width: int) -> None:
    """Writes the index from the parts in their order, with at most _ROWS vectors in memory; FAISS itself would hold
    them all.
    """
    parts = [pq.ParquetFile(part) for part in sorted((stage / "documents").glob("part-*.parquet"))]
    with (stage / FILE).open("wb") as index:
        index.write(index_head(width, sum(part.metadata.num_rows for part in parts)))
        for part in parts:
            for batch in part.iter_batches(_ROWS, columns=["embedding"]):
                index.write(batch.column(0).flatten().to_numpy().astype("<f4", copy=False))


def read_index(folder: Path, width: int, count: int) -> Any:
    """The index of `count` vectors in folder/index.faiss. FAISS allocates memory by the file's head, which is therefore
    checked first.

    Raises:
        UserError: the file is missing, or differs from such an index.
    """
    file, head = folder / FILE, index_head(width, count)
    with file.open("rb") as index:
        if index.read(len(head)) != head or file.stat().st_size != len(head) + 4 * width * count:
            raise UserError(f"{file} is not a flat index of {count:,} vectors of {width} numbers", "Export again")
    return import_faiss().read_index(str(file))


def index_head(width: int, count: int) -> bytes:
    """The bytes before the vectors in a file of `count` of them: FAISS's own for one, with the two numbers that differ.

    Raises:
        UserError: this version of FAISS writes something else.
    """
    faiss = import_faiss()

    def written(vectors: np.ndarray) -> bytes:
        index = faiss.IndexFlatIP(width)
        index.add(vectors)
        return faiss.serialize_index(index).tobytes()

    def head(count: int) -> bytes:
        """Type and width (4 bytes each), count (8), constant bytes, number of floats (8)."""
        return (
            one[:8] + struct.pack("<q", count) + one[16 : len(one) - 4 * width - 8] + struct.pack("<q", count * width)
        )

    one, three = (written(np.ones((n, width), np.float32)) for n in (1, 3))
    if three != head(3) + np.ones((3, width), np.float32).tobytes():
        raise UserError(f"faiss {faiss.__version__} writes flat indexes in an unknown format", "Take faiss 1.15")
    return head(count)
