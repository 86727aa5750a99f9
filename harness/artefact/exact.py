"""Exact search of vectors that come block by block, in the order of evaluation (`harness.evaluate.ranking.top_k`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from harness.evaluate.ranking import Embedded, best_candidates, top_k

Found = tuple[Tensor, Tensor]
_AT_ONCE = 1 << 18  # numbers of candidates' vectors in memory: they stay in the processor's cache


def best_of_blocks(queries: Tensor, blocks: Iterable[tuple[Tensor, Tensor]], k: int) -> Found:
    """The best rows of each query, int64 [n, min(k, rows)], and their scores, float64, best first.

    Args:
        queries: unit vectors, float32 [n, d].
        blocks: rows int64 [b], ascending also from block to block, and their vectors float32 [b, d].
        k: rows wanted.

    Raises:
        UserError: vectors are not finite or longer than 1.
    """
    asked = _unlabelled(torch.arange(len(queries)), queries)
    best: Found = (torch.empty(len(queries), 0, dtype=torch.int64), torch.empty(len(queries), 0).double())
    for rows, vectors in blocks:
        best = merged([best, top_k(asked, _unlabelled(rows, vectors), k)], k)
    return best


def ordered(vectors: Callable[[np.ndarray], Tensor], queries: Tensor, found: Tensor, k: int) -> Found:
    """The best k of the candidates of each query, int64 [n, k], -1 where there are fewer, and their scores, float64.

    Args:
        vectors: gives vectors float32 [n, d] of rows int64 [n].
        queries: unit vectors, float32 [n, d].
        found: candidates' rows, int64 [n, c]; -1: there is none.
        k: rows wanted, at most c.

    Raises:
        UserError: vectors are not finite or longer than 1.
    """
    width = queries.shape[1]
    blocks = (part.split(max(1, _AT_ONCE // (found.shape[1] * width))) for part in (queries, found))
    parts = []
    for asked, rows in zip(*blocks, strict=True):
        exact = vectors(rows.clamp_min(0).flatten().numpy()).view(*rows.shape, width)
        parts.append(best_candidates(asked, exact, rows, k))
    return torch.cat([rows for rows, _ in parts]), torch.cat([scores for _, scores in parts])


def merged(found: Iterable[Found], k: int) -> Found:
    """The best k of results whose rows ascend from one to the next."""
    rows, scores = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    scores, order = scores.sort(dim=1, descending=True, stable=True)  # stable: equal scores stay in the rows' order
    return rows.gather(1, order)[:, :k], scores[:, :k]


def _unlabelled(ids: Tensor, vectors: Tensor) -> Embedded:
    return Embedded(vectors, ids, torch.full_like(ids, -1))
