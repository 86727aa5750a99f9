"""Signs of a search that does not work: documents of different classes that have almost the same vector, queries
that all find the same documents, products never trained on that are hardly found, a recall below a baseline. A warning
for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from harness.evaluate.baselines import Baselines, Sample
from harness.evaluate.metrics import summarise
from harness.evaluate.ranking import VECTOR_BITS, Embedded, relevant_ranks, top_k
from models.comm import gather_shards

# Two photos of one product are seldom as close as this, in any trained space; documents that only their equal texts
# describe are, whatever their pictures.
ALIKE = 0.99
MOST_ALIKE = 0.5  # share of the documents
# CLIP's images lie in a narrow cone of mean cosine 0.5 to 0.6 (Liang et al. 2022) and are told apart well.
HIGHEST_COSINE = 0.9
# The demo's recipe finds products never trained on 0.7 times as often as trained ones; one that reads the documents by
# their text only, 0.01 times.
LEAST_NEW = 0.5
FEWEST_PHOTOS = 10  # of either kind
FEWEST_FOUND = 0.1  # different documents found first, as a share of the classes asked for


def signs(
    queries: Embedded, documents: Embedded, sample: Sample | None, group: ProcessGroup | None
) -> dict[str, float]:
    """Figures of a sample of an evaluation; collective, and the same on every rank.

    Args:
        queries: this rank's share of all queries.
        documents: this rank's share of the whole gallery.
        sample: queries and documents that are looked at; None: nothing is.
        group: the ranks.

    Returns:
        sample_recall_at_1: of the sample's queries against its documents.
        asked, found: classes of the sample's queries, and different documents of the gallery that they find first.
        document_cosine, documents_alike: mean cosine between the sample's documents of different classes, and the share
            of them whose nearest of another class is at ALIKE or above; left out below two classes.
    """
    if sample is None:
        return {}
    asked, some = _those(queries, sample.queries.ids), _those(documents, sample.documents.ids)
    ranks = relevant_ranks(asked, some, group, without_self=sample.without_self)
    best, _ = top_k(asked, documents, 2 if sample.without_self else 1, group)
    if sample.without_self:
        best = torch.where(best[:, 0] == asked.ids, best[:, 1], best[:, 0])
    figures = {
        "sample_recall_at_1": summarise(ranks.ranks, ranks.offsets, (1,))["recall_at_1"],
        "asked": float(len(np.unique(sample.queries.labels))),
        "found": float(len(gather_shards(best, group).unique())),
    }
    labels, first = np.unique(sample.documents.labels, return_index=True)
    apart = _those(some, sample.documents.ids[first[labels >= 0]])
    # On ranking's grid every sum is exact, in any order of the ranks.
    grid = (apart.vectors.double() * 2**VECTOR_BITS).round()
    _, scores = top_k(apart, apart, 2, group)  # itself and the nearest other, in either order where they are equal
    alike = (scores[:, -1] >= ALIKE).sum().double()
    sums = torch.cat([grid.sum(0), torch.stack([alike, torch.full_like(alike, len(grid))])])
    if group is not None:
        dist.all_reduce(sums, group=group)
    *_, close, count = sums.tolist()
    if count > 1:
        total = float((sums[:-2] / 2**VECTOR_BITS).square().sum())  # of all pairs; a vector with itself is 1
        figures["document_cosine"] = (total - count) / (count * (count - 1))
        figures["documents_alike"] = close / count
    return figures


def trained_and_new(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """recall_at_1_trained and recall_at_1_new: Recall@1 of the photos of trained products, and of those of others, from
    the rows of the slice `class`; {} where either are few.
    """
    rows = [row for row in rows if row["slice"] == "class" and row["queries"]]
    counts = {row["value"]: (row["queries"], row["recall_at_1"]) for row in rows}
    new, of_new = counts.get("never trained", (0, 0.0))
    trained = [counts[name] for name in ("head", "tail") if name in counts]
    total = sum(queries for queries, _ in trained)
    if min(new, total) < FEWEST_PHOTOS:
        return {}
    mean = sum(queries * recall for queries, recall in trained) / total
    return {"recall_at_1_trained": mean, "recall_at_1_new": of_new}


def _those(own: Embedded, ids: np.ndarray) -> Embedded:
    """Those of this rank that have one of the ids."""
    mine: Tensor = torch.isin(own.ids, torch.from_numpy(ids).to(own.ids.device))
    return Embedded(own.vectors[mine], own.ids[mine], own.labels[mine])


def warnings(found: Mapping[str, float], baselines: Baselines | None, split: str) -> list[str]:
    """A line for each sign of `signs` that is there, with what can be done."""
    lines, recall = [], found["sample_recall_at_1"]
    better = {name: value for name, value in (baselines.recall if baselines else {}).items() if value > recall}
    if baselines is not None and better:
        named = " and ".join(f"{name} ({value:.3f})" for name, value in better.items())
        error = max((value * (1 - value) / baselines.queries) ** 0.5 for value in (recall, *better.values()))
        lines.append(
            f"{split} recall@1 {recall:.3f} is below {named}, standard error {error:.3f} by {baselines.queries:,} "
            f"{baselines.asked}: train for more steps, or start from imported weights "
            "(train.init_from, docs/weights.md)"
        )
    if found.get("documents_alike", 0) > MOST_ALIKE or found.get("document_cosine", 0) > HIGHEST_COSINE:
        lines.append(
            f"{found['documents_alike']:.0%} of the documents have almost the same vector as one of another class "
            f"(mean cosine {found['document_cosine']:.2f}): their pictures hardly count, or nothing was learned. Where "
            "titles are equal, let text count less (docs/recipes.md)"
        )
    new, trained = (found.get(f"recall_at_1_{kind}", 0.0) for kind in ("new", "trained"))
    if new < LEAST_NEW * trained:
        lines.append(
            f"{split} recall@1 is {new:.3f} for products never trained on and {trained:.3f} for trained ones: new "
            "products will hardly be found. Compare the figures of the images alone, which `export --view image` "
            "takes, or let text count less (model.text_dropout, model.fusion_weights; docs/recipes.md)"
        )
    if found["asked"] > 1 and found["found"] <= max(1, FEWEST_FOUND * found["asked"]):
        lines.append(
            f"queries of {found['asked']:.0f} classes find only {found['found']:.0f} different document(s) first: "
            "compare optimizer.lr and data.preprocess with a shipped recipe (docs/recipes.md)"
        )
    return [f"warning: {line}" for line in lines]
