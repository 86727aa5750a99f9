"""Metrics of an evaluation beside those of trec_eval (pytrec_eval) on random rankings."""

from __future__ import annotations

import numpy as np
import pytest

from harness.evaluate.metrics import summarise

pytrec_eval = pytest.importorskip("pytrec_eval")


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_trec_eval(seed: int, graded: bool) -> None:
    """Ranks decide, without ties: trec_eval orders equal scores by the documents' names, we by their ids."""
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
    measures = {"map", "ndcg_cut.10", "recip_rank", "success.1,5,10", "recall.10"}
    theirs = pytrec_eval.RelevanceEvaluator(right, measures).evaluate(run)
    names = {"map": "map", "ndcg_at_10": "ndcg_cut_10", "mrr": "recip_rank"}
    names |= {f"recall_at_{k}": f"success_{k}" for k in (1, 5, 10)}
    for name, theirs_name in names.items():
        mean = np.mean([figures[theirs_name] for figures in theirs.values()])
        assert ours[name] == pytest.approx(mean, abs=1e-9), name
    if graded:
        found = sum(figures["recall_10"] for figures in theirs.values()) / 80
        assert ours["found_at_10"] == pytest.approx(found, abs=1e-9)
