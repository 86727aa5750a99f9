"""Same-product search: the photo of a product finds the other documents of its class."""

from __future__ import annotations

import numpy as np

from harness.core.errors import UserError
from harness.evaluate.baselines import sampled
from harness.evaluate.failures import find_failures
from harness.evaluate.metrics import slices, summarise
from harness.evaluate.ranking import relevant_ranks
from harness.evaluate.signs import signs
from harness.evaluate.tasks.task import SHOWN, Found, Gallery, Task, TaskInputs, groups_of, ordered, total
from models.method import Method


class SameProductTask(Task):
    """The photo of a product, without its text, finds the other documents of its class: another id of the same title,
    say. Its own is left out.
    """

    name = "same_product"

    def __init__(self, inputs: TaskInputs) -> None:
        documents = inputs.documents
        if np.unique(documents.labels[documents.labels >= 0], return_counts=True)[1].max(initial=0) < 2:
            raise UserError(
                f"no two documents of {documents.catalogue.path} have one class",
                "Same-product search needs such: ingest --class-column",
            )
        self.documents, self.mesh = documents, inputs.mesh
        self.groups = groups_of(documents, inputs.config.slices)
        self.sample = sampled(documents, documents, inputs.config.baselines, without_self=True)

    def run(self, method: Method, gallery: Gallery, seen: str) -> Found:
        """See Task."""
        documents = gallery.whole(seen)
        queries = gallery.own("image")
        ranks = relevant_ranks(queries, documents, self.mesh.dp, without_self=True)
        figures = {**summarise(ranks.ranks, ranks.offsets), "documents": float(total(documents, self.mesh))}
        rows = slices(ranks.ranks, ranks.offsets, ordered(self.groups, self.documents.ids, ranks))
        sides = (self.documents, self.documents)
        failures = find_failures(queries, documents, ranks, self.mesh, gallery.worst, SHOWN, sides, without_self=True)
        return Found(figures, rows, signs=signs(queries, documents, self.sample, self.mesh.dp), failures=failures)
