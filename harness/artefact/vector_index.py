"""Nearest documents of queries: FAISS finds candidates, exact vectors order them; some rows may be left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.artefact.flat_index import import_faiss
from harness.artefact.index_kinds import FLAT, KINDS
from harness.core.errors import UserError
from harness.evaluate.ranking import Embedded, best_candidates, top_k

SCANNED_ROWS = 4096  # so few rows are compared one by one
SCANNED_SHARE = 0.02  # so small a share too: an index must look at 1 / share as many vectors for each that passes
_SPARE = 32  # documents that an exact index finds beyond those wanted, to be ordered exactly
_AT_ONCE = 1 << 22  # numbers of candidates' vectors in memory
_REPEATS = 16  # of that, for a scan


class VectorIndex:
    """An index with the exact vectors of its rows.

    Args:
        index: FAISS's, inner product.
        kind: a name in KINDS.
        exact: float32 or float16 [rows, d], the vectors; None: the index has them.
        effort: value of the kind's knob.
        factor: candidates that the index finds for each row wanted.
        kept: bool [rows], rows that may be found at all; None: all.
    """

    def __init__(
        self,
        index: Any,
        kind: str = FLAT,
        exact: np.ndarray | None = None,
        effort: int = 0,
        factor: int = 1,
        kept: np.ndarray | None = None,
    ) -> None:
        self.index, self.kind, self.exact, self.effort, self.factor = index, kind, exact, effort, factor
        self.kept = kept
        self.rows, self.width = index.ntotal, index.d

    def vectors(self, rows: np.ndarray) -> Tensor:
        """Exact vectors of int64 [n] rows, float32 [n, d]."""
        if self.exact is None:
            return torch.from_numpy(self.index.reconstruct_batch(rows))
        return torch.from_numpy(self.exact[rows].astype(np.float32, copy=False))

    def search(self, queries: Tensor, k: int, passing: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """The best rows of each query, int64 [n, min(k, rows that pass)], and their scores, float64, best first.

        Args:
            queries: float32 [n, d].
            k: rows wanted.
            passing: bool [rows], the rows that may be found; None: all.

        Raises:
            UserError: vectors of the index or of the queries are not finite or longer than 1.
        """
        if self.kept is not None:
            passing = self.kept if passing is None else passing & self.kept
        count = self.rows if passing is None else int(passing.sum())
        k = min(k, count)
        if passing is not None and count <= max(SCANNED_ROWS, SCANNED_SHARE * self.rows):
            return self._scan(queries, k, np.flatnonzero(passing))
        wanted = min(self.rows, k * self.factor + (_SPARE if self.exact is None else 0))
        step = max(1, _AT_ONCE // (wanted * self.width))
        parts = [self._search(part, k, wanted, passing) for part in queries.split(step)]
        return torch.cat([rows for rows, _ in parts]), torch.cat([scores for _, scores in parts])

    def _search(self, queries: Tensor, k: int, wanted: int, passing: np.ndarray | None) -> tuple[Tensor, Tensor]:
        effort = self.effort if passing is None else int(self.effort * self.rows / passing.sum())
        found = self.candidates(queries.numpy(), wanted, effort, passing)
        if found.max() >= self.rows:
            raise UserError("the index names rows that it does not have")
        vectors = self.vectors(np.maximum(found, 0).reshape(-1)).view(*found.shape, self.width)
        rows, scores = best_candidates(queries, vectors, torch.from_numpy(found), k)
        few = (rows < 0).any(1)
        if few.any():
            allowed = np.arange(self.rows) if passing is None else np.flatnonzero(passing)
            rows[few], scores[few] = self._scan(queries[few], k, allowed)
        return rows, scores

    def candidates(
        self, queries: np.ndarray, wanted: int, effort: int, passing: np.ndarray | None = None
    ) -> np.ndarray:
        """Rows that the index finds, int64 [n, wanted], best first by its codes; -1 where it finds fewer."""
        faiss, kind = import_faiss(), KINDS[self.kind]
        bits = None if passing is None else faiss.IDSelectorBitmap(np.packbits(passing, bitorder="little"))
        if kind.knob == "efSearch":
            effort = min(max(effort, wanted), self.rows)
        parameters = kind.parameters(effort, bits, hasattr(self.index, "chain"))
        found: np.ndarray = self.index.search(queries, wanted, params=parameters)[1]
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
