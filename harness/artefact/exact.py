"""Exact search of vectors that come block by block, in the order of evaluation (`harness.evaluate.ranking.top_k`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from harness.evaluate.ranking import MAX_NORM, VECTOR_BITS, Embedded, bad_vectors, best_candidates, top_k

Found = tuple[Tensor, Tensor]
Read = Callable[[np.ndarray, np.ndarray], None]  # writes the vectors of rows, int64 [n], into float32 [n, d]
_AT_ONCE = 1 << 16  # numbers of candidates' vectors in memory: they stay in the processor's cache


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


def ordered(read: Read, queries: Tensor, found: Tensor, k: int) -> Found:
    """The best k of the candidates of each query, int64 [n, k], -1 where there are fewer, and their scores, float64.

    Args:
        read: vectors of the rows.
        queries: unit vectors, float32 [n, d].
        found: candidates' rows, int64 [n, c]; -1: there is none; overwritten.
        k: rows wanted, at most c.

    Raises:
        UserError: vectors are not finite or longer than 1.
    """
    asked, rows = queries.numpy(), found.numpy()
    (count, candidates), width = rows.shape, asked.shape[1]
    _check(asked)
    step = max(1, min(count, _AT_ONCE // max(1, candidates * width)))
    # Memory is taken once: the pages of new arrays would cost more than the arithmetic.
    narrow, exact = np.empty((step * candidates, width), np.float32), np.empty(step * candidates * width)
    dots, most = np.empty(rows.shape), k
    for start in range(0, count, step):
        part = slice(start, start + step)
        own = rows[part]
        vectors = narrow[: own.size]
        read(own.clip(0).ravel(), vectors)
        _check(vectors)
        if candidates > k:
            own, vectors = _nearest(asked[part], vectors.reshape(*own.shape, width), own, k)
        left = own.shape[1]
        wide = exact[: vectors.size].reshape(*own.shape, width)
        np.copyto(wide, _on_grid(vectors, vectors).reshape(wide.shape))
        query = _on_grid(asked[part]).astype(np.float64)
        np.vecdot(wide, query[:, None], out=dots[part, :left])
        rows[part, :left], rows[part, left:], dots[part, left:] = own, -1, 0
        most = max(most, left)
    return best_candidates(torch.from_numpy(dots[:, :most]), found[:, :most], k)


def _nearest(queries: np.ndarray, vectors: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The candidates that can be among the best k, rows int64 [n, m] and vectors float32 [n, m, d] of [n, c] and
    [n, c, d]: products in float32 exclude the others.
    """
    dots, candidates = np.vecdot(vectors, queries[:, None]), rows.shape[1]
    dots[rows < 0] = -np.inf
    # Two products of unit vectors, each less than d + 2 roundings of 2**-24 away from that on the grid; twice that.
    margin = np.float32((queries.shape[1] + 2) * 2.0**-22)
    least = np.partition(dots, candidates - k, 1)[:, candidates - k, None] - margin
    most = int((dots >= least).sum(1).max())
    best = np.argpartition(dots, candidates - most, 1)[:, candidates - most :]
    places = np.arange(len(rows))[:, None]
    return rows[places, best], vectors[places, best]


def _on_grid(vectors: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Vectors float32 [..., d] as whole numbers of steps: exact in float32 too, at half the memory traffic."""
    out = np.multiply(vectors, np.float32(2**VECTOR_BITS), out=out)
    return np.rint(out, out=out)


def _check(vectors: np.ndarray) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        sound = (np.vecdot(vectors, vectors) <= MAX_NORM**2).all()  # not for a NaN
    if not sound:
        raise bad_vectors(0)


def merged(found: Iterable[Found], k: int) -> Found:
    """The best k of results whose rows ascend from one to the next."""
    rows, scores = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    scores, order = scores.sort(dim=1, descending=True, stable=True)  # stable: equal scores stay in the rows' order
    return rows.gather(1, order)[:, :k], scores[:, :k]


def _unlabelled(ids: Tensor, vectors: Tensor) -> Embedded:
    return Embedded(vectors, ids, torch.full_like(ids, -1))
