"""Format of a catalogue's pairs/ folder, which `shelfmark pairs` writes: the documents that answer a query.

Arrays, since every rank maps them: those of a node share the memory, and only the parts that are asked for are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.catalogue.catalogue import open_array
from harness.core.errors import UserError

PAIRS_FORMAT = 1
ARRAYS = {"query": np.int64, "document": np.int64, "grade": np.float32}


@dataclass(frozen=True)
class Pairs:
    """m judged pairs of query and document, each once, in the order of queries, then of documents.

    query, document: int64 [m] sample ids; grade: float32 [m], finite: above 0 for a right answer, 0 for a wrong one.
    """

    query: np.ndarray
    document: np.ndarray
    grade: np.ndarray

    @classmethod
    def open(cls, catalogue: Path) -> Pairs | None:
        """Maps the pairs of a catalogue; None where it has none.

        Raises:
            UserError: the arrays are damaged.
        """
        folder, remedy = Path(catalogue) / "pairs", f"Run: shelfmark pairs {catalogue}"
        if not folder.exists():
            return None
        arrays = {name: open_array(folder / f"{name}.npy", dtype, remedy) for name, dtype in ARRAYS.items()}
        if len({len(array) for array in arrays.values()}) != 1:
            raise UserError(f"{folder}: the arrays do not fit together", remedy)
        return cls(**arrays)

    def of(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the pairs of each of `queries`, int64 [n] sample ids in any order, also repeated.

        Returns:
            int64 [k] and [k]: places in `queries`, ascending, and rows, ascending for each place.
        """
        first = np.searchsorted(self.query, queries)
        sizes = np.searchsorted(self.query, queries, side="right") - first
        places = np.repeat(np.arange(len(queries)), sizes)
        return places, np.arange(len(places)) + np.repeat(first - (np.cumsum(sizes) - sizes), sizes)
