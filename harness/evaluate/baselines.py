"""Baselines of photo search: Recall@1 of a colour histogram and of towers that nobody trained on the catalogue, on the
queries, documents and relevance of the task.

Their cost is bounded by a sample (`sampled`); `shelfmark eval` and training give the own recall on the same sample.
"""

from __future__ import annotations

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
from harness.core.waiting import in_own_time
from harness.data.backends import decoding_threads
from harness.evaluate.contact_sheet import picture
from harness.evaluate.embed import Embedder, Side
from harness.evaluate.metrics import summarise
from harness.evaluate.ranking import ID_BITS, relevant_ranks
from models.comm import gather_shards, share
from models.method import Method

HISTOGRAM, UNTRAINED, IMPORTED = "colour histogram", "untrained", "imported towers"
SIDE = 64  # pixels of a picture whose colours are counted, in its central half
PIXELS = (SIDE // 2) ** 2
TILE = 4096  # documents compared at once
_LAST_ID = 2**ID_BITS - 1


@dataclass(frozen=True)
class Baselines:
    """Recall@1 of the baselines by name, of `photos` photos against `documents` documents of a split."""

    split: str
    photos: int
    documents: int
    recall: dict[str, float]

    @property
    def shown(self) -> str:
        """The figures in words."""
        return ", ".join(f"{name} {value:.3f}" for name, value in self.recall.items())

    def __str__(self) -> str:
        """One line for the log."""
        return f"{self.split} recall@1 of {self.photos:,} photos against {self.documents:,} documents: {self.shown}"


def baselines_of(sample: tuple[Side, Side], split: str, mesh: Mesh, threads: int = 0) -> Baselines:
    """The colour histogram as a baseline of a sample of queries and documents; collective; `threads` as in
    `histogram_recall`.
    """
    queries, documents = sample
    recall = {HISTOGRAM: histogram_recall(queries, documents, mesh, threads)}
    return Baselines(split, len(queries.ids), len(documents.ids), recall)


def sampled(queries: Side, documents: Side, limit: int) -> tuple[Side, Side]:
    """At most `limit` of the queries that have a relevant document, and at most twice as many documents: one that is
    relevant to each of these queries, then others; all of them spread evenly by id.
    """
    answered = np.flatnonzero((queries.labels >= 0) & np.isin(queries.labels, documents.labels))
    asked = _mask(len(queries.ids), answered[_evenly(len(answered), limit)])
    labels, first = np.unique(documents.labels, return_index=True)
    kept = _mask(len(documents.ids), first[np.isin(labels, queries.labels[asked])])
    others = np.flatnonzero(~kept)
    kept[others[_evenly(len(others), 2 * limit - int(kept.sum()))]] = True
    return queries.select(asked), documents.select(kept)


def _mask(size: int, rows: np.ndarray) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[rows] = True
    return mask


def _evenly(rows: int, limit: int) -> np.ndarray:
    """Places of at most `limit` of so many rows."""
    count = min(rows, limit)
    return np.arange(count) * rows // max(1, count)


def histogram_recall(queries: Side, documents: Side, mesh: Mesh, threads: int = 0) -> float:
    """Recall@1 of the nearest neighbour in colour; collective.

    An 8 x 8 x 8 histogram of the RGB colours in the central half of each picture, compared by the overlap of histograms
    (Swain and Ballard 1991). Of equal documents the one of the lowest id counts.

    Args:
        queries: each has a relevant document.
        documents: of any number.
        mesh: the ranks, which share the pictures.
        threads: that decode, see `DataConfig`.
    """
    count = partial(_histograms, mesh=mesh, threads=decoding_threads(threads))
    own, ids = in_own_time(lambda: count(documents), mesh, "counting colours")
    mine, _ = in_own_time(lambda: count(queries), mesh, "counting colours")
    asked = gather_shards(mine.to(mesh.device), mesh.dp)
    best = torch.full((len(asked),), -1, dtype=torch.int64, device=mesh.device)
    for start in range(0, len(own), TILE):
        tile, names = (part[start : start + TILE].to(mesh.device) for part in (own, ids))
        # Whole numbers, which float32 holds exactly: the sum of the minima is what the sum of differences leaves over.
        overlap = (PIXELS - torch.cdist(asked, tile, p=1) / 2).round().long()
        best = torch.maximum(best, ((overlap << ID_BITS) + (_LAST_ID - names)).amax(1))
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


def towers_recall(method: Method, embedder: Embedder, queries: Side, documents: Side) -> float:
    """Recall@1 of a method with the weights that it has; collective. The towers are left in training mode if they
    were.
    """
    training = method.towers.training
    method.towers.eval()
    try:
        asked, gallery = (embedder.embed(method, side) for side in (queries, documents))
    finally:
        method.towers.train(training)
    ranks = relevant_ranks(asked, gallery, embedder.mesh.dp)
    return summarise(ranks.ranks, ranks.offsets, (1,))["recall_at_1"]


def from_json(values: Any) -> Baselines | None:
    """Baselines from `dataclasses.asdict` of them, after a trip through JSON; None for anything else."""
    try:
        found = Baselines(**values)
        ok = isinstance(found.recall, dict) and all(isinstance(value, float | int) for value in found.recall.values())
        return found if ok else None
    except TypeError:
        return None
