"""Settings of a search that reach a recall, found on queries whose exact answers are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from harness.artefact.exact import Found, merged, ordered
from harness.artefact.flat_index import import_faiss
from harness.artefact.index_build import index_lists
from harness.artefact.index_kinds import FLAT, KINDS
from harness.artefact.vector_index import SPARE, VectorIndex
from harness.artefact.vectors_file import read_rows
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
_VISITED = 16  # nodes compared for each that a search of a graph keeps
_STEP = 1.25  # of the cost, if queries held out find too few
_GAIN = 0.002  # recall that twice the work must add


class Tuned(NamedTuple):
    """Settings of an index, and the share of the exact nearest documents that it then finds."""

    effort: int
    factor: int
    recall: float


def exact_nearest(vectors: np.ndarray, queries: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Rows of the DEPTH nearest vectors of each query, int64 [q, DEPTH]; each rank compares its share; collective.

    The order is that of every search, also among equal vectors. FAISS's matrix product in float32 finds candidates,
    since `harness.artefact.exact` needs five times as long to compare all of them.
    """
    faiss, asked = import_faiss(), torch.from_numpy(queries)

    def own() -> Found:
        mine = share(len(vectors), mesh.world_size, mesh.rank)
        scores: np.ndarray = np.empty((len(queries), 0), np.float32)
        rows: np.ndarray = np.empty((len(queries), 0), np.int64)
        for start in range(mine.start, mine.stop, _BLOCK):
            block = np.asarray(vectors[start : min(start + _BLOCK, mine.stop)], np.float32)
            wanted = min(DEPTH + SPARE, len(block))
            found = faiss.knn(queries, block, wanted, metric=faiss.METRIC_INNER_PRODUCT)
            scores, rows = np.hstack([scores, found[0]]), np.hstack([rows, found[1] + start])
            best = np.argsort(-scores, 1, kind="stable")[:, : DEPTH + SPARE]
            scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
        return ordered(partial(read_rows, vectors), asked, torch.from_numpy(rows), min(DEPTH, rows.shape[1]))

    nearest: np.ndarray = merged(of_all_ranks(own, mesh, "exact search"), DEPTH)[0].numpy()
    return nearest


def tune(index: VectorIndex, queries: np.ndarray, nearest: np.ndarray, recall: float) -> Tuned:
    """Sets the cheapest effort and factor of `index` with which its search finds `recall` of `nearest`.

    Half of the queries choose, with a standard error to spare. The others are held out: the recall returned is theirs,
    and where it is less than `recall`, the next better setting is taken. Cost is counted in bytes read, not measured,
    so that equal artefacts have equal settings.

    Args:
        index: an index of any kind but flat.
        queries: float32 [q, d].
        nearest: int64 [q, k], the exact answers.
        recall: share of them to be found.

    Raises:
        UserError: no setting reaches it; says what limits the index, and what would reach it.
    """
    chosen, held_out = ((queries[part], nearest[part]) for part in halves(len(queries)))

    curves: dict[int, list[float]] = {}

    def found(effort: int) -> list[float]:
        if effort not in curves:
            places = _places(index, *chosen, effort)
            curves[effort] = [_surely((places < factor * nearest.shape[1]).mean(1)) for factor in FACTORS]
        return curves[effort]

    above, reached = 0.0, 0.0
    while tuned := _cheapest(index, found, recall, above):
        index.effort, index.factor = tuned.effort, tuned.factor
        reached = measured(index, *held_out)
        if reached >= recall:
            return tuned._replace(recall=reached)
        above = _STEP * _cost(index, tuned)
    if not above:
        index.effort, index.factor = max(curves), FACTORS[-1]
        reached = measured(index, *held_out)
    raise _unreached(index, reached, recall)


def _surely(recalls: np.ndarray) -> float:
    """Mean of the queries' recalls, less its standard error."""
    return float(recalls.mean() - recalls.std() / np.sqrt(len(recalls)))


def halves(queries: int) -> tuple[slice, slice]:
    """Rows of queries that choose a setting, and of those that are held out; of a single one both."""
    return (slice(0, None, 2), slice(1, None, 2)) if queries > 1 else (slice(None), slice(None))


def _cheapest(index: VectorIndex, found: Callable[[int], list[float]], recall: float, above: float) -> Tuned | None:
    """The setting of the least cost that reaches a recall; None where none does.

    Args:
        index: the index.
        found: recall with each of FACTORS at an effort.
        recall: to be reached.
        above: the cost must be more.
    """
    best: tuple[float, Tuned] | None = None
    curve: list[float] = []
    for effort in _efforts(index):
        curve.append(found(effort)[-1])
        enough = [Tuned(effort, *pair) for pair in zip(FACTORS, found(effort), strict=True) if pair[1] >= recall]
        priced = [(_cost(index, setting), setting) for setting in enough]
        if priced := [pair for pair in priced if pair[0] > above]:
            best = min(priced if best is None else [best, *priced])
            if priced[0][1].factor == 1 or best[1].effort * 4 <= effort:
                break
        elif curve[-1] < recall and len(curve) > 2 and curve[-1] - curve[-3] < _GAIN:
            break  # the codes limit it
    return best and best[1]


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
        if 1 < effort < most * 2 // 3:
            yield effort * 3 // 2
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
    if kind.knob == "efSearch":
        return (
            refined + _RANDOM * tuned.effort * _VISITED * import_faiss().downcast_index(index.index.storage).code_size
        )
    if not kind.knob:
        return refined
    ivf = index_lists(index.index)
    return refined + ivf.nlist * vector + tuned.effort / ivf.nlist * index.rows * ivf.code_size


def _unreached(index: VectorIndex, reached: float, recall: float) -> UserError:
    name, knob = index.kind, KINDS[index.kind].knob
    sizes = {other: kind.ram_bytes(index.width, index.rows) for other, kind in KINDS.items()}
    larger = [other for other in ("ivf_sq8", "ivf_flat", "hnsw") if sizes[other] > sizes[name]]
    setting = f"{knob} = {index.effort} and " if knob else ""
    return UserError(
        f"an index of kind {name} finds {reached:.3f} of the {DEPTH} nearest documents with {setting}"
        f"{index.factor} candidates for each, less than --index.recall {recall:g}; more of either adds nothing",
        f"Take --index.kind {', '.join(larger)}{' or ' if larger else ''}{FLAT}, which keep more of each vector, or "
        f"--index.recall {int(100 * reached) / 100:g}",
    )
