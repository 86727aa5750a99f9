"""Documents taken out of an artefact: their rows stay in id map and index, and no search finds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from harness.core.errors import UserError
from harness.core.files import Record

FILE = "removed.npy"


def write_removed(folder: Path, rows: np.ndarray) -> None:
    """Writes folder/removed.npy, ascending rows int64 [n]."""
    np.save(folder / FILE, np.unique(rows).astype("<i8"), allow_pickle=False)


def read_kept(folder: Path, record: Record, count: int) -> np.ndarray | None:
    """bool [count], the rows that were not removed; None where none was.

    Raises:
        UserError: removed.npy is missing or damaged, or has another number of rows than artefact.json says.
    """
    if "removed" not in record.values:
        return None
    file, removed = folder / FILE, record.number("removed", count - 1, 1)
    try:
        rows = np.lib.format.open_memmap(file, mode="r")
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error})", "Export again") from error
    if rows.shape != (removed,) or rows.dtype.str != "<i8":
        raise UserError(f"{file} does not hold the {removed:,} rows of artefact.json", "Export again")
    if rows[0] < 0 or rows[-1] >= count or (np.diff(rows) < 1).any():
        raise UserError(f"{file} holds rows that are not ascending numbers below {count:,}", "Export again")
    kept = np.ones(count, bool)
    kept[rows] = False
    return kept
