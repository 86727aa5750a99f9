"""Nearest documents of queries: FAISS finds candidates, exact vectors order them; some rows may be left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.artefact.exact import best_of_blocks, ordered
from harness.artefact.flat_index import import_faiss
from harness.artefact.index_build import index_lists
from harness.artefact.index_kinds import FLAT, KINDS
from harness.artefact.vectors_file import read_rows
from harness.core.errors import UserError

SCANNED_ROWS = 4096  # so few rows are compared one by one
SCANNED_SHARE = 0.02  # so small a share too: an index must look at 1 / share as many vectors for each that passes
SPARE = 32  # documents that an exact index finds beyond those wanted, to be ordered exactly
_QUERIES, _FOUND = 1 << 12, 1 << 22  # queries, and candidates, at once
_SCANNED = 1 << 26  # numbers compared at once by a scan


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
        out = np.empty((len(rows), self.width), np.float32)
        self._read(rows, out)
        return torch.from_numpy(out)

    def _read(self, rows: np.ndarray, out: np.ndarray) -> None:
        if self.exact is None:
            self.index.reconstruct_batch(rows, out)
        else:
            read_rows(self.exact, rows, out)

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
        wanted = min(self.rows, k * self.factor + (SPARE if self.exact is None else 0))
        at_once = max(1, min(_QUERIES, _FOUND // wanted))
        parts = [self._search(part, k, wanted, passing) for part in queries.split(at_once)]
        return torch.cat([rows for rows, _ in parts]), torch.cat([scores for _, scores in parts])

    def _search(self, queries: Tensor, k: int, wanted: int, passing: np.ndarray | None) -> tuple[Tensor, Tensor]:
        effort = self.effort if passing is None else int(self.effort * self.rows / passing.sum())
        found = self.candidates(queries.numpy(), wanted, effort, passing)
        if found.max() >= self.rows:
            raise UserError("the index names rows that it does not have")
        rows, scores = ordered(self._read, queries, torch.from_numpy(found), k)
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
        if kind.knob == "nprobe":
            return self._of_lists(queries, wanted, kind.parameters(effort, bits))
        if kind.knob == "efSearch":
            effort = min(max(effort, wanted), self.rows)
        found: np.ndarray = self.index.search(queries, wanted, params=kind.parameters(effort, bits))[1]
        return found

    def _of_lists(self, queries: np.ndarray, wanted: int, parameters: Any) -> np.ndarray:
        """The same of an index with lists. Queries near the same list are answered one after the other: it stays in the
        processor's cache, which takes up to half of the time off, and changes no answer.
        """
        faiss, lists = import_faiss(), index_lists(self.index)
        if hasattr(self.index, "chain"):
            queries = faiss.downcast_VectorTransform(self.index.chain.at(0)).apply(queries)
        scores, near = lists.quantizer.search(queries, min(parameters.nprobe, lists.nlist))
        order = np.argsort(near[:, 0], kind="stable")
        answers: np.ndarray = np.empty((len(order), wanted), np.int64)
        arrays = queries[order], near[order], scores[order], np.empty(answers.shape, np.float32), answers
        query, *others = map(faiss.swig_ptr, arrays)
        lists.search_preassigned_c(len(order), query, wanted, *others, False, parameters)
        found = np.empty_like(answers)
        found[order] = answers
        return found

    def _scan(self, queries: Tensor, k: int, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The same of all `rows` compared one by one."""
        step = max(1, _SCANNED // self.width)
        parts = (rows[start : start + step] for start in range(0, len(rows), step))
        return best_of_blocks(queries, ((torch.from_numpy(part), self.vectors(part)) for part in parts), k)
