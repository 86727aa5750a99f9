"""Settings of a search that reach a recall, found on queries whose exact answers are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from harness.artefact.flat_index import import_faiss
from harness.artefact.index_build import index_lists
from harness.artefact.index_kinds import FLAT, KINDS
from harness.artefact.vector_index import VectorIndex
from harness.core.errors import UserError
from harness.core.waiting import of_all_ranks
from models.comm import share

if TYPE_CHECKING:
    from harness.core.mesh import Mesh

DEPTH = 10  # of the recall
FACTORS = (1, 2, 4, 8, 16, 32, 64)  # candidates for each document wanted
_MOST_KEPT = 1 << 12  # nodes kept in a search of a graph
_BLOCK = 1 << 16  # vectors compared at once
_RANDOM = 4  # bytes read in order in the time of one read at random
_GAIN = 0.002  # recall that twice the work must add


class Tuned(NamedTuple):
    """Settings of an index, and the share of the exact nearest documents that it then finds."""

    effort: int
    factor: int
    recall: float


def exact_nearest(vectors: np.ndarray, queries: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Rows of the DEPTH nearest vectors of each query, int64 [q, DEPTH]; each rank compares its share; collective."""

    def own() -> tuple[np.ndarray, np.ndarray]:
        mine = share(len(vectors), mesh.world_size, mesh.rank)
        scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        for start in range(mine.start, mine.stop, _BLOCK):
            block = np.asarray(vectors[start : min(start + _BLOCK, mine.stop)], np.float32)
            faiss = import_faiss()
            found = faiss.knn(queries, block, min(DEPTH, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            scores, rows = _best(np.hstack([scores, found[0]]), np.hstack([rows, found[1] + start]))
        return scores, rows

    parts = of_all_ranks(own, mesh, "exact search")
    return _best(*(np.hstack([part[n] for part in parts]) for n in (0, 1)))[1]


def _best(scores: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-scores, 1, kind="stable")[:, :DEPTH]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def tune(index: VectorIndex, queries: np.ndarray, nearest: np.ndarray, recall: float) -> Tuned:
    """Sets the cheapest effort and factor of `index` with which its search finds `recall` of `nearest`.

    Cost is counted in bytes read, not measured, so that equal artefacts have equal settings.

    Args:
        index: an index of any kind but flat.
        queries: float32 [q, d].
        nearest: int64 [q, k], the exact answers.
        recall: share of them to be found.

    Raises:
        UserError: no setting reaches it; says what limits the index, and what would reach it.
    """
    best: tuple[float, Tuned] | None = None
    curve: list[float] = []
    for effort in _efforts(index):
        places = _places(index, queries, nearest, effort)
        found = [float((places < factor * nearest.shape[1]).mean()) for factor in FACTORS]
        curve.append(found[-1])
        enough = [Tuned(effort, *pair) for pair in zip(FACTORS, found, strict=True) if pair[1] >= recall]
        if enough:
            best = min([*([best] if best else []), (_cost(index, enough[0]), enough[0])])
            if enough[0].factor == 1 or best[1].effort * 4 <= effort:
                break
        elif len(curve) > 2 and curve[-1] - curve[-3] < _GAIN:
            break  # the codes limit it
    if best is None:
        raise _unreached(index, effort, curve[-1], recall)
    index.effort, index.factor = best[1].effort, best[1].factor
    return best[1]._replace(recall=measured(index, queries, nearest))


def measured(index: VectorIndex, queries: np.ndarray, nearest: np.ndarray) -> float:
    """Share of the exact nearest documents that the index finds as it is set."""
    rows = index.search(torch.from_numpy(queries), nearest.shape[1])[0].numpy()
    return float((rows[:, :, None] == nearest[:, None, :]).any(1).mean())


def _efforts(index: VectorIndex) -> Iterator[int]:
    knob = KINDS[index.kind].knob
    most = {"": 1, "nprobe": 1, "efSearch": min(_MOST_KEPT, index.rows)}[knob]
    effort = 1
    if knob == "nprobe":
        most = index_lists(index.index).nlist
    elif knob == "efSearch":
        effort = min(16, most)
    while effort < most:
        yield effort
        effort *= 2
    yield most


def _places(index: VectorIndex, queries: np.ndarray, nearest: np.ndarray, effort: int) -> np.ndarray:
    """Place of each exact answer among the candidates of its query, a large number where it is not one of them."""
    most = FACTORS[-1] * nearest.shape[1]
    if KINDS[index.kind].knob == "efSearch":
        most = min(most, max(effort, nearest.shape[1]))  # a longer list would keep more nodes
    places = []
    for part, wanted in zip(*(np.array_split(a, -(-len(a) // 64)) for a in (queries, nearest)), strict=True):
        same = index.candidates(part, min(most, index.rows), effort)[:, :, None] == wanted[:, None, :]
        places.append(np.where(same.any(1), same.argmax(1), 1 << 30))
    return np.concatenate(places)


def _cost(index: VectorIndex, tuned: Tuned) -> float:
    """Bytes that a query reads."""
    vector, kind = 4 * index.width, KINDS[index.kind]
    refined = _RANDOM * tuned.factor * DEPTH * vector
    if kind.knob != "nprobe":
        return refined + tuned.effort
    ivf = index_lists(index.index)
    return refined + ivf.nlist * vector + tuned.effort / ivf.nlist * index.rows * ivf.code_size


def _unreached(index: VectorIndex, effort: int, reached: float, recall: float) -> UserError:
    name, knob = index.kind, KINDS[index.kind].knob
    sizes = {other: kind.ram_bytes(index.width, index.rows) for other, kind in KINDS.items()}
    larger = [other for other in ("ivf_sq8", "ivf_flat", "hnsw") if sizes[other] > sizes[name]]
    setting = f"{knob} = {effort} and " if knob else ""
    return UserError(
        f"an index of kind {name} finds {reached:.3f} of the {DEPTH} nearest documents with {setting}{FACTORS[-1]} "
        f"candidates for each, less than --index.recall {recall:g}; more of either adds nothing",
        f"Take --index.kind {', '.join(larger)}{' or ' if larger else ''}{FLAT}, which keep more of each vector, or "
        f"--index.recall {int(100 * reached) / 100:g}",
    )
