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
    for _, wanted, rounds, step in training(index, rows):
        lists = 1 if index_lists(index) is None else index_lists(index).nlist
        part, fewer = sample(vectors, min(wanted, max(_ROWS, 2 * lists))), min(rounds, 2)
        seconds += _timed(partial(step, part, fewer), clock) * wanted * rounds / (len(part) * fewer)
    part = sample(vectors, max(_GRAPH_ROWS, rows // _GRAPH_SHARE) if kind.knob == "efSearch" else _ROWS)
    written = _writing(kind, vectors, folder, clock)
    if kind.knob == "efSearch":
        return seconds + _graph_seconds(index, part, rows, clock) + written
    spent = _timed(lambda: add(index, part, range(len(part)), shown=False), clock)
    if index_lists(index) is None:
        return seconds + spent * rows / len(part) + written
    return seconds + spent * rows / len(part) / ranks + 2 * written  # shards, then all of them


def _graph_seconds(index: Any, part: np.ndarray, rows: int, clock: Clock) -> float:
    """Seconds to add so many rows to a graph: those of one row grow as the logarithm of the rows before it."""
    ends = [len(part) // 16, len(part) // 8, len(part) // 4, len(part) // 2, len(part)]
    if not ends[0]:  # too few to measure, and built at once
        return 0.0
    add(index, part, range(ends[0]), shown=False)
    sizes, costs = [], []
    for start, end in pairwise(ends):
        spent = _timed(partial(add, index, part, range(start, end), shown=False), clock)
        sizes.append(math.log((start + end) / 2))
        costs.append(spent / (end - start))
    growth, base = np.polyfit(sizes, costs, 1)
    growth = max(growth, 0.0)  # of noise
    base = float(np.mean(costs) - growth * np.mean(sizes))
    return float(base * rows + growth * (rows * math.log(rows) - rows))


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
