"""Metrics of an evaluation beside those of trec_eval (pytrec_eval) on random rankings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from harness.evaluate.metrics import summarise
from harness.evaluate.ranking import Embedded, relevant_ranks

pytrec_eval = pytest.importorskip("pytrec_eval")


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_trec_eval(seed: int, graded: bool) -> None:
    """Ranks decide: no two scores are equal."""
    rng, documents = np.random.default_rng(seed), 150
    ranks, offsets, grades, right, run = [], [0], [], {}, {}
    for query in range(80):
        relevant = np.sort(rng.choice(documents, rng.integers(1, 30), replace=False))
        worth = rng.integers(1, 4, len(relevant)) if graded else np.ones(len(relevant), int)
        ranks.append(relevant)
        offsets.append(offsets[-1] + len(relevant))
        grades.append(worth)
        right[f"q{query}"] = {f"d{rank}": int(grade) for rank, grade in zip(relevant, worth, strict=True)}
        run[f"q{query}"] = {f"d{rank}": float(documents - rank) for rank in range(documents)}
    ours = summarise(
        np.concatenate(ranks), np.array(offsets), grades=np.concatenate(grades).astype(float) if graded else None
    )
    theirs = same_figures(ours, right, run)
    if graded:
        found = sum(figures["recall_10"] for figures in theirs.values()) / 80
        assert ours["found_at_10"] == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_tied_scores_are_those_of_trec_eval(seed: int) -> None:
    """Scores of a few whole steps, by the ranking itself. trec_eval orders equal scores by descending name, we by
    ascending id: the names fall as the ids rise.
    """
    rng, documents, queries = np.random.default_rng(seed), 150, 80
    sides = [rng.integers(-2, 3, (count, 4)) / 8 for count in (queries, documents)]
    labels = [rng.integers(0, 12, count) for count in (queries, documents)]
    scores = sides[0] @ sides[1].T
    assert all(len(np.unique(row)) < documents / 3 for row in scores)
    found = relevant_ranks(
        *(
            Embedded(torch.tensor(side, dtype=torch.float32), torch.arange(len(side)), torch.tensor(label))
            for side, label in zip(sides, labels, strict=True)
        )
    )
    right = {
        f"q{query}": {f"d{999 - document}": 1 for document in np.flatnonzero(labels[1] == label)}
        for query, label in enumerate(labels[0])
    }
    run = {
        f"q{query}": {f"d{999 - document}": float(score) for document, score in enumerate(row)}
        for query, row in enumerate(scores)
    }
    same_figures(summarise(found.ranks, found.offsets), right, run)


def same_figures(
    ours: Mapping[str, Any], right: dict[str, dict[str, int]], run: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Asserts that `ours` are trec_eval's; returns these by query."""
    measures = {"map", "ndcg_cut.10", "recip_rank", "success.1,5,10", "recall.10"}
    theirs: dict[str, dict[str, float]] = pytrec_eval.RelevanceEvaluator(right, measures).evaluate(run)
    names = {"map": "map", "ndcg_at_10": "ndcg_cut_10", "mrr": "recip_rank"}
    names |= {f"recall_at_{k}": f"success_{k}" for k in (1, 5, 10)}
    for name, theirs_name in names.items():
        mean = np.mean([figures[theirs_name] for figures in theirs.values()])
        assert ours[name] == pytest.approx(mean, abs=1e-9), name
    return theirs
