"""Nearest documents of queries: FAISS finds candidates, exact vectors order them; some rows may be left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.artefact.flat_index import import_faiss
from harness.evaluate.ranking import Embedded, best_candidates, top_k

SCANNED_ROWS = 4096  # so few rows are compared one by one
SCANNED_SHARE = 0.02  # so small a share too: an index must look at 1 / share as many vectors for each that passes
_SPARE = 32  # documents fetched beyond those wanted, to be ordered exactly
_AT_ONCE = 1 << 22  # numbers of candidates' vectors in memory; 65,536 rows of a scan at width 64
_REPEATS = 16


class VectorIndex:
    """An index with the exact vectors of its rows.

    Args:
        index: FAISS's, inner product.
    """

    def __init__(self, index: Any) -> None:
        self.index, self.rows, self.width = index, index.ntotal, index.d

    def vectors(self, rows: np.ndarray) -> Tensor:
        """Exact vectors of int64 [n] rows, float32 [n, d]."""
        return torch.from_numpy(self.index.reconstruct_batch(rows))

    def search(self, queries: Tensor, k: int, passing: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """The best rows of each query, int64 [n, min(k, rows that pass)], and their scores, float64, best first.

        Args:
            queries: float32 [n, d].
            k: rows wanted.
            passing: bool [rows], the rows that may be found; None: all.

        Raises:
            UserError: vectors of the index or of the queries are not finite or longer than 1.
        """
        count = self.rows if passing is None else int(passing.sum())
        k = min(k, count)
        if passing is not None and count <= max(SCANNED_ROWS, SCANNED_SHARE * self.rows):
            return self._scan(queries, k, np.flatnonzero(passing))
        parts = [self._search(part, k, passing) for part in self._pieces(queries, k)]
        return torch.cat([rows for rows, _ in parts]), torch.cat([scores for _, scores in parts])

    def _pieces(self, queries: Tensor, k: int) -> Iterator[Tensor]:
        yield from queries.split(max(1, _AT_ONCE // ((k + _SPARE) * self.width)))

    def _search(self, queries: Tensor, k: int, passing: np.ndarray | None) -> tuple[Tensor, Tensor]:
        candidates = self._candidates(queries.numpy(), k, passing)
        vectors = self.vectors(np.maximum(candidates, 0).reshape(-1)).view(*candidates.shape, self.width)
        rows, scores = best_candidates(queries, vectors, torch.from_numpy(candidates), k)
        few = (rows < 0).any(1)
        if few.any():
            allowed = np.arange(self.rows) if passing is None else np.flatnonzero(passing)
            rows[few], scores[few] = self._scan(queries[few], k, allowed)
        return rows, scores

    def _candidates(self, queries: np.ndarray, k: int, passing: np.ndarray | None) -> np.ndarray:
        """Rows int64 [n, c], -1 where the index found fewer."""
        faiss = import_faiss()
        bits = None if passing is None else faiss.IDSelectorBitmap(np.packbits(passing, bitorder="little"))
        parameters = None if bits is None else faiss.SearchParameters(sel=bits)
        found: np.ndarray = self.index.search(queries, min(k + _SPARE, self.rows), params=parameters)[1]
        return found

    def _scan(self, queries: Tensor, k: int, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The same of all `rows` compared one by one."""
        best, scores = torch.empty(len(queries), 0, dtype=torch.int64), torch.empty(len(queries), 0).double()
        step = max(1, _REPEATS * _AT_ONCE // self.width)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            found = top_k(_unlabelled(queries), _unlabelled(self.vectors(part), torch.from_numpy(part)), k)
            best, scores = (torch.cat(pair, 1) for pair in zip((best, scores), found, strict=True))
            # Parts come in ascending order of their rows, so that a stable sort leaves those of equal score in order.
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            best, scores = best.gather(1, order)[:, :k], scores[:, :k]
        return best, scores


def _unlabelled(vectors: Tensor, ids: Tensor | None = None) -> Embedded:
    ids = torch.arange(len(vectors)) if ids is None else ids
    return Embedded(vectors, ids, torch.full_like(ids, -1))
