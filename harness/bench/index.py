"""Recall, speed, memory and build time of each kind of index, beside what was planned and beside bare FAISS."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.artefact.flat_index import FILE, import_faiss
from harness.artefact.index_build import build_index, use_threads
from harness.artefact.index_kinds import FLAT, KINDS
from harness.artefact.index_plan import plan_seconds
from harness.artefact.index_read import read_kind
from harness.artefact.index_tune import DEPTH, exact_nearest, tune
from harness.artefact.vector_index import VectorIndex
from harness.artefact.vectors_file import open_vectors
from harness.bench.ranks import Memory, on_ranks
from harness.bench.report import bench_main, finish
from harness.core.errors import UserError
from harness.core.mesh import Mesh, MeshConfig
from models.ranges import PositiveInt

MODULE = "harness.bench.index"
EXAMPLE = f"python -m {MODULE} --vectors 100000 --kinds hnsw,ivf_sq8 --json index.json"
_PER_CLUSTER = 20  # vectors
_BLOCK = 1 << 16
_PASSES = 5  # over the queries


@dataclass(frozen=True, kw_only=True)
class IndexBenchConfig:
    """Builds, tunes and searches indexes of synthetic vectors: unit vectors in clusters of Zipf sizes, with spectra
    that decay as those of real embeddings do, and queries farther from the centres than documents are.

    Args:
        vectors: of the documents.
        width: numbers of a vector.
        queries: that are asked, half of them to tune.
        kinds: of index.
        recall: share of the 10 nearest that each must find.
        threads: of a build and of a search.
    """

    vectors: PositiveInt = 1_000_000
    width: PositiveInt = 256
    queries: PositiveInt = 1000
    kinds: tuple[str, ...] = tuple(KINDS)
    recall: float = 0.95
    threads: PositiveInt = 1

    def __post_init__(self) -> None:
        if unknown := set(self.kinds) - KINDS.keys():
            raise UserError(f"--kinds has {min(unknown)}", f"It can have {', '.join(KINDS)}")


def run(config: IndexBenchConfig) -> dict[str, Any]:
    """Measures, prints and returns the report (see `harness/bench/report.py`).

    Rows: a kind; seconds and megabytes planned and measured, settings, recall@10 on queries that it was not tuned on,
    and queries a second by our search and by FAISS's own of the same settings. Headline: the least recall, the least
    ratio of these speeds, the largest error of a plan.
    """
    with tempfile.TemporaryDirectory(prefix="shelfmark-bench-") as name:
        queries = draw(Path(name), config)
        rows = [on_ranks(1, measure, Path(name), queries, kind, config) for kind in config.kinds]
    reached = [row for row in rows if row["recall_at_10"] is not None]
    headline = {}
    if reached:
        headline["least_recall_at_10"] = min(row["recall_at_10"] for row in reached)
        headline["least_speed_of_faiss"] = min(row["of_faiss"] for row in reached)
        for what in ("mb", "build_s"):
            pairs = [(row[f"planned_{what}"], row[what]) for row in reached if row["kind"] != FLAT]
            headline[f"largest_error_of_{what}"] = max((abs(plan / real - 1) for plan, real in pairs), default=0.0)
    return finish(MODULE, config, headline, rows)


def draw(folder: Path, config: IndexBenchConfig) -> np.ndarray:
    """Writes folder/vectors.npy, and returns queries float32 [queries, width]."""
    rng, width = np.random.default_rng(7), config.width
    clusters = max(1, config.vectors // _PER_CLUSTER)
    between, within = (np.arange(1, width + 1) ** power for power in (-0.5, -0.25))
    centres = (rng.standard_normal((clusters, width)) * between).astype(np.float32)
    sizes = np.arange(1, clusters + 1) ** -0.7
    sizes /= sizes.sum()

    def drawn(count: int, noise: float) -> np.ndarray:
        made = centres[rng.choice(clusters, count, p=sizes)]
        made += (noise * rng.standard_normal((count, width), dtype=np.float32) * within).astype(np.float32)
        unit: np.ndarray = made / np.linalg.norm(made, axis=1, keepdims=True)
        return unit

    shape = (config.vectors, width)
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.dtype("<f4"), shape)
    for start in range(0, config.vectors, _BLOCK):
        vectors[start : start + _BLOCK] = drawn(min(_BLOCK, config.vectors - start), 0.25)
    vectors.flush()
    return drawn(config.queries, 0.35)


def measure(
    device: torch.device, folder: Path, queries: np.ndarray, name: str, config: IndexBenchConfig
) -> dict[str, Any]:
    """In a process of its own: the row of a kind."""
    mesh, kind, faiss = Mesh(MeshConfig(device="cpu")), KINDS[name], import_faiss()
    vectors = open_vectors(folder, config.width, config.vectors)
    torch.set_num_threads(config.threads)
    use_threads(config.threads)
    half = len(queries) // 2
    nearest = exact_nearest(vectors, queries, mesh)
    row: dict[str, Any] = {"kind": name, "planned_mb": kind.ram_bytes(config.width, config.vectors) / 1e6}
    if name == FLAT:
        bare = faiss.IndexFlatIP(config.width)
        bare.add(np.asarray(vectors))
        index, made = VectorIndex(bare), {"planned_build_s": None, "build_s": None, "mb": row["planned_mb"]}
        reached, effort = 1.0, 0
    else:
        planned = plan_seconds(kind, vectors, 1, folder)
        started = time.perf_counter()
        build_index(kind, vectors, folder, config.threads, mesh)
        made = {"planned_build_s": planned, "build_s": time.perf_counter() - started}
        before = Memory(device).start()
        bare = read_kind(folder / FILE, name, config.width, config.vectors)
        index = VectorIndex(bare, name, vectors)
        try:
            tuned = tune(index, queries[:half], nearest[:half], config.recall)
        except UserError as error:
            print(error)
            return {**row, **made, "mb": (folder / FILE).stat().st_size / 1e6, "recall_at_10": None}
        # Lists come into memory with searches, those of all queries nearly all of them.
        made["mb"] = max(Memory(device).peak() - before, (folder / FILE).stat().st_size) / 1e6
        effort, reached = tuned.effort, 0.0
        if tuned.factor > 1:
            bare = faiss.IndexRefineFlat(bare, faiss.swig_ptr(np.ascontiguousarray(vectors, np.float32)))
            bare.k_factor = tuned.factor
    rows = index.search(torch.from_numpy(queries[half:]), DEPTH)[0].numpy()
    reached = float((rows[:, :, None] == nearest[half:][:, None, :]).any(1).mean())
    parameters = kind.parameters(effort, transformed=hasattr(index.index, "chain"))
    if index.factor > 1:
        parameters = faiss.IndexRefineSearchParameters(k_factor=index.factor, base_index_params=parameters)
    asked = torch.from_numpy(queries)
    ours, theirs = _speeds(
        len(queries), lambda: index.search(asked, DEPTH), lambda: bare.search(queries, DEPTH, params=parameters)
    )
    speeds = {"queries_s": ours, "faiss_queries_s": theirs, "of_faiss": ours / theirs}
    return {**row, **made, "effort": effort, "k_factor": index.factor, "recall_at_10": reached, **speeds}


def _speeds(count: int, *searches: Callable[[], Any]) -> list[float]:
    """Queries a second of each, the median of passes in turn."""
    seconds: list[list[float]] = [[] for _ in searches]
    for number in range(_PASSES + 1):
        for spent, search in zip(seconds, searches, strict=True):
            started = time.perf_counter()
            search()
            if number:  # the first warms up
                spent.append(time.perf_counter() - started)
    return [count / statistics.median(spent) for spent in seconds]


def main() -> int:
    """Entry point of `python -m harness.bench.index`."""
    return bench_main(MODULE, IndexBenchConfig, run, "Kinds of index: recall, speed, memory, build time.", EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
