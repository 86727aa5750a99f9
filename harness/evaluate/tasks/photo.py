"""Photo search: query photos find the documents of their class, or those that the catalogue's pairs name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from harness.evaluate.baselines import sampled
from harness.evaluate.coded import Coded
from harness.evaluate.embed import ClassKeys
from harness.evaluate.failures import find_failures
from harness.evaluate.metrics import slices, summarise
from harness.evaluate.ranking import Embedded, RelevantRanks, relevant_ranks, top_k
from harness.evaluate.relevance import Relevance
from harness.evaluate.signs import signs, trained_and_new
from harness.evaluate.tasks.task import (
    SHOWN,
    Found,
    Gallery,
    Shown,
    Task,
    TaskInputs,
    gathered,
    groups_of,
    ordered,
    spread,
    total,
)
from models.method import Method

KINDS = ("head", "never trained", "several", "tail")
HEAD, NEVER, SEVERAL, TAIL = range(4)


class PhotoTask(Task):
    """Query photos find the documents of their class; the slice `class` tells trained classes from others.

    A query that the catalogue's pairs name finds the documents that they name; without a class of its own it is
    `several` in that slice.
    """

    name = "photo"

    def __init__(self, inputs: TaskInputs) -> None:
        config, self.documents = inputs.config, inputs.documents
        self.queries, self.panel = inputs.side("query", config.split), config.panel
        self.embedder, self.mesh = inputs.embedder, inputs.mesh
        self.groups = groups_of(self.queries, config.slices)
        self.relevance = Relevance.of(self.queries.catalogue.path, self.queries.sample_ids)
        named = np.zeros(len(self.queries.ids), bool)
        if self.relevance is not None:
            named = self.relevance.names(torch.from_numpy(self.queries.ids)).numpy()
        if inputs.classes is not None:
            kinds = head_and_tail(inputs.classes, inputs.keys)[self.queries.labels]
            kinds[named & (self.queries.labels == -1)] = SEVERAL
            self.groups["class"] = Coded(kinds, pa.array(KINDS, pa.large_string()))
        self.sample = sampled(self.queries.select(~named), self.documents, config.baselines)  # labels judge them

    def run(self, method: Method, gallery: Gallery, seen: str) -> Found:
        """See Task."""
        documents, queries = gallery.whole(seen), self.embedder.embed(method, self.queries)
        ranks, figures, rows = self.measure(queries, documents)
        shown = spread(queries, self.queries.ids, self.panel)
        best, _ = top_k(shown, documents, SHOWN, self.mesh.dp)
        right = self.right(shown, best)
        own: list[Shown] = list(zip(shown.ids.tolist(), best.tolist(), right.tolist(), strict=True))
        figures["documents"] = float(total(documents, self.mesh))
        found = signs(queries, documents, self.sample, self.mesh.dp)
        found |= trained_and_new(rows) if found else {}
        sides = (self.queries, self.documents)
        failures = find_failures(
            queries, documents, ranks, self.mesh, gallery.worst, SHOWN, sides, relevance=self.relevance
        )
        return Found(figures, rows, gathered(own, self.mesh), found, failures)

    def measure(
        self, queries: Embedded, documents: Embedded
    ) -> tuple[RelevantRanks, dict[str, float], list[dict[str, Any]]]:
        """Ranks, figures and slices of the task's queries among documents; collective."""
        ranks = relevant_ranks(queries, documents, self.mesh.dp, relevance=self.relevance)
        groups = ordered(self.groups, self.queries.ids, ranks)
        rows = slices(ranks.ranks, ranks.offsets, groups, grades=ranks.grades)
        return ranks, summarise(ranks.ranks, ranks.offsets, grades=ranks.grades), rows

    def right(self, queries: Embedded, best: Tensor) -> np.ndarray:
        """bool [n, k]: whether documents `best` (ids [n, k]) are relevant to their queries."""
        place, wanted = self.documents.rows_of(best.cpu().numpy()), queries.labels.cpu().numpy()[:, None]
        right = (place >= 0) & (self.documents.labels[place] == wanted) & (wanted != -1)
        if self.relevance is None:
            return right
        ids = queries.ids.cpu()[:, None]
        named, grades = self.relevance.names(ids).numpy(), self.relevance.grades_of(ids, best.cpu()).numpy()
        return np.where(named, grades > 0, right)


def never_trained(task: PhotoTask, ranks: RelevantRanks) -> np.ndarray:
    """bool [n]: whether the class of each of the queries that have ranks was never trained on."""
    groups = ordered(task.groups, task.queries.ids, ranks)
    return groups["class"].codes == NEVER if "class" in groups else np.zeros(len(ranks.query_ids), bool)


def head_and_tail(classes: Path, keys: ClassKeys) -> np.ndarray:
    """Place in KINDS of each number of `keys`, and at last of -1: int32, from a run's classes.parquet.

    Classes made of clicks have keys of their own and name the catalogue's keys of their documents; a key in several is
    HEAD where one of them is.
    """
    own = "catalogue_keys" if "catalogue_keys" in pq.read_schema(classes).names else "class_key"
    table = pq.read_table(classes, columns=[own, "tail"])
    names, tail = table[own], table["tail"].to_numpy()
    if own == "catalogue_keys":
        tail, names = tail[pc.list_parent_indices(names).to_numpy()], pc.list_flatten(names)
    number = pc.index_in(names.cast(pa.large_string()), value_set=keys.keys).fill_null(-1).to_numpy()
    kinds = np.full(len(keys.keys) + 1, NEVER, np.int32)
    kinds[number[tail]] = TAIL
    kinds[number[~tail]] = HEAD
    kinds[-1] = NEVER
    return kinds
