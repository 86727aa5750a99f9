"""Search of an index of vectors: order, filters, removed rows, and every kind of index at the recall it promises."""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from harness.artefact import index_tune, vector_index
from harness.artefact.exact import ordered
from harness.artefact.flat_index import FILE
from harness.artefact.index_build import build_index
from harness.artefact.index_kinds import KINDS, choose_kind
from harness.artefact.index_read import read_kind
from harness.artefact.index_tune import exact_nearest, measured, tune
from harness.artefact.vector_index import VectorIndex
from harness.artefact.vectors_file import read_rows
from harness.core.errors import UserError
from harness.evaluate.ranking import VECTOR_BITS, Embedded, _on_grid, top_k
from tests.pool import layout, ranks

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
    monkeypatch.setattr(vector_index, "_SCANNED", 700 * WIDTH)
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


def test_removed_rows_are_found_by_no_search() -> None:
    vectors, queries = unit(500, 0, copies=2), unit(9, 1)
    index, passing = flat(vectors), np.arange(500) % 3 > 0
    index.kept = np.arange(500) % 7 > 0
    for asked, allowed in ((None, index.kept), (passing, index.kept & passing)):
        wanted = expected(queries, vectors, np.flatnonzero(allowed), 10)
        found = index.search(queries, 10, asked)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def clustered(rows: int) -> np.ndarray:
    """Unit vectors float32 [rows, WIDTH] around 60 centres."""
    rng = np.random.default_rng(0)
    made = rng.standard_normal((60, WIDTH))[rng.integers(0, 60, rows)] + 0.3 * rng.standard_normal((rows, WIDTH))
    unit: np.ndarray = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    return unit


def build(folder: Path, kind: str, rows: int, recall: float) -> Any:
    """In a pool: builds and tunes an index of clustered vectors; what tuning gives, or its error."""
    with layout() as mesh:
        vectors, queries = clustered(rows), clustered(rows + 99)[rows:]
        build_index(KINDS[kind], vectors, folder, 1, mesh)
        nearest = exact_nearest(vectors, queries, mesh)
        best = expected(torch.from_numpy(queries), torch.from_numpy(vectors), np.arange(rows), 10)[0]
        assert (nearest == best.numpy()).all()
        try:
            return tune(
                VectorIndex(read_kind(folder / FILE, kind, WIDTH, rows), kind, vectors), queries, nearest, recall
            )
        except UserError as error:
            return str(error)


def nearest_of_copies() -> np.ndarray:
    """In a pool: rows of a search among vectors that stand 4 times each, also twice in a block."""
    with layout() as mesh:
        index_tune._BLOCK = 300
        return exact_nearest(unit(1000, 0, copies=4).numpy(), unit(30, 1).numpy(), mesh)


@pytest.mark.parametrize("world", [1, 3])
def test_exact_answers_of_equal_vectors_are_those_of_a_search(world: int) -> None:
    best = expected(unit(30, 1), unit(1000, 0, copies=4), np.arange(1000), 10)[0]
    for nearest in ranks(world).run(nearest_of_copies):
        assert (nearest == best.numpy()).all()


def test_candidates_that_nearly_tie_are_ordered_exactly() -> None:
    """Among 300 vectors 1e-7 apart, some of them twice, products in float32 do not tell the best; one of a block or
    all, in any order, with some missing.
    """
    rng, width, k = np.random.default_rng(0), 256, 10
    made = rng.standard_normal(width) + 1e-6 * rng.standard_normal((300, width))
    made[1::7] = made[::7]
    far, asked = rng.standard_normal((400, width)), rng.standard_normal((40, width)) + made[0]
    vectors, queries = (
        torch.from_numpy((part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32))
        for part in (np.concatenate([made, far]), asked)
    )
    candidates = np.stack([rng.permutation(700) for _ in range(40)])
    present = candidates % 5 > 0

    def best(there: np.ndarray, part: slice = slice(None), scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.from_numpy(np.where(there, candidates, -1)[part])
        return ordered(partial(read_rows, scale * vectors.numpy()), queries[part], found, k)

    wanted = expected(queries, vectors, np.flatnonzero(np.arange(700) % 5), k)
    assert not torch.equal((queries[:1] @ vectors[wanted[0][0]].T)[0].argsort(descending=True), torch.arange(k))
    for parts in ([slice(None)], [slice(row, row + 1) for row in range(40)]):
        rows, scores = (torch.cat(part) for part in zip(*(best(present, part) for part in parts), strict=True))
        assert torch.equal(rows, wanted[0]) and torch.equal(scores, wanted[1])
    assert torch.equal(best(candidates >= 300)[0], expected(queries, vectors, np.arange(300, 700), k)[0])
    few = best(candidates < 3)[0]
    assert (few[:, :3].sort().values == torch.arange(3)).all() and (few[:, 3:] == -1).all()
    uneven = candidates < np.where(np.arange(40) > 0, 150, 300)[:, None]
    assert torch.equal(best(uneven, scale=-1.0)[0][1:], expected(queries[1:], -vectors, np.arange(150), k)[0])
    with pytest.raises(UserError, match="not finite or longer than 1"):
        best(present, scale=1.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_grid_of_scores_is_that_of_float64(dtype: torch.dtype) -> None:
    tiny, large = torch.randn(1000) * 1e-7, torch.rand(5000) * 2.02 - 1.01
    steps = (torch.arange(1000) + 0.5) * 2.0**-VECTOR_BITS  # halfway
    vectors = torch.cat([tiny, large, steps]).to(dtype)
    assert torch.equal(_on_grid(vectors), (vectors.double() * 2**VECTOR_BITS).round())


SMALL = [kind for kind in KINDS if kind not in ("flat", "ivf_pq")]


@pytest.mark.parametrize("kind", [*SMALL, pytest.param("ivf_pq", marks=pytest.mark.full)])
def test_each_kind_reaches_the_recall_within_its_planned_memory(kind: str, tmp_path: Path) -> None:
    rows = 10_000 if kind == "ivf_pq" else 3000
    (tuned,) = ranks(1).run(build, tmp_path, kind, rows, 0.95)
    vectors, queries = clustered(rows), clustered(rows + 99)[rows:]
    assert [file.name for file in tmp_path.iterdir()] == [FILE], "shards are gone"
    planned, size = KINDS[kind].ram_bytes(WIDTH, rows), (tmp_path / FILE).stat().st_size
    assert 0.9 < planned / size < 1.1
    index = VectorIndex(read_kind(tmp_path / FILE, kind, WIDTH, rows), kind, vectors, tuned.effort, tuned.factor)
    wanted, scores = expected(torch.from_numpy(queries), torch.from_numpy(vectors), np.arange(rows), 10)
    found = index.search(torch.from_numpy(queries), 10)
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(found[0].tolist(), wanted.tolist(), strict=True)]
    assert np.mean(shares[1::2]) == pytest.approx(tuned.recall) and tuned.recall >= 0.95
    same = found[0] == wanted
    assert torch.equal(found[1][same], scores[same]), "scores are exact"
    for share in (0.5, 0.05):  # few rows pass: the index looks farther, or all that pass are compared
        passing = np.random.default_rng(1).random(rows) < share
        rows_found = index.search(torch.from_numpy(queries), 10, passing)[0]
        best = expected(torch.from_numpy(queries), torch.from_numpy(vectors), np.flatnonzero(passing), 10)[0]
        assert (
            passing[rows_found.numpy()].all() and (rows_found.sort().values == best.sort().values).float().mean() > 0.9
        )


def test_the_recall_told_is_of_queries_that_did_not_choose_the_setting(tmp_path: Path) -> None:
    """Every second query is a document, which the first list has; the others lie between the clusters."""
    ranks(1).run(build, tmp_path, "ivf_flat", 3000, 0.6)
    vectors = clustered(3000)
    queries = vectors[:200].copy()
    queries[1::2] = unit(100, 5).numpy()
    nearest = faiss.knn(queries, vectors, 10, metric=faiss.METRIC_INNER_PRODUCT)[1]
    index = VectorIndex(read_kind(tmp_path / FILE, "ivf_flat", WIDTH, 3000), "ivf_flat", vectors)
    tuned = tune(index, queries, nearest, 0.95)
    assert tuned.recall == measured(index, queries[1::2], nearest[1::2]) >= 0.95
    chosen = tune(index, queries[::2], nearest[::2], 0.95)
    assert chosen.effort < tuned.effort and measured(index, queries[1::2], nearest[1::2]) < 0.95


def test_a_recall_out_of_reach_is_told_with_what_reaches_it(tmp_path: Path) -> None:
    (said,) = ranks(1).run(build, tmp_path, "hnsw_bf16", 3000, 1.0 + 1e-9)
    assert "an index of kind hnsw_bf16 finds" in said and "of the 10 nearest documents with efSearch = " in said
    assert "Take --index.kind hnsw or flat, which keep more of each vector, or --index.recall" in said


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_sq8"])
def test_lists_filled_by_several_ranks_are_those_of_one(kind: str, world: int, tmp_path: Path) -> None:
    """The same file; and it answers as one index that FAISS filled at once."""
    one, several = tmp_path / "one", tmp_path / "several"
    for folder, count in ((one, 1), (several, world)):
        folder.mkdir()
        ranks(count).run(build, folder, kind, 3000, 0.9)
    assert (one / FILE).read_bytes() == (several / FILE).read_bytes()
    merged, vectors = faiss.read_index(str(several / FILE)), clustered(3000)
    whole = faiss.read_index(str(several / FILE))
    whole.reset()
    whole.add(vectors)
    for index in (merged, whole):
        index.nprobe = 5
    (a, b), (c, d) = (index.search(vectors[:50], 10) for index in (merged, whole))
    assert (a == c).all() and (b == d).all()


@pytest.mark.parametrize("kind", ["hnsw", "hnsw_bf16", "ivf_sq8", "sq8"])
def test_an_index_of_a_stranger_is_checked_before_it_is_searched(kind: str, tmp_path: Path) -> None:
    """Every 8-byte word of the description and some of the rest, replaced by odd ones: refused by the file's name, or
    searched without harm.
    """
    rows = 300
    ranks(1).run(build, tmp_path, kind, rows, 0.5)
    file, vectors = tmp_path / FILE, clustered(rows)
    content, refused = file.read_bytes(), 0
    places = [*range(0, min(len(content), 400), 4), *range(400, len(content) - 8, max(8, len(content) // 150))]
    for number, place in enumerate(places):
        odd = (b"\xff" * 8, struct.pack("<q", 1 << 40), struct.pack("<q", 7), bytes(8))[number % 4]
        file.unlink()  # the one before is still mapped
        file.write_bytes(content[:place] + odd + content[place + 8 :])
        try:
            index = VectorIndex(read_kind(file, kind, WIDTH, rows), kind, vectors, 4, 2)
            index.search(torch.from_numpy(vectors[:3]), 5)
        except UserError as error:
            refused += 1
            assert "index" in str(error) and str(error).isprintable()
    assert refused > 10
    for damaged in (content[:-100], content[: len(content) // 2], b""):
        file.unlink()
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{FILE} is not a {kind} index of 300 vectors of 16 numbers"):
            read_kind(file, kind, WIDTH, rows)


@pytest.mark.parametrize(
    ("kind", "ram", "rows", "chosen"),
    [
        ("auto", "", 10**8, "flat"),
        ("auto", "1KB", 5, "flat"),
        ("auto", "2GB", 10**6, "hnsw"),
        ("auto", "1 GB", 10**6, "hnsw_bf16"),
        ("auto", "300MB", 10**6, "ivf_sq8"),
        ("auto", "200M", 10**6, "ivf_rabitq"),
        ("auto", "80MB", 10**6, "ivf_pq"),
        ("sq8", "300MB", 10**6, "sq8"),
    ],
)
def test_the_planner_chooses_what_fits(kind: str, ram: str, rows: int, chosen: str) -> None:
    assert choose_kind(kind, ram, 256 if rows > 5 else 8, rows) == chosen


def test_a_budget_that_nothing_fits_is_told() -> None:
    for kind, ram, message in (
        ("auto", "5MB", r"--index.ram 5MB is too little for 1,000,000 .* ivf_pq, takes 7\d.\d MB"),
        ("hnsw", "1GB", r"--index.kind hnsw takes 1.3 GB .* more than --index.ram 1GB. Take --index.kind hnsw_bf16"),
        ("auto", "much", r"--index.ram is 'much'. Write an amount of memory, as 500MB or 2GB"),
    ):
        with pytest.raises(UserError, match=message):
            choose_kind(kind, ram, 256, 10**6)


@pytest.mark.parametrize("kind", ["ivf_flat", pytest.param("ivf_pq", marks=pytest.mark.full)])
def test_queries_in_the_order_of_their_lists_find_what_faiss_finds(kind: str) -> None:
    rows = 10_000 if kind == "ivf_pq" else 3000
    vectors, queries = clustered(rows), unit(200, 5).numpy()
    bare = KINDS[kind].make(WIDTH, rows)
    bare.train(vectors)
    bare.add(vectors)
    index, passing = VectorIndex(bare, kind, vectors), np.arange(rows) % 3 > 0
    bits = faiss.IDSelectorBitmap(np.packbits(passing, bitorder="little"))
    for effort in (4, 10**6):
        for allowed, selector in ((None, None), (passing, bits)):
            parameters = KINDS[kind].parameters(effort, selector, hasattr(bare, "chain"))
            wanted = bare.search(queries, 20, params=parameters)[1]
            assert (index.candidates(queries, 20, effort, allowed) == wanted).all()
