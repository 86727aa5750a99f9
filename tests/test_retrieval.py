"""Streaming, sharded ranking against a full matrix of exact integers; metrics against numbers computed by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from harness.core.errors import UserError
from harness.evaluate.coded import Coded
from harness.evaluate.metrics import slices, summarise
from harness.evaluate.ranking import Embedded, RelevantRanks, relevant_ranks, top_k
from harness.evaluate.relevance import ID_BITS, Relevance

DIM, QUERIES, DOCUMENTS = 24, 61, 203
# Rows of a shuffled set per rank: uneven, and at each world size above 1 a rank without queries or without documents.
SHARDS = {1: ([61], [203]), 2: ([61, 0], [40, 163]), 3: ([7, 0, 54], [0, 130, 73])}


def everything() -> tuple[Embedded, Embedded]:
    """Queries and documents with distractors, labels that only one side has, and many equal scores."""
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((QUERIES + DOCUMENTS, DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries, documents = vectors[:QUERIES], vectors[QUERIES:]
    documents[50:100] = documents[:50]  # equal vectors: ties that the id has to break
    queries[0], documents[100:110] = 1 / math.sqrt(DIM), rng.permuted(np.tile(documents[100], (10, 1)), axis=1)
    documents[-1] = 0.0
    query_labels, document_labels = rng.integers(-1, 20, QUERIES), rng.integers(-1, 17, DOCUMENTS)
    query_labels[0] = document_labels[103] = 5
    query_ids, document_ids = rng.permutation(10 * QUERIES)[:QUERIES], rng.permutation(2**20)[:DOCUMENTS]
    return (
        Embedded(torch.tensor(queries).float(), torch.tensor(query_ids), torch.tensor(query_labels)),
        Embedded(torch.tensor(documents).float(), torch.tensor(document_ids), torch.tensor(document_labels)),
    )


def own_queries() -> Embedded:
    """61 of the documents as queries that bear their ids: relevant to themselves, some with an equal document of
    another id.
    """
    _, documents = everything()
    rows = torch.tensor([*range(30), *range(50, 75), *range(100, 105), DOCUMENTS - 1])
    return Embedded(documents.vectors[rows], documents.ids[rows], documents.labels[rows])


def judged() -> dict[int, dict[int, float]]:
    """Grades of documents by query for every other query: one names none, some only documents that are not there."""
    rng = np.random.default_rng(4)
    queries, documents = (part.ids.tolist() for part in everything())
    table = {}
    for number, query in enumerate(queries[::2]):
        chosen = rng.choice([*documents, *range(2**21, 2**21 + 9)], 1 + number % 40, replace=False)
        grades = rng.integers(0, 4, len(chosen)) / 2 if number else np.zeros(len(chosen))
        table[query] = dict(zip(chosen.tolist(), grades.tolist(), strict=True))
    table[queries[2]] = {2**21: 1.0}
    return table


def relevance() -> Relevance:
    table = judged()
    queries = sorted(table)
    pairs = sorted((queries.index(q), d, g) for q, found in table.items() for d, g in found.items() if g > 0)
    keys = [(place << ID_BITS) + document for place, document, _ in pairs]
    grades = torch.tensor([grade for _, _, grade in pairs], dtype=torch.float64)
    return Relevance(torch.tensor(queries), torch.tensor(keys), grades)


def shard(part: Embedded, sizes: list[int], rank: int) -> Embedded:
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return Embedded(part.vectors[rows], part.ids[rows], part.labels[rows])


def check(rank: int, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Everything that all world sizes must agree on, as far as one rank knows it."""
    world = 1 if group is None else dist.get_world_size(group)
    queries, documents = (shard(part, sizes, rank) for part, sizes in zip(everything(), SHARDS[world], strict=True))
    nothing = shard(documents, [0], 0)
    results: dict[str, Any] = {"own": queries.ids}
    own = shard(own_queries(), SHARDS[world][0], rank)
    for block, tile in ((1, 7), (16, 64), (1024, 8192)):
        results[f"ranks without self {block}"] = relevant_ranks(
            own, documents, group, query_block=block, document_tile=tile, without_self=True
        )
        results[f"ranks {block}"] = relevant_ranks(queries, documents, group, query_block=block, document_tile=tile)
        results[f"ranks by pairs {block}"] = relevant_ranks(
            queries, documents, group, query_block=block, document_tile=tile, relevance=relevance()
        )
        for k in (1, 9, 500):
            results[f"top {k} {block}"] = top_k(queries, documents, k, group, query_block=block, document_tile=tile)
    results["no gallery"] = relevant_ranks(queries, nothing, group), top_k(queries, nothing, 3, group)
    results["ranks by pairs without gallery"] = relevant_ranks(queries, nothing, group, relevance=relevance())
    results["no queries"] = relevant_ranks(nothing, documents, group), top_k(nothing, documents, 3, group)
    vectors = queries.vectors.clone()
    vectors[:1, 0] = float("nan")  # on those ranks that have a query
    long = replace(documents, vectors=2 * documents.vectors)
    padded = Embedded(*(torch.cat([t, t]) for t in (documents.vectors, documents.ids, documents.labels)))
    for name, ask in {
        "nan": lambda: top_k(replace(queries, vectors=vectors), documents, 3, group),
        "long": lambda: relevant_ranks(queries, long, group),
        "large id": lambda: top_k(queries, replace(documents, ids=documents.ids + 2**38), 3, group),
        "document twice": lambda: relevant_ranks(queries, padded, group),
        "query twice": lambda: relevant_ranks(replace(queries, ids=0 * queries.ids), documents, group),
    }.items():
        try:
            ask()
        except (UserError, ValueError) as error:
            results[name] = f"{type(error).__name__}: {error}"
    return results


def worker(rank: int, folder: Path) -> None:
    """Check three processes, then two of them in a group whose ranks are not the global ones."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    groups = {3: dist.group.WORLD, 2: dist.new_group([1, 2])}
    for world, group in groups.items():
        if (own := dist.get_rank(group)) >= 0:
            torch.save(check(own, group), folder / f"{own}-of-{world}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return check(0, None)


def oracle() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """From the full matrix, in whole numbers: scores, rows in ranked order (both [n, gallery]), relevant ranks."""
    queries, documents = everything()
    whole = [np.rint(part.vectors.double().numpy() * 2.0**26).astype(np.int64) for part in (queries, documents)]
    scores = np.rint((whole[0] @ whole[1].T) / 2.0**28).astype(np.int64)
    ranking = np.stack([np.lexsort((documents.ids.numpy(), -row)) for row in scores])
    labels = documents.labels.numpy()[ranking]
    relevant = (labels == queries.labels.numpy()[:, None]) & (labels >= 0)
    return scores, ranking, [np.flatnonzero(row) for row in relevant]


def test_a_query_does_not_find_itself(single: dict[str, Any]) -> None:
    queries, (_, documents) = own_queries(), everything()
    grid = [np.rint(part.vectors.double().numpy() * 2.0**26).astype(np.int64) for part in (queries, documents)]
    scores = np.rint((grid[0] @ grid[1].T) / 2.0**28).astype(np.int64)
    expected = {}
    for query, label, row in zip(queries.ids.tolist(), queries.labels.tolist(), scores, strict=True):
        ranking = np.lexsort((documents.ids.numpy(), -row))
        ranking = ranking[documents.ids.numpy()[ranking] != query]
        expected[query] = np.flatnonzero((documents.labels.numpy()[ranking] == label) & (label >= 0)).tolist()
    assert any(ranks[:1] == [0] for ranks in expected.values()) and [] in expected.values()
    for block in (1, 16, 1024):
        found = single[f"ranks without self {block}"]
        ranks = [part.tolist() for part in np.split(found.ranks, found.offsets[1:-1])]
        assert dict(zip(found.query_ids.tolist(), ranks, strict=True)) == expected


def same(left: RelevantRanks, right: RelevantRanks) -> bool:
    fields = ("query_ids", "ranks", "offsets", "grades")
    return all(np.array_equal(getattr(left, f), getattr(right, f)) for f in fields)


def test_single_process_equals_full_matrix(single: dict[str, Any]) -> None:
    queries, documents = everything()
    scores, ranking, expected = oracle()
    order = np.argsort(queries.ids.numpy())
    assert len(np.unique(scores[0])) < DOCUMENTS - 50  # the ties are there
    assert 0 in map(len, expected) and max(map(len, expected)) > 5
    for block in (1, 16, 1024):
        found = single[f"ranks {block}"]
        assert np.array_equal(found.query_ids, queries.ids.numpy()[order])
        for row, ranks in zip(order, np.split(found.ranks, found.offsets[1:-1]), strict=True):
            assert np.array_equal(ranks, expected[row])
        for k in (1, 9, 500):
            ids, best = single[f"top {k} {block}"]
            assert ids.shape == best.shape == (QUERIES, min(k, DOCUMENTS))
            assert np.array_equal(ids.numpy(), documents.ids.numpy()[ranking[:, :k]])
            assert np.array_equal(best.numpy() * 2**24, np.take_along_axis(scores, ranking, 1)[:, :k])
    # The grid is fine: scores are off by half of their own step and by the rounding of the vectors at most.
    plain = queries.vectors.double().numpy() @ documents.vectors.double().numpy().T
    assert np.abs(plain - scores / 2**24).max() <= 2**-25 + 2 * math.sqrt(DIM) * 1.01 * 2**-27


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(folder,), nprocs=3)
    return folder


@pytest.mark.parametrize("world", [2, 3])
def test_many_processes_equal_one(world: int, single: dict[str, Any], spawned: Path) -> None:
    many = [torch.load(spawned / f"{rank}-of-{world}.pt", weights_only=False) for rank in range(world)]
    for name, expected in single.items():
        if name.startswith("ranks"):
            assert all(same(results[name], expected) for results in many), name
        elif name.startswith("top"):
            for part, whole in enumerate(expected):
                assert torch.equal(torch.cat([results[name][part] for results in many]), whole), name
    for results in many:
        assert same(results["no gallery"][0], single["no gallery"][0])
        assert results["no gallery"][1][0].shape == (len(results["own"]), 0)
        assert same(results["no queries"][0], single["no queries"][0])
        assert results["no queries"][1][0].shape == (0, 3)
        assert results["nan"] == many[0]["nan"]  # ranks with good input say the same, and none waits for ever
        for name in ("long", "large id", "document twice", "query twice"):
            assert results[name].split(":")[0] == single[name].split(":")[0]


def test_bad_input_is_told(single: dict[str, Any]) -> None:
    assert "UserError: Rank 0 has embeddings that are not finite" in single["nan"]
    assert single["long"] == single["nan"]
    assert single["large id"].startswith("ValueError: rank 0 has query or document ids outside")
    assert single["document twice"].startswith("ValueError: a document id was given twice")
    assert single["query twice"].startswith("ValueError: a query id was given twice")
    with pytest.raises(ValueError, match="expected vectors"):
        Embedded(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))


def test_empty_sides(single: dict[str, Any]) -> None:
    ranks, (ids, scores) = single["no gallery"]
    assert len(ranks.query_ids) == QUERIES and len(ranks.ranks) == 0 and not ranks.offsets.any()
    assert ids.shape == scores.shape == (QUERIES, 0)
    ranks, (ids, _) = single["no queries"]
    assert ranks.query_ids.tolist() == [] and ranks.offsets.tolist() == [0] and ids.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_scores_in_any_order_of_summation(dtype: torch.dtype) -> None:
    """Permuted documents score alike against a constant query, so their ranks are their ids."""
    rng = np.random.default_rng(0)
    document = rng.standard_normal(512)
    rows = rng.permuted(np.tile(document / np.linalg.norm(document), (40, 1)), axis=1)
    documents = Embedded(torch.tensor(rows).to(dtype), torch.tensor(rng.permutation(40)), torch.zeros(40).long())
    query = Embedded(torch.full((1, 512), 512**-0.5).to(dtype), torch.tensor([9]), torch.tensor([0]))
    ids, scores = top_k(query, documents, 40, document_tile=3)
    assert ids.tolist() == [list(range(40))] and len(scores.unique()) == 1
    assert relevant_ranks(query, documents, document_tile=3).ranks.tolist() == list(range(40))


def test_metrics_by_hand() -> None:
    ranks = np.array([0, 2, 1, 12, 3])  # of queries with 2, 2, 0 and 1 relevant documents
    offsets = np.array([0, 2, 4, 4, 5])
    ideal = 1 + 1 / math.log2(3)
    ndcg = [(1 + 1 / 2) / ideal, (1 / math.log2(3)) / ideal, 1 / math.log2(5)]
    precision = [(1 + 2 / 3) / 2, (1 / 2 + 2 / 13) / 2, 1 / 4]
    expected = {
        "queries": 3,
        "queries_without_relevant": 1,
        "recall_at_1": 1 / 3,
        "recall_at_3": 2 / 3,
        "recall_at_4": 1.0,
        "map": sum(precision) / 3,
        "ndcg_at_10": sum(ndcg) / 3,
        "mrr": (1 + 1 / 2 + 1 / 4) / 3,
    }
    assert summarise(ranks, offsets, ks=(1, 3, 4)) == pytest.approx(expected, rel=1e-14)
    groups = {"colour": Coded.of_list(["red", "blue", "red", "blue"]), "": Coded.of_list(["x", "y", "z", "x"])}
    rows = slices(ranks, offsets, groups)
    assert [(row["slice"], row["value"], row["queries"], row["queries_without_relevant"]) for row in rows] == [
        ("colour", "blue", 2, 0),
        ("colour", "red", 1, 1),
        ("", "x", 2, 0),
        ("", "y", 1, 0),
        ("", "z", 0, 1),
    ]
    assert rows[0]["map"] == pytest.approx((precision[1] + precision[2]) / 2)
    assert rows[1]["ndcg_at_10"] == pytest.approx(ndcg[0]) and rows[1]["recall_at_1"] == 1.0
    assert math.isnan(rows[4]["mrr"])
    with pytest.raises(ValueError, match="colour has 1 values for 4 queries"):
        slices(ranks, offsets, {"colour": Coded.of_list(["red"])})


def test_metrics_at_the_edges() -> None:
    perfect = summarise(np.arange(30), np.array([0, 30]))  # more relevant documents than the ideal of nDCG@10 looks at
    assert [perfect[m] for m in ("recall_at_1", "map", "ndcg_at_10", "mrr")] == pytest.approx([1, 1, 1, 1], abs=1e-15)
    late = summarise(np.array([10]), np.array([0, 1]))
    assert (late["recall_at_10"], late["ndcg_at_10"], late["mrr"]) == (0.0, 0.0, 1 / 11)
    for queries in (0, 2):
        none = summarise(np.empty(0, np.int64), np.zeros(queries + 1, np.int64))
        assert (none["queries"], none["queries_without_relevant"]) == (0, queries) and math.isnan(none["map"])
    assert slices(np.empty(0, np.int64), np.zeros(1, np.int64), {"colour": Coded.of_list([])}) == []


def test_metrics_equal_a_plain_loop(single: dict[str, Any]) -> None:
    found = single["ranks 16"]
    runs = [run for run in np.split(found.ranks, found.offsets[1:-1]) if len(run)]
    precision = [np.mean([(run <= rank).sum() / (rank + 1) for rank in run]) for run in runs]

    def gain(run: Any) -> float:
        return sum(1 / math.log2(rank + 2) for rank in run if rank < 10)

    summary = summarise(found.ranks, found.offsets)
    assert summary["queries"] == len(runs) and summary["queries_without_relevant"] == QUERIES - len(runs)
    assert summary["map"] == pytest.approx(np.mean(precision))
    assert summary["ndcg_at_10"] == pytest.approx(np.mean([gain(run) / gain(range(len(run))) for run in runs]))
    assert summary["mrr"] == pytest.approx(np.mean([1 / (1 + run[0]) for run in runs]))
    for k in (1, 5, 10):
        assert summary[f"recall_at_{k}"] == pytest.approx(np.mean([run.min() < k for run in runs]))


def test_pairs_equal_brute_force(single: dict[str, Any]) -> None:
    """Queries that the pairs name have those answers, the others those of their label; metrics in plain float64."""
    queries, documents = everything()
    _, ranking, by_label = oracle()
    table, ids = judged(), documents.ids.numpy()
    expected: dict[int, list[tuple[int, float]]] = {}
    for row, query in enumerate(queries.ids.tolist()):
        grades = (
            [(rank, table[query].get(id, 0.0)) for rank, id in enumerate(ids[ranking[row]])] if query in table else []
        )
        same = [(rank, 1.0) for rank in by_label[row].tolist()]
        expected[query] = [pair for pair in grades if pair[1] > 0] if query in table else same
    wanted = [expected[query] for query in sorted(expected)]
    named = [expected[query] for query in table]
    assert [] in named and max(map(len, named)) > 15 and {g for pairs in named for _, g in pairs} == {0.5, 1.0, 1.5}
    for block in (1, 16, 1024):
        found = single[f"ranks by pairs {block}"]
        parts = zip(
            np.split(found.ranks, found.offsets[1:-1]), np.split(found.grades, found.offsets[1:-1]), strict=True
        )
        assert [[*zip(ranks.tolist(), grades.tolist(), strict=True)] for ranks, grades in parts] == wanted
    nothing = single["ranks by pairs without gallery"]
    assert len(nothing.query_ids) == QUERIES and not nothing.offsets.any() and len(nothing.grades) == 0

    def dcg(pairs: Any) -> float:
        return sum(grade / math.log2(rank + 2) for rank, grade in pairs if rank < 10)

    answered = [pairs for pairs in wanted if pairs]
    best = [enumerate(sorted((grade for _, grade in pairs), reverse=True)) for pairs in answered]
    within = [[rank for rank, _ in pairs] for pairs in answered]
    precision = [np.mean([(place + 1) / (rank + 1) for place, rank in enumerate(ranks)]) for ranks in within]
    summary = summarise(found.ranks, found.offsets, grades=found.grades)
    assert summary == pytest.approx(
        {
            "queries": len(answered),
            "queries_without_relevant": QUERIES - len(answered),
            **{f"recall_at_{k}": np.mean([ranks[0] < k for ranks in within]) for k in (1, 5, 10)},
            "map": np.mean(precision),
            "ndcg_at_10": np.mean([dcg(pairs) / dcg(ideal) for pairs, ideal in zip(answered, best, strict=True)]),
            "mrr": np.mean([1 / (1 + ranks[0]) for ranks in within]),
            "found_at_10": np.mean([np.mean([rank < 10 for rank in ranks]) for ranks in within]),
        },
        rel=1e-12,
    )
    (line,) = slices(found.ranks, found.offsets, {"": Coded.of_list(["x"] * QUERIES)}, grades=found.grades)
    assert {name: line[name] for name in summary} == summary
    # Grades of 1 are no grades.
    plain, ones = summarise(found.ranks, found.offsets), np.ones(len(found.ranks))
    graded = summarise(found.ranks, found.offsets, grades=ones)
    assert graded.keys() - plain.keys() == {"found_at_10"}
    assert {name: graded[name] for name in plain} == pytest.approx(plain, rel=1e-14)
