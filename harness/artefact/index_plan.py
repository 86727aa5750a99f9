"""Build time of an index before it is built, from a calibration on a few of its vectors."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from harness.artefact.index_build import add, index_lists, training
from harness.artefact.index_kinds import IndexKind
from harness.artefact.vectors_file import sample

_ROWS = 1 << 13  # of a calibration
_GRAPH_ROWS, _GRAPH_SHARE = 1 << 14, 32  # of that of a graph; one in so many rows, if more
_GRAPH_BYTES = 1 << 27  # of that graph, if it is at most a third of the index: more than processors' caches hold
_GRAPH_BLOCK = 1 << 10  # rows of these at once, or more
_WRITTEN = 1 << 25  # bytes of a test of the disk


Clock = Callable[[], float]


def plan_seconds(
    kind: IndexKind, vectors: np.ndarray, ranks: int, folder: Path, clock: Clock = time.perf_counter
) -> float:
    """Seconds to train, fill and write an index of `vectors`, computed from small parts of this work done now.

    Args:
        kind: not flat.
        vectors: float32 or float16 [n, d].
        ranks: that fill lists at once.
        folder: on the disk that the index is written to.
        clock: gives seconds.
    """
    rows, width = vectors.shape
    index, seconds = kind.make(width, rows), 0.0
    for step in training(index, rows):
        seconds += _training_seconds(index, vectors, *step, clock)
    part = sample(vectors, _graph_rows(kind, width, rows) if kind.knob == "efSearch" else _ROWS)
    written = _writing(kind, vectors, folder, clock)
    if kind.knob == "efSearch":
        return seconds + _graph_seconds(index, part, rows, clock) + written
    add(index, part, range(len(part)), shown=False)  # the first time is longer
    spent = _timed(lambda: add(index, part, range(len(part)), shown=False), clock)
    if index_lists(index) is None:
        return seconds + spent * rows / len(part) + written
    return seconds + spent * rows / len(part) / ranks + 2 * written  # shards, then all of them


def _training_seconds(
    index: Any,
    vectors: np.ndarray,
    name: str,
    wanted: int,
    rounds: int,
    step: Callable[[np.ndarray, int], None],
    clock: Clock,
) -> float:
    """Seconds of a step of the training, from one round and from three.

    Args:
        index: being trained.
        vectors: [n, d].
        name, wanted, rounds, step: as `harness.artefact.index_build.training` gives them.
        clock: gives seconds.
    """
    if name == "rotation":  # its matrices do not shrink with the rows
        return _timed(partial(step, sample(vectors, wanted), 1), clock) * rounds
    lists = 1 if index_lists(index) is None else index_lists(index).nlist
    # Codes by all of their rows: FAISS takes ten times as long for a row where it clusters few.
    part = sample(vectors, wanted if name == "codes" else min(wanted, max(_ROWS, 2 * lists)))
    step(part, 1)  # the first time is longer
    once = _timed(partial(step, part, 1), clock)
    each = max(0.0, (_timed(partial(step, part, 3), clock) - once) / 2) if rounds > 1 else 0.0
    return (once + (rounds - 1) * each) * wanted / len(part)


def _graph_rows(kind: IndexKind, width: int, rows: int) -> int:
    """Rows of a calibration: a row costs several times as much where the graph has left the processor's caches."""
    outside = rows * _GRAPH_BYTES // kind.ram_bytes(width, rows)
    return max(_GRAPH_ROWS, rows // _GRAPH_SHARE, min(outside, rows // 3))


def _graph_seconds(index: Any, part: np.ndarray, rows: int, clock: Clock) -> float:
    """Seconds to add so many rows to a graph: those of one row grow as the logarithm of the rows before it."""
    sizes, costs = [], []
    for start, end in pairwise(range(0, len(part) + 1, max(_GRAPH_BLOCK, len(part) // 16))):
        spent = _timed(partial(add, index, part, range(start, end), shown=False), clock)
        sizes.append(math.log((start + end) / 2))
        costs.append(spent / (end - start))
    warm = max(1, len(costs) // 4)  # the first blocks are in the caches
    sizes, costs = sizes[warm:], costs[warm:]
    if len(costs) < 2:  # too few to measure, and built at once
        return 0.0
    growth = max(0.0, float(np.polyfit(sizes, costs, 1)[0]))  # less is noise
    base = float(np.mean(costs) - growth * np.mean(sizes))
    return base * rows + growth * (rows * math.log(rows) - rows)


def _writing(kind: IndexKind, vectors: np.ndarray, folder: Path, clock: Clock) -> float:
    """Seconds to write the index once."""
    file, block = folder / "disk-test", bytes(_WRITTEN)

    def write() -> None:
        with file.open("wb") as out:
            out.write(block)
            os.fsync(out.fileno())

    try:
        return _timed(write, clock) * kind.ram_bytes(vectors.shape[1], len(vectors)) / _WRITTEN
    finally:
        file.unlink(missing_ok=True)


def _timed(work: Callable[[], Any], clock: Clock) -> float:
    started = clock()
    work()
    return clock() - started
