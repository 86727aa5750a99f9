"""Search of an index of vectors: order, filters, removed rows, and every kind of index at the recall it promises."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from harness.artefact import vector_index
from harness.artefact.vector_index import VectorIndex
from harness.evaluate.ranking import Embedded, top_k

WIDTH = 16


def unit(rows: int, seed: int, copies: int = 1) -> torch.Tensor:
    """Unit vectors [rows, WIDTH]; each stands `copies` times, so that scores tie."""
    made = torch.randn(-(-rows // copies), WIDTH, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(made).repeat(copies, 1)[:rows]


def flat(vectors: torch.Tensor) -> VectorIndex:
    index = faiss.IndexFlatIP(WIDTH)
    index.add(vectors.numpy())
    return VectorIndex(index)


def expected(queries: torch.Tensor, vectors: torch.Tensor, rows: np.ndarray, k: int) -> tuple[torch.Tensor, ...]:
    """By brute force over `rows` only."""

    def side(part: torch.Tensor, ids: torch.Tensor) -> Embedded:
        return Embedded(part, ids, torch.full_like(ids, -1))

    ids = torch.from_numpy(rows)
    return top_k(side(queries, torch.arange(len(queries))), side(vectors[ids], ids), k)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("scanned", [0, 10**9])
def test_a_filter_gives_what_brute_force_over_the_passing_rows_gives(
    share: float, scanned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By FAISS's selector and by a scan in several parts; ties in the order of the rows."""
    monkeypatch.setattr(vector_index, "SCANNED_ROWS", scanned)
    monkeypatch.setattr(vector_index, "SCANNED_SHARE", 0.0)
    monkeypatch.setattr(vector_index, "_AT_ONCE", 700 * WIDTH // vector_index._REPEATS)
    vectors, queries = unit(3000, 0, copies=2), unit(9, 1)
    passing = np.random.default_rng(0).random(3000) < share
    rows, scores = flat(vectors).search(queries, 7, passing)
    wanted = expected(queries, vectors, np.flatnonzero(passing), 7)
    assert rows.shape == (9, min(7, int(passing.sum())))
    assert torch.equal(rows, wanted[0]) and torch.equal(scores, wanted[1])


def test_without_a_filter_the_order_is_that_of_the_exact_ranking() -> None:
    vectors, queries = unit(500, 0, copies=4), unit(300, 1)
    for k in (1, 10, 499, 1000):
        wanted = expected(queries, vectors, np.arange(500), k)
        found = flat(vectors).search(queries, k)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
