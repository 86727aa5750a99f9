"""Failures of an evaluation: the worst queries with what they found, products most confused, scores of right and wrong
answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from harness.core.mesh import Mesh
from harness.core.waiting import gather_objects
from harness.evaluate.embed import Side
from harness.evaluate.ranking import Embedded, RelevantRanks, top_k
from harness.evaluate.relevance import Relevance
from models.comm import gather_to_first

BINS, PAIRS = 24, 12  # bars of a histogram, and confused pairs that are kept


@dataclass(frozen=True)
class Miss:
    """A query that found a wrong document first.

    query: its id; rank: 0-based, of its first right document; answer: id of a right document, None where only the task
    knows; best: documents found as (id, score, right), the best first.
    """

    query: int
    rank: int
    answer: int | None
    best: list[tuple[int, float, bool]]


@dataclass(frozen=True)
class Confusion:
    """Queries of one label that found a document of another one first.

    asked, found: labels; queries: their number; of: queries of the label asked; query, document: ids of an example.
    """

    asked: int
    found: int
    queries: int
    of: int
    query: int
    document: int


@dataclass(frozen=True)
class Failures:
    """Failures of one task.

    wrong, answered: queries that found a wrong document first, and those that have a right one; worst: the worst
    queries, at most as many as were asked for; confused: the commonest pairs of labels; edges: of the histogram of the
    best document's score, BINS + 1; right_scores, wrong_scores: queries in each bar.
    """

    wrong: int
    answered: int
    worst: list[Miss]
    edges: list[float]
    right_scores: list[int]
    wrong_scores: list[int]
    confused: list[Confusion] = field(default_factory=list)


def find_failures(
    queries: Embedded,
    documents: Embedded,
    ranks: RelevantRanks,
    mesh: Mesh,
    count: int,
    depth: int,
    sides: tuple[Side, Side] | None = None,
    without_self: bool = False,
    relevance: Relevance | None = None,
) -> Failures | None:
    """On the first rank of dp, None on the others; collective. What gathers is three numbers a query, and the rows of
    the worst queries.

    Args:
        queries: this rank's.
        documents: this rank's.
        ranks: of all queries, by which a found document is right or wrong.
        mesh: the ranks.
        count: worst queries that are kept; 0 finds nothing.
        depth: documents of each.
        sides: all queries and the catalogue's documents, whose labels tell products apart.
        without_self, relevance: as in `relevant_ranks`.
    """
    if not count:
        return None
    first = ranks.first
    missed = np.flatnonzero(first > 0)
    worst = missed[np.argsort(-first[missed], kind="stable")[:count]]
    mine = torch.isin(queries.ids, torch.from_numpy(ranks.query_ids[worst]).to(queries.ids.device))
    few = Embedded(queries.vectors[mine], queries.ids[mine], queries.labels[mine])
    rows = gather_objects(_rows(few, *_best(few, documents, depth, mesh, without_self)), mesh.dp)
    best, score = _best(queries, documents, 1, mesh, without_self)
    table = gather_to_first(torch.stack([queries.ids, best[:, 0]], 1), mesh.dp).cpu().numpy()
    scores = gather_to_first(score[:, 0].contiguous(), mesh.dp).cpu().numpy()
    if mesh.dp.rank() != 0:
        return None
    order = np.argsort(table[:, 0])
    asked, found, scores = table[order, 0], table[order, 1], scores[order]
    answered, right = first >= 0, first == 0
    ends = (float(scores.min(initial=0.0)), float(scores.max(initial=1.0)))
    bars = [np.histogram(scores[answered & which], BINS, ends) for which in (right, ~right)]
    known = {query: best for part in rows for query, best in part}
    misses = []
    for place in worst:
        held = set(ranks.ranks[ranks.offsets[place] : ranks.offsets[place + 1]][:depth].tolist())
        query = int(ranks.query_ids[place])
        shown = [(i, s, n in held) for n, (i, s) in enumerate(known[query])]
        misses.append(Miss(query, int(first[place]), _answer(query, sides, relevance), shown))
    return Failures(
        wrong=len(missed),
        answered=int(answered.sum()),
        worst=misses,
        edges=bars[0][1].tolist(),
        right_scores=bars[0][0].tolist(),
        wrong_scores=bars[1][0].tolist(),
        confused=[] if sides is None else _confused(asked[missed], found[missed], *sides),
    )


def _best(queries: Embedded, documents: Embedded, depth: int, mesh: Mesh, without_self: bool) -> tuple[Tensor, Tensor]:
    """Ids and scores of the best documents, [n, depth] at most; collective."""
    ids, scores = top_k(queries, documents, depth + without_self, mesh.dp)
    if without_self:  # the own document goes behind the others, which keep their order
        order = (ids == queries.ids[:, None]).to(torch.uint8).argsort(stable=True, dim=1)[:, :depth]
        ids, scores = ids.gather(1, order), scores.gather(1, order)
    return ids, scores


def _rows(queries: Embedded, ids: Tensor, scores: Tensor) -> list[tuple[int, list[tuple[int, float]]]]:
    pairs = zip(ids.tolist(), scores.tolist(), strict=True)
    found = [list(zip(*row, strict=True)) for row in pairs]
    return list(zip(queries.ids.tolist(), found, strict=True))


def _answer(query: int, sides: tuple[Side, Side] | None, relevance: Relevance | None) -> int | None:
    """The first document that `relevance` names, or else the first other one of the query's label."""
    if relevance is not None and relevance.counts(asked := torch.tensor([query])).item():
        return int(relevance.answers(asked)[1][0])
    if sides is None:
        return None
    queries, documents = sides
    label = queries.labels[queries.rows_of(np.array([query]))[0]]
    same = documents.ids[(documents.labels == label) & (documents.ids != query)]
    return int(same[0]) if label >= 0 and len(same) else None


def _confused(asked: np.ndarray, found: np.ndarray, queries: Side, documents: Side) -> list[Confusion]:
    """The commonest (label asked, label found) of wrong answers, ids [m] each."""
    rows, places = queries.rows_of(asked), documents.rows_of(found)
    labels = np.stack([queries.labels[rows], documents.labels[places]], 1)
    known = (places >= 0) & (labels >= 0).all(1) & (labels[:, 0] != labels[:, 1])  # distractors have no label
    pairs, example, counts = np.unique(labels[known], axis=0, return_index=True, return_counts=True)
    commonest = np.argsort(-counts, kind="stable")[:PAIRS]
    return [
        Confusion(
            asked=int(pairs[n, 0]),
            found=int(pairs[n, 1]),
            queries=int(counts[n]),
            of=int((queries.labels == pairs[n, 0]).sum()),
            query=int(asked[known][example[n]]),
            document=int(found[known][example[n]]),
        )
        for n in commonest
    ]
