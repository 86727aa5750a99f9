"""Retrieval metrics from the ranks of the relevant documents.

Input everywhere: `ranks` and `offsets` as in `harness.evaluate.ranking.RelevantRanks`, which all processes hold alike,
in query-id order: they compute the same numbers to the last digit, and nothing is left to reduce. A query without any
relevant document has no defined metric: it is left out of the means and counted.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.evaluate.coded import Coded

NDCG_DEPTH = 10


def summarise(
    ranks: np.ndarray, offsets: np.ndarray, ks: Sequence[int] = (1, 5, 10), grades: np.ndarray | None = None
) -> dict[str, float]:
    """Average the metrics over the queries.

    Args:
        ranks: int64, 0-based ranks of relevant documents in the full ranking, ascending within a query.
        offsets: [n + 1] int64: query i has `ranks[offsets[i]:offsets[i + 1]]`.
        ks: depths K of Recall@K.
        grades: float64, above 0, of the document at each of `ranks`; None: all are equal.

    Returns:
        `queries` (averaged), `queries_without_relevant` (left out), and the means, NaN over no query:

        recall_at_K: share of queries with at least one relevant document in the top K, the Recall@K of retrieval with
            known classes (Jegou et al. 2011; Oh Song et al. 2016). It is not the share of relevant documents found.
        map: mean of the average precision over the full ranking; every relevant document counts alike.
        ndcg_at_10: gain 1, or the grade; discount 1 / log2(rank + 2); the ideal has the relevant documents on top, the
            highest grades first (Jarvelin and Kekalainen 2002).
        found_at_10: share of the relevant documents that are in the top 10; only with grades.
        mrr: mean of 1 / (1 + rank of the first relevant document).
    """
    answered = np.diff(offsets) > 0
    return _row(_per_query(ranks, offsets, ks, grades), answered)


def slices(
    ranks: np.ndarray,
    offsets: np.ndarray,
    groups: dict[str, Coded],
    ks: Sequence[int] = (1, 5, 10),
    grades: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Average the metrics over the queries of each attribute value.

    Args:
        ranks: as in `summarise`.
        offsets: as in `summarise`.
        groups: attribute name -> [n] the value that each query has, in the order of `offsets`; none of them null.
        ks: depths K of Recall@K.
        grades: as in `summarise`.

    Returns:
        A row for each value, in the order of `groups`, then of the values: `slice` (the attribute), `value`, and the
        figures of `summarise`.

    Raises:
        ValueError: an attribute has not one value for each query.
    """
    metrics, answered = _per_query(ranks, offsets, ks, grades), np.diff(offsets) > 0
    rows: list[dict[str, Any]] = []
    for name, column in groups.items():
        if len(column.codes) != len(answered):
            raise ValueError(f"attribute {name} has {len(column.codes)} values for {len(answered)} queries")
        distinct, inverse, sizes = np.unique(column.codes, return_inverse=True, return_counts=True)
        members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(sizes)[:-1])
        for value, queries in zip(distinct, members, strict=False):  # no value at all still splits into one part
            part = {metric: numbers[queries] for metric, numbers in metrics.items()}
            rows.append({"slice": name, "value": column.values[int(value)].as_py(), **_row(part, answered[queries])})
    return rows


def _per_query(
    ranks: np.ndarray, offsets: np.ndarray, ks: Sequence[int], grades: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Return metric name -> [n] float64, NaN where a query has no relevant document."""
    relevant = np.diff(offsets)
    answered = relevant > 0
    starts = offsets[:-1][answered]
    first = ranks[starts]
    nth = np.arange(len(ranks)) - np.repeat(offsets[:-1], relevant)
    discount = 1.0 / np.log2(np.arange(NDCG_DEPTH) + 2.0)
    gain = np.where(ranks < NDCG_DEPTH, discount[np.minimum(ranks, NDCG_DEPTH - 1)], 0.0)
    ideal = np.cumsum(discount)[np.minimum(relevant[answered], NDCG_DEPTH) - 1]
    if grades is not None:
        gain = gain * grades
        best_first = grades[np.lexsort((-grades, np.repeat(np.arange(len(relevant)), relevant)))]
        ideal = _sums(np.where(nth < NDCG_DEPTH, discount[np.minimum(nth, NDCG_DEPTH - 1)] * best_first, 0.0), starts)
    found: dict[str, np.ndarray] = {f"recall_at_{k}": first < k for k in ks}
    found["map"] = _sums((nth + 1.0) / (ranks + 1.0), starts) / relevant[answered]
    found[f"ndcg_at_{NDCG_DEPTH}"] = _sums(gain, starts) / ideal
    found["mrr"] = 1.0 / (first + 1.0)
    if grades is not None:
        found[f"found_at_{NDCG_DEPTH}"] = _sums((ranks < NDCG_DEPTH) * 1.0, starts) / relevant[answered]
    metrics = {}
    for name, values in found.items():
        metrics[name] = np.full(len(relevant), np.nan)
        metrics[name][answered] = values
    return metrics


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sum each non-empty run of values: `starts` ascends strictly, the last run goes to the end."""
    return np.add.reduceat(values, starts) if len(starts) else np.empty(0)


def _row(metrics: dict[str, np.ndarray], answered: np.ndarray) -> dict[str, float]:
    queries = int(answered.sum())
    row: dict[str, float] = {"queries": queries, "queries_without_relevant": len(answered) - queries}
    for name, values in metrics.items():
        row[name] = float(values[answered].mean()) if queries else float("nan")
    return row
