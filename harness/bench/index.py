"""Recall, speed, memory and build time of each kind of index, beside the plan and beside bare FAISS."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.artefact.flat_index import FILE, import_faiss, index_head, read_index
from harness.artefact.index_build import build_index, use_threads
from harness.artefact.index_kinds import FLAT, KINDS, IndexKind
from harness.artefact.index_plan import plan_seconds
from harness.artefact.index_read import read_kind
from harness.artefact.index_tune import DEPTH, Tuned, exact_nearest, measured, tune
from harness.artefact.vector_index import VectorIndex
from harness.artefact.vectors_file import open_vectors
from harness.bench.mixture import FASHION, Mixture, cosines, write_synthetic
from harness.bench.ranks import Memory, on_ranks
from harness.bench.report import bench_main, command_line, finish, make_report
from harness.core.errors import UserError
from harness.core.mesh import Mesh, MeshConfig
from models.ranges import PositiveInt

MODULE = "harness.bench.index"
EXAMPLE = f"python -m {MODULE} --vectors 100000 --kinds hnsw,ivf_sq8 --json index.json"
_PASSES = 5  # over the queries
_PASS_SECONDS = 1.0  # of a pass, by fewer queries where a search is slow
_TOUCHING = 8  # queries that look at everything, so that all of an index is in memory


@dataclass(frozen=True, kw_only=True)
class IndexBenchConfig:
    """Builds, tunes and searches indexes of synthetic vectors from a mixture fitted to real embeddings.

    Args:
        vectors: of the documents.
        width: numbers of a vector.
        queries: that tune an index (half of them choose, half are held out), and as many others that are reported.
        kinds: of index; each is written to the report when it is ready.
        recall: share of the 10 nearest that each must find.
        threads: of a build and of a search.
        like: a .npy file of unit vectors, as vectors.npy of an artefact, to fit the mixture to; by default it is the
            one that was fitted to embeddings of fashion photos.
    """

    vectors: PositiveInt = 1_000_000
    width: PositiveInt = 256
    queries: PositiveInt = 1000
    kinds: tuple[str, ...] = tuple(KINDS)
    recall: float = 0.95
    threads: PositiveInt = 1
    like: Path | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.kinds) - KINDS.keys():
            raise UserError(f"--kinds has {min(unknown)}", f"It can have {', '.join(KINDS)}")


def run(config: IndexBenchConfig) -> Iterator[dict[str, Any]]:
    """Measures, prints and gives the report (see `harness/bench/report.py`) after each kind.

    Seconds are those of the processor, which other work on the machine does not change much. Rows: a kind; seconds and
    megabytes planned and measured, settings, recall@10 on queries that tuning has not seen, and queries a second by our
    search and by FAISS's own with the same settings. Headline: the least recall, the least ratio of these speeds, the
    largest error of a plan.
    """
    mixture = FASHION if config.like is None else fitted(config.like)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="shelfmark-bench-") as name:
        on_ranks(1, prepare, Path(name), mixture, config)
        for kind in config.kinds:
            rows.append(on_ranks(1, measure, Path(name), kind, config))
            print(rows[-1], flush=True)
            yield make_report("index", command_line(MODULE, config), headline(rows), rows)
    yield finish(MODULE, config, headline(rows), rows)


def fitted(file: Path) -> Mixture:
    """The mixture of a file's vectors; prints how near both are to each other."""
    vectors = np.load(file, mmap_mode="r")
    mixture = Mixture.fitted(vectors)
    told = {"fitted": cosines(vectors), "synthetic": cosines(mixture.vectors(len(vectors), vectors.shape[1]))}
    print(f"{mixture}\nmedian cosines of {vectors.shape} vectors: {told}", flush=True)
    return mixture


def headline(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Figures of the rows until now."""
    found = {"least_recall_at_10": min(row["recall_at_10"] for row in rows)}
    speeds = [row["of_faiss"] for row in rows if row["of_faiss"] is not None]
    if speeds:
        found["least_speed_of_faiss"] = min(speeds)
    for what in ("mb", "build_cpu_s"):
        pairs = [(row[f"planned_{what}"], row[what]) for row in rows if row[what] is not None]
        found[f"largest_error_of_{what}"] = max((abs(plan / real - 1) for plan, real in pairs), default=0.0)
    return found


def prepare(device: torch.device, folder: Path, mixture: Mixture, config: IndexBenchConfig) -> None:
    """In a process of its own: vectors, queries and their exact answers, as files."""
    use_threads(config.threads)
    queries = write_synthetic(mixture, folder / "vectors.npy", config.vectors, config.width, 2 * config.queries)
    vectors = open_vectors(folder, config.width, config.vectors)
    np.savez(
        folder / "queries.npz", queries=queries, nearest=exact_nearest(vectors, queries, Mesh(MeshConfig(device="cpu")))
    )


def measure(device: torch.device, folder: Path, name: str, config: IndexBenchConfig) -> dict[str, Any]:
    """In a process of its own: the row of a kind."""
    kind, mesh, memory = KINDS[name], Mesh(MeshConfig(device="cpu")), Memory(torch.device("cpu"))
    torch.set_num_threads(config.threads)
    use_threads(config.threads)
    vectors, count = open_vectors(folder, config.width, config.vectors), config.queries
    asked = np.load(folder / "queries.npz")
    queries, nearest = asked["queries"], asked["nearest"]
    row: dict[str, Any] = {"kind": name, "planned_mb": kind.ram_bytes(config.width, config.vectors) / 1e6}
    made: dict[str, Any] = dict.fromkeys(("planned_build_cpu_s", "build_cpu_s", "build_s", "build_peak_mb"))
    if name == FLAT:
        with (folder / FILE).open("wb") as out:
            out.write(index_head(config.width, config.vectors))
            vectors.tofile(out)
    else:
        made["planned_build_cpu_s"] = plan_seconds(kind, vectors, 1, folder, time.process_time)
        before, started, used = memory.start(), time.perf_counter(), time.process_time()
        build_index(kind, vectors, folder, config.threads, mesh)
        made["build_cpu_s"], made["build_s"] = time.process_time() - used, time.perf_counter() - started
        made["build_peak_mb"] = (memory.peak() - before) / 1e6
    before = memory.start()
    if name == FLAT:
        index = VectorIndex(read_index(folder, config.width, config.vectors))
    else:
        index = VectorIndex(read_kind(folder / FILE, name, config.width, config.vectors), name, vectors)
        index.candidates(queries[:_TOUCHING], DEPTH, config.vectors if kind.knob == "nprobe" else DEPTH)
    row |= made | {"mb": (memory.peak() - before) / 1e6}
    tuned, failed = Tuned(0, 1, 1.0), ""
    try:
        if name != FLAT:
            tuned = tune(index, queries[:count], nearest[:count], config.recall)
    except UserError as error:
        failed = str(error)
        print(failed, flush=True)
        tuned = Tuned(index.effort, index.factor, 0.0)
    row |= {"effort": tuned.effort, "k_factor": tuned.factor, "tuned_recall_at_10": tuned.recall}
    row["recall_at_10"] = measured(index, queries[count:], nearest[count:])
    speeds: dict[str, Any] = dict.fromkeys(("queries_cpu_s", "faiss_queries_cpu_s", "of_faiss"))
    return {**row, **(speeds if failed else beside_faiss(index, kind, vectors, queries[count:])), "failed": failed}


def beside_faiss(index: VectorIndex, kind: IndexKind, vectors: np.ndarray, queries: np.ndarray) -> dict[str, float]:
    """Queries a second of processor time of our search, and of FAISS's own with the same settings and the same exact
    vectors to order candidates by.
    """
    faiss, bare = import_faiss(), index.index
    parameters = kind.parameters(index.effort, transformed=hasattr(bare, "chain"))
    if index.factor > 1:
        bare = faiss.IndexRefineFlat(bare, faiss.swig_ptr(np.ascontiguousarray(vectors, np.float32)))
        parameters = faiss.IndexRefineSearchParameters(k_factor=index.factor, base_index_params=parameters)
    started = time.process_time()
    index.search(torch.from_numpy(queries[:_TOUCHING]), DEPTH)
    each = (time.process_time() - started) / _TOUCHING
    some = queries[: max(_TOUCHING, int(_PASS_SECONDS / each))]
    asked = torch.from_numpy(some)
    ours, theirs = _seconds(lambda: index.search(asked, DEPTH), lambda: bare.search(some, DEPTH, params=parameters))
    return {
        "queries_cpu_s": len(some) / statistics.median(ours),
        "faiss_queries_cpu_s": len(some) / statistics.median(theirs),
        "of_faiss": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
    }


def _seconds(*searches: Callable[[], Any]) -> list[list[float]]:
    """Processor seconds of passes of each, in turn."""
    seconds: list[list[float]] = [[] for _ in searches]
    for number in range(_PASSES + 1):
        for spent, search in zip(seconds, searches, strict=True):
            started = time.process_time()
            search()
            if number:  # the first warms up
                spent.append(time.process_time() - started)
    return seconds


def main() -> int:
    """Entry point of `python -m harness.bench.index`."""
    return bench_main(MODULE, IndexBenchConfig, run, "Kinds of index: recall, speed, memory, build time.", EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
