"""Baselines of a search: Recall@1 of a plain method (photos by a colour histogram, texts by BM25 over titles) and of
towers that nobody trained on the catalogue, on the queries, documents and relevance of the task.

Their cost is bounded by a sample (`sampled`); `shelfmark eval` and training give the own recall on the same sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from harness.catalogue.catalogue import Catalogue
from harness.core.mesh import Mesh
from harness.core.waiting import in_own_time, on_first_rank
from harness.data.backends import decoding_threads
from harness.evaluate.contact_sheet import picture
from harness.evaluate.embed import Embedder, Side
from harness.evaluate.metrics import summarise
from harness.evaluate.ranking import ID_BITS, Embedded, relevant_ranks
from harness.evaluate.title_words import title_scorer
from models.comm import gather_shards, share
from models.method import Method

HISTOGRAM, TITLES = "colour histogram", "BM25 of titles"
UNTRAINED, IMPORTED = "untrained", "imported towers"
SIDE = 64  # pixels of a picture whose colours are counted, in its central half
PIXELS = (SIDE // 2) ** 2
TILE = 4096  # documents compared at once
_LAST_ID = 2**ID_BITS - 1


@dataclass(frozen=True)
class Baselines:
    """Recall@1 of the baselines by name, of `queries` queries, which are `asked` (photos or texts), against `documents`
    documents of a split.
    """

    split: str
    queries: int
    asked: str
    documents: int
    recall: dict[str, float]

    @property
    def shown(self) -> str:
        """The figures in words."""
        return ", ".join(f"{name} {value:.3f}" for name, value in self.recall.items())

    def __str__(self) -> str:
        """One line for the log."""
        return (
            f"{self.split} recall@1 of {self.queries:,} {self.asked} against {self.documents:,} documents: {self.shown}"
        )


@dataclass(frozen=True)
class Sample:
    """Sample of a search.

    Args:
        queries: photos, pictures of documents, or texts; each has a relevant document.
        documents: the gallery; a document is relevant where its label is the query's.
        texts: the queries, where they are texts.
        without_self: queries are documents, and none finds itself.
    """

    queries: Side
    documents: Side
    texts: tuple[str, ...] = ()
    without_self: bool = False

    def asked(self, method: Method, embedder: Embedder) -> Embedded:
        """This rank's share of the embedded queries; collective."""
        if not self.texts:
            return embedder.embed(method, self.queries, "image" if self.without_self else "both")
        found = embedder.embed_texts(method, self.texts)
        ids, labels = (torch.from_numpy(a).to(found.ids.device) for a in (self.queries.ids, self.queries.labels))
        return Embedded(found.vectors, ids[found.ids], labels[found.ids])


def baselines_of(sample: Sample, split: str, mesh: Mesh, threads: int = 0) -> Baselines:
    """The plain baseline of a sample; collective; `threads` as in `histogram_recall`."""
    if sample.texts:
        recall = {TITLES: on_first_rank(lambda: titles_recall(sample), mesh, "ranking titles by BM25")}
    else:
        recall = {HISTOGRAM: histogram_recall(sample, mesh, threads)}
    asked = "texts" if sample.texts else "photos"
    return Baselines(split, len(sample.queries.ids), asked, len(sample.documents.ids), recall)


def sampled(
    queries: Side, documents: Side, limit: int, texts: Sequence[str] = (), without_self: bool = False
) -> Sample | None:
    """Sample of at most `limit` of the queries that have a relevant document, and of at most twice as many documents:
    one that is relevant to each of these queries, then others; all of them spread evenly by id. None without a query.

    Args:
        queries: of a task.
        documents: of a task.
        limit: see above.
        texts: text of each query, where they are texts.
        without_self: see `Sample`.
    """
    wanted = 2 if without_self else 1  # documents of a label: one of them may be the query
    labels, counts = np.unique(documents.labels, return_counts=True)
    answered = np.flatnonzero(np.isin(queries.labels, labels[(labels >= 0) & (counts >= wanted)]))
    asked = _mask(len(queries.ids), answered[_evenly(len(answered), limit)])
    if not asked.any():
        return None
    order = np.argsort(documents.labels, kind="stable")
    sorted_labels = documents.labels[order]
    first = order[np.arange(len(order)) - np.searchsorted(sorted_labels, sorted_labels) < wanted]
    kept = _mask(len(documents.ids), first[np.isin(documents.labels[first], queries.labels[asked])])
    others = np.flatnonzero(~kept)
    kept[others[_evenly(len(others), 2 * limit - int(kept.sum()))]] = True
    said = tuple(texts[row] for row in np.flatnonzero(asked).tolist()) if texts else ()
    return Sample(queries.select(asked), documents.select(kept), said, without_self)


def titles_recall(sample: Sample) -> float:
    """Recall@1 of the titles ranked by BM25 for the texts of a sample. Of equal documents the one of the lowest id
    counts.
    """
    score = title_scorer(sample.documents)
    best = np.array([score(text).argmax() for text in sample.texts])
    return float(np.mean(sample.documents.labels[best] == sample.queries.labels))


def _mask(size: int, rows: np.ndarray) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[rows] = True
    return mask


def _evenly(rows: int, limit: int) -> np.ndarray:
    """Places of at most `limit` of so many rows."""
    count = max(0, min(rows, limit))
    return np.arange(count) * rows // max(1, count)


def histogram_recall(sample: Sample, mesh: Mesh, threads: int = 0) -> float:
    """Recall@1 of the nearest neighbour in colour; collective.

    An 8 x 8 x 8 histogram of the RGB colours in the central half of each picture, compared by the overlap of histograms
    (Swain and Ballard 1991). Of equal documents the one of the lowest id counts.

    Args:
        sample: of photos.
        mesh: the ranks, which share the pictures.
        threads: that decode, see `DataConfig`.
    """
    queries, documents = sample.queries, sample.documents
    count = partial(_histograms, mesh=mesh, threads=decoding_threads(threads))
    own, ids = in_own_time(lambda: count(documents), mesh, "counting colours")
    mine, my_ids = in_own_time(lambda: count(queries), mesh, "counting colours")
    asked, asked_ids = (gather_shards(part.to(mesh.device), mesh.dp) for part in (mine, my_ids))
    best = torch.full((len(asked),), -1, dtype=torch.int64, device=mesh.device)
    for start in range(0, len(own), TILE):
        tile, names = (part[start : start + TILE].to(mesh.device) for part in (own, ids))
        # Whole numbers, which float32 holds exactly: the sum of the minima is what the sum of differences leaves over.
        overlap = (PIXELS - torch.cdist(asked, tile, p=1) / 2).round().long()
        keys = (overlap << ID_BITS) + (_LAST_ID - names)
        if sample.without_self:
            keys = keys.masked_fill(names == asked_ids[:, None], -1)
        best = torch.maximum(best, keys.amax(1))
    dist.all_reduce(best, dist.ReduceOp.MAX, group=mesh.dp)
    found = documents.rows_of(_LAST_ID - (best.cpu().numpy() & _LAST_ID))
    return float(np.mean(documents.labels[found] == queries.labels))


def _histograms(side: Side, mesh: Mesh, threads: int) -> tuple[Tensor, Tensor]:
    """Histograms float32 [n, 512] of this rank's share of a side, and its ids."""
    own = share(len(side.ids), mesh.dp.size(), mesh.dp.rank())
    samples = side.sample_ids[own.start : own.stop].tolist()
    with ThreadPoolExecutor(threads) as pool:
        counted = pool.map(partial(_histogram, side.catalogue), samples)
        shown = tqdm(counted, f"colours of {side.kind}", len(own), leave=False, delay=5, disable=mesh.rank != 0)
        table = np.array([*shown], np.float32).reshape(len(own), 512)
    return torch.from_numpy(table), torch.from_numpy(side.ids[own.start : own.stop])


def _histogram(catalogue: Catalogue, sample: int) -> np.ndarray:
    edge = SIDE // 4
    colours = np.asarray(picture(catalogue, sample).resize((SIDE, SIDE)))[edge:-edge, edge:-edge].reshape(-1, 3) // 32
    return np.bincount(colours @ [64, 8, 1], minlength=512)


def towers_recall(method: Method, embedder: Embedder, sample: Sample) -> float:
    """Recall@1 of a method with the weights that it has; collective. The towers are left in training mode if they
    were.
    """
    training = method.towers.training
    method.towers.eval()
    try:
        asked, gallery = sample.asked(method, embedder), embedder.embed(method, sample.documents)
    finally:
        method.towers.train(training)
    ranks = relevant_ranks(asked, gallery, embedder.mesh.dp, without_self=sample.without_self)
    return summarise(ranks.ranks, ranks.offsets, (1,))["recall_at_1"]


def from_json(values: Any) -> Baselines | None:
    """Baselines from `dataclasses.asdict` of them, after a trip through JSON; None for anything else."""
    try:
        found = Baselines(**values)
        ok = isinstance(found.recall, dict) and all(isinstance(value, float | int) for value in found.recall.values())
        return found if ok else None
    except TypeError:
        return None
