"""Evaluation tasks: photo -> document, text -> document, same product. Category prediction is in
harness/evaluate/category.py.

A task is prepared once, where it refuses what it cannot use, and run at any step. Documents are embedded once for all
tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from harness.core.errors import UserError
from harness.core.mesh import Mesh
from harness.evaluate.attribute_queries import DEPTH, GRADED, AttributeQueries, without_words
from harness.evaluate.coded import Coded
from harness.evaluate.embed import ClassKeys, Embedder, Side
from harness.evaluate.metrics import slices, summarise
from harness.evaluate.ranking import Embedded, RelevantRanks, gather_rows, relevant_ranks, top_k
from models.batch import Batch
from models.registry import Method

SHOWN = 5  # documents in a row of the panel
KINDS = pa.array(["head", "never trained", "tail"], pa.large_string())
HEAD, NEVER, TAIL = range(3)

Row = TypeVar("Row")
# A query (a sample id, or a text), its best documents, and whether each is relevant.
Shown = tuple[int | str, list[int], list[bool]]


@dataclass(frozen=True)
class Found:
    """Result of a task, the same on every rank: metric -> value, a row for each slice, and rows of the panel."""

    figures: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    panel: list[Shown] = field(default_factory=list)


class Task(Protocol):
    """A task; `seen` is what the method sees of the documents, one of its views."""

    name: str

    def run(self, method: Method, gallery: Gallery, seen: str) -> Found:
        """Embeds the queries, ranks and measures; collective."""
        ...


@runtime_checkable
class Weighs(Protocol):
    """A method that gives title, image and their fusion weights of the document's own."""

    def modal_weights(self, batch: Batch) -> Tensor:
        """[n, 3]."""
        ...


class Gallery:
    """The documents of one evaluation, embedded when first asked for.

    Args:
        embedder: embeds them.
        sides: the catalogue's own documents, then those of other catalogues.
        method: as it is.
    """

    def __init__(self, embedder: Embedder, sides: Sequence[Side], method: Method) -> None:
        self.embedder, self.sides, self.method = embedder, sides, method
        self._known: dict[tuple[int, str], Embedded] = {}

    def own(self, seen: str = "both") -> Embedded:
        """This rank's share of the catalogue's own documents."""
        return self._side(0, seen)

    def whole(self, seen: str = "both") -> Embedded:
        """This rank's share of all documents."""
        return joined([self.own(seen), *self.others(seen)])

    def others(self, seen: str = "both") -> list[Embedded]:
        """This rank's share of each other catalogue's documents."""
        return [self._side(number, seen) for number in range(1, len(self.sides))]

    def _side(self, number: int, seen: str) -> Embedded:
        if (number, seen) not in self._known:
            self._known[number, seen] = self.embedder.embed(self.method, self.sides[number], seen)
        return self._known[number, seen]


class PhotoTask:
    """Query photos find the documents of their class.

    Args:
        queries: the photos.
        documents: the catalogue's own documents, whose labels are classes.
        names: attributes whose values get figures of their own.
        kinds: of each class label, as `head_and_tail` gives them, for the slice `class`.
        panel: rows of the panel.
        embedder: embeds the queries.
        mesh: the ranks.
    """

    name = "photo"

    def __init__(
        self,
        queries: Side,
        documents: Side,
        names: Sequence[str],
        kinds: np.ndarray,
        panel: int,
        embedder: Embedder,
        mesh: Mesh,
    ) -> None:
        self.queries, self.documents, self.panel, self.embedder, self.mesh = queries, documents, panel, embedder, mesh
        self.groups = _groups(queries, names)
        self.groups["class"] = Coded(kinds[queries.labels], KINDS)

    def run(self, method: Method, gallery: Gallery, seen: str) -> Found:
        """See Task."""
        documents, queries = gallery.whole(seen), self.embedder.embed(method, self.queries)
        ranks = relevant_ranks(queries, documents, self.mesh.dp)
        shown = spread(queries, self.queries.ids, self.panel)
        best, _ = top_k(shown, documents, SHOWN, self.mesh.dp)
        place, wanted = self.documents.rows_of(best.cpu().numpy()), shown.labels.cpu().numpy()[:, None]
        right = (place >= 0) & (self.documents.labels[place] == wanted) & (wanted != -1)
        own: list[Shown] = list(zip(shown.ids.tolist(), best.tolist(), right.tolist(), strict=True))
        figures = {**summarise(ranks.ranks, ranks.offsets), "documents": float(_total(documents, self.mesh))}
        rows = slices(ranks.ranks, ranks.offsets, _ordered(self.groups, self.queries.ids, ranks))
        return Found(figures, rows, gathered(own, self.mesh))


class SameProductTask:
    """The photo of a product, without its text, finds the other documents of its class: another id of the same title,
    say. Its own is left out.

    Args:
        documents: the catalogue's own documents, whose labels are classes.
        names: attributes whose values get figures of their own.
        mesh: the ranks.
    """

    name = "same_product"

    def __init__(self, documents: Side, names: Sequence[str], mesh: Mesh) -> None:
        if np.unique(documents.labels[documents.labels >= 0], return_counts=True)[1].max(initial=0) < 2:
            raise UserError(
                f"no two documents of {documents.catalogue.path} have one class",
                "Same-product search needs such: ingest --class-column",
            )
        self.documents, self.mesh, self.groups = documents, mesh, _groups(documents, names)

    def run(self, method: Method, gallery: Gallery, seen: str) -> Found:
        """See Task."""
        documents = gallery.whole(seen)
        ranks = relevant_ranks(gallery.own("image"), documents, self.mesh.dp, without_self=True)
        figures = {**summarise(ranks.ranks, ranks.offsets), "documents": float(_total(documents, self.mesh))}
        return Found(figures, slices(ranks.ranks, ranks.offsets, _ordered(self.groups, self.documents.ids, ranks)))


class TextTask:
    """Texts made of attributes find the documents that have them.

    Args:
        queries: the texts and what is relevant to each.
        bare: also search documents whose titles lack the words of these attributes' values; none: only titles as they
            are.
        category: attribute by whose values a method's weights of title and image are reported; empty: not.
        panel: rows of the panel.
        embedder: embeds texts and documents.
        mesh: the ranks.
    """

    name = "text"

    def __init__(
        self,
        queries: AttributeQueries,
        bare: Sequence[str],
        category: str,
        panel: int,
        embedder: Embedder,
        mesh: Mesh,
    ) -> None:
        self.queries, self.category, self.embedder, self.mesh = queries, category, embedder, mesh
        self.documents = queries.documents
        self.bare = without_words(self.documents, bare) if bare else None
        count = len(queries.texts)
        self.shown = {int(place) for place in np.linspace(0, count - 1, min(panel, count))}

    def run(self, method: Method, gallery: Gallery, seen: str) -> Found:
        """See Task."""
        texts = self.embedder.embed_texts(method, self.queries.texts)
        found = self._search(texts, gallery.whole(seen))
        figures, rows = dict(found.figures), list(found.rows)
        if seen == "both":
            if self.bare is not None:
                stripped = joined([self.embedder.embed(method, self.bare, seen), *gallery.others(seen)])
                figures |= {f"bare_{name}": value for name, value in self._search(texts, stripped).figures.items()}
            if isinstance(method, Weighs):
                rows += self._weights(method, method.modal_weights)
                figures |= rows[-1]["weights"]
        return Found(figures, rows, found.panel)

    def _search(self, texts: Embedded, documents: Embedded) -> Found:
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
            GRADED: float(gather_rows(graded, self.mesh.dp).cpu().numpy().mean()),
            "documents": float(_total(documents, self.mesh)),
        }
        return Found(figures, [], gathered(panel, self.mesh))

    def _weights(self, method: Method, weigh: Callable[[Batch], Tensor]) -> list[dict[str, Any]]:
        """Mean weights of title, image and fused vector by category, and of all documents last."""
        own, _ = self.embedder.apply(method, self.documents, weigh, 3)
        table = gather_rows(own, self.mesh.dp).double().cpu().numpy()
        groups = {}
        if self.category:
            values = self.documents.columns[self.category].used()
            number = self.documents.columns[self.category].in_list(values)
            groups = {value: number == place for place, value in enumerate(values)}
        groups["all"] = np.ones(len(table), bool)
        return [
            {
                "slice": self.category or "all",
                "value": value,
                "documents": int(rows.sum()),
                "weights": dict(
                    zip(("weight_title", "weight_image", "weight_fused"), table[rows].mean(0).tolist(), strict=True)
                ),
            }
            for value, rows in groups.items()
        ]


def head_and_tail(classes: Path, keys: ClassKeys) -> np.ndarray:
    """Place in KINDS of each number of `keys`, and at last of -1: int32, from a run's classes.parquet."""
    table = pq.read_table(classes, columns=["class_key", "tail"])
    number = pc.index_in(table["class_key"].cast(pa.large_string()), value_set=keys.keys)
    number, tail = number.fill_null(-1).to_numpy(), table["tail"].to_numpy()
    kinds = np.full(len(keys.keys) + 1, NEVER, np.int32)
    kinds[number] = np.where(tail, TAIL, HEAD)
    kinds[-1] = NEVER
    return kinds


def require_attributes(side_of_catalogue: Any, names: Sequence[str], key: str) -> None:
    """Raises UserError where the catalogue lacks one of the attributes that `key` of the configuration names."""
    for name in names:
        if name not in side_of_catalogue.attributes:
            raise UserError(
                f"{key} names '{name}', no attribute of {side_of_catalogue.path}",
                f"It has {', '.join(side_of_catalogue.attributes) or 'none'} (ingest --attribute-columns)",
            )


def gathered(own: list[Row], mesh: Mesh) -> list[Row]:
    """The few rows of all ranks, sorted; collective."""
    parts: list[Any] = [None] * mesh.dp.size()
    dist.all_gather_object(parts, own, group=mesh.dp)
    return sorted(row for part in parts for row in part)


def joined(parts: Sequence[Embedded]) -> Embedded:
    """Several shares as one."""
    if len(parts) == 1:
        return parts[0]
    columns = ([getattr(part, name) for part in parts] for name in ("vectors", "ids", "labels"))
    return Embedded(*(torch.cat(column) for column in columns))


def spread(own: Embedded, ids: np.ndarray, count: int) -> Embedded:
    """Those of this rank among at most `count` that are spread evenly over all `ids`."""
    count = min(count, len(ids))
    wanted = torch.from_numpy(ids[np.arange(count) * len(ids) // max(1, count)])
    mine = torch.isin(own.ids, wanted.to(own.ids.device))
    return Embedded(own.vectors[mine], own.ids[mine], own.labels[mine])


def _total(documents: Embedded, mesh: Mesh) -> int:
    count = torch.tensor(len(documents.ids), device=mesh.device)
    dist.all_reduce(count, group=mesh.dp)
    return int(count)


def _groups(side: Side, names: Sequence[str]) -> dict[str, Coded]:
    return {name: side.columns[name].with_null(str(None)) for name in names}


def _ordered(groups: dict[str, Coded], ids: np.ndarray, ranks: RelevantRanks) -> dict[str, Coded]:
    """Groups of all `ids` (ascending), in the order of the ranks."""
    rows = np.searchsorted(ids, ranks.query_ids)
    return {name: column.take(rows) for name, column in groups.items()}
