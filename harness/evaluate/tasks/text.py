"""Text search: texts made of attributes find the documents that have them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from harness.core.evenly import evenly
from harness.evaluate.attribute_queries import DEPTH, GRADED, AttributeQueries, without_words
from harness.evaluate.baselines import sampled
from harness.evaluate.embed import Side
from harness.evaluate.failures import find_failures
from harness.evaluate.metrics import summarise
from harness.evaluate.ranking import Embedded, relevant_ranks, top_k
from harness.evaluate.signs import signs
from harness.evaluate.tasks.task import (
    SHOWN,
    CommonConfig,
    Found,
    Gallery,
    Shown,
    Task,
    TaskInputs,
    gathered,
    joined,
    total,
)
from models.comm import gather_shards
from models.method import Method


@dataclass(frozen=True, kw_only=True)
class TextTaskConfig(CommonConfig):
    """Keys of the task text.

    Args:
        query_attributes: attributes that the queries are made of.
        bare_titles: attributes whose values' words are also tried without, in the documents' titles.
    """

    query_attributes: tuple[str, ...] = ()
    bare_titles: tuple[str, ...] = ()


class TextTask(Task):
    """Texts made of attributes find the documents that have them.

    Also asked of titles without the words of bare_titles' values, and, of a method that has them, the mean modal
    weights by category.
    """

    name = "text"
    config = TextTaskConfig
    attributes = ("query_attributes", "bare_titles", "category")

    def __init__(self, inputs: TaskInputs) -> None:
        config: TextTaskConfig = inputs.config
        self.queries = AttributeQueries(inputs.documents, config.query_attributes)
        self.documents, self.category = inputs.documents, config.category
        self.embedder, self.mesh = inputs.embedder, inputs.mesh
        self.bare = without_words(self.documents, config.bare_titles) if config.bare_titles else None
        count = len(self.queries.texts)
        places = np.arange(count)
        asked = Side(self.documents.catalogue, "text", places, places, places, {})
        judged = replace(self.documents, labels=self.queries.labels_of(self.documents.ids))
        self.sample = sampled(asked, judged, config.baselines, self.queries.texts)
        self.shown = set(evenly(count, config.panel).tolist())

    @staticmethod
    def errors(config: TextTaskConfig) -> list[str]:
        """See Task."""
        if config.query_attributes:
            return []
        return ["evaluation.query_attributes is empty: the task text makes its queries of attributes"]

    def run(self, method: Method, gallery: Gallery, seen: str) -> Found:
        """See Task."""
        texts = self.embedder.embed_texts(method, self.queries.texts)
        found = self._search(texts, gallery.whole(seen), gallery.worst)
        figures, rows = dict(found.figures), list(found.rows)
        if seen == "both":
            if self.bare is not None:
                stripped = joined([self.embedder.embed(method, self.bare, seen), *gallery.others(seen)])
                figures |= {f"bare_{name}": value for name, value in self._search(texts, stripped).figures.items()}
            if method.parts:
                rows += self._weights(method)
                figures |= rows[-1]["weights"]
        return replace(found, figures=figures, rows=rows)

    def _search(self, texts: Embedded, documents: Embedded, worst: int = 0) -> Found:
        queries = self.queries
        labels = torch.from_numpy(queries.labels_of(documents.ids.cpu().numpy())).to(documents.ids.device)
        documents = replace(documents, labels=labels)
        ranks = relevant_ranks(texts, documents, self.mesh.dp)
        best, _ = top_k(texts, documents, DEPTH, self.mesh.dp)
        own, top = texts.ids.cpu().numpy(), best.cpu().numpy()
        right = queries.grades(own, top[:, :SHOWN]) == 0
        panel: list[Shown] = [
            (queries.texts[query], top[row, :SHOWN].tolist(), right[row].tolist())
            for row, query in enumerate(own.tolist())
            if query in self.shown
        ]
        graded = torch.from_numpy(queries.graded_ndcg(own, top)).to(best.device)
        figures = summarise(ranks.ranks, ranks.offsets) | {
            GRADED: float(gather_shards(graded, self.mesh.dp).cpu().numpy().mean()),
            "documents": float(total(documents, self.mesh)),
        }
        failures = find_failures(texts, documents, ranks, self.mesh, worst, SHOWN)
        found = signs(texts, documents, self.sample, self.mesh.dp)
        return Found(figures, [], gathered(panel, self.mesh), found, failures)

    def _weights(self, method: Method) -> list[dict[str, Any]]:
        """Mean weights of the documents' parts by category, and of all documents last."""
        names = [f"weight_{name}" for name in method.parts]
        own, _ = self.embedder.apply(method, self.documents, lambda b: method.explain_document(b).weights, len(names))
        table = gather_shards(own, self.mesh.dp).double().cpu().numpy()
        groups = {}
        if self.category:
            values = self.documents.columns[self.category].used()
            number = self.documents.columns[self.category].in_list(values)
            groups = {value: number == place for place, value in enumerate(values)}
        groups["all"] = np.ones(len(table), bool)
        good = ~self.embedder.missing(self.documents)
        return [
            {
                "slice": self.category or "all",
                "value": value,
                "documents": int((rows & good).sum()),
                "weights": dict(zip(names, table[rows & good].mean(0).tolist(), strict=True)),
            }
            for value, rows in groups.items()
        ]
