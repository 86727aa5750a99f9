"""The index of an export: chosen, planned, built, tuned, and reported as artefact.json holds it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from harness.artefact.flat_index import FILE, write_index
from harness.artefact.index_build import build_index, use_threads
from harness.artefact.index_kinds import FLAT, KINDS, shown
from harness.artefact.index_plan import plan_seconds
from harness.artefact.index_read import read_kind
from harness.artefact.index_tune import DEPTH, exact_nearest, halves, tune
from harness.artefact.vector_index import VectorIndex
from harness.artefact.vectors_file import open_vectors, write_vectors
from harness.core.errors import UserError
from harness.core.evenly import evenly
from harness.core.waiting import gather_objects, on_first_rank
from harness.evaluate.embed import Embedder, Side, side_of
from harness.text.tokenizer import FIELDS
from models.method import Method, query_kind

QUERIES = 1000  # half of them tune an index, half measure its recall


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Kind of the index, and the recall that it must reach.

    Args:
        kind: flat compares a query with every document, exactly. Others (hnsw, hnsw_bf16, ivf_flat, sq_fp16, sq_bf16,
            ivf_sq8, sq8, ivf_rabitq, ivf_pq) look at a part of them or at shorter codes, and are tuned on photos or
            titles of the catalogue until they find `recall` of what flat finds. auto: flat, or what fits `ram`.
        ram: main memory that the index may take in a search service, as 500MB or 2GB.
        recall: share of a query's 10 nearest documents that must be among the 10 found, on average.
    """

    kind: str = "auto"
    ram: str = ""
    recall: float = 0.95

    def __post_init__(self) -> None:
        if self.kind not in ("auto", *KINDS):
            raise UserError(f"--index.kind is {self.kind}", f"It can be auto, {', '.join(KINDS)}")
        if not 0 < self.recall <= 1:
            raise UserError(f"--index.recall is {self.recall:g}", "It must be above 0 and at most 1")


def make_index(
    config: IndexConfig,
    kind: str,
    stage: Path,
    method: Method,
    embedder: Embedder,
    side: Side,
    dtype: str,
    threads: int,
    old: Path | None = None,
    first: int = 0,
) -> dict[str, Any]:
    """Writes the index of stage/documents; collective.

    Args:
        config: the recall.
        kind: a name in KINDS.
        stage: the folder of the artefact.
        method: embeds the queries that the index is tuned on.
        embedder: its mesh's ranks build.
        side: documents of the catalogue.
        dtype: float32 or float16, of the exact vectors.
        threads: of this rank.
        old: artefact whose index of the `first` vectors the others are added to; None: there is none.
        first: vectors in it.

    Returns:
        kind, parameters of a search, recall_at_10, queries (held out, that it was measured on), ram_bytes,
        build_seconds.

    Raises:
        UserError: the kind does not reach the recall.
    """
    mesh, width = embedder.mesh, embedder.model.embedding_dim
    rows = sum(pq.read_metadata(part).num_rows for part in (stage / "documents").iterdir())
    if kind == FLAT:
        on_first_rank(lambda: write_index(stage, width), mesh, "writing the index")
        report = {"kind": FLAT, "parameters": {}, "recall_at_10": 1.0, "queries": 0}
        return {**report, "ram_bytes": KINDS[FLAT].ram_bytes(width, rows), "build_seconds": 0.0}
    on_first_rank(lambda: write_vectors(stage, width, dtype), mesh, "writing the vectors")
    vectors = open_vectors(stage, width, rows)

    def plan() -> None:
        use_threads(threads, alone=True)
        seconds = plan_seconds(KINDS[kind], vectors, mesh.world_size, stage)
        ram = shown(KINDS[kind].ram_bytes(width, rows))
        print(f"index of {rows:,} vectors, kind {kind}: {ram} of memory, about {seconds:,.0f} s to build", flush=True)

    if old is None:
        on_first_rank(plan, mesh, "planning the index")
    started = time.perf_counter()
    build_index(KINDS[kind], vectors, stage, threads, mesh, None if old is None else old / FILE, first)
    seconds = time.perf_counter() - started
    queries = tuning_queries(method, embedder, side)
    nearest = exact_nearest(vectors, queries, mesh)

    def settle() -> dict[str, Any]:
        index = VectorIndex(read_kind(stage / FILE, kind, width, rows), kind, vectors)
        tuned, knob = tune(index, queries, nearest, config.recall), KINDS[kind].knob
        parameters = {**({knob: tuned.effort} if knob else {}), "k_factor": tuned.factor}
        told, held_out = ", ".join(f"{name} {value}" for name, value in parameters.items()), halves(len(queries))[1]
        count = len(queries[held_out])
        print(f"index: recall@{DEPTH} {tuned.recall:.4f} of {count:,} held-out queries with {told}", flush=True)
        return {
            "kind": kind,
            "parameters": parameters,
            "recall_at_10": tuned.recall,
            "queries": count,
            "ram_bytes": (stage / FILE).stat().st_size,
            "build_seconds": round(seconds, 3),
        }

    return on_first_rank(settle, mesh, "tuning the index")


def tuning_queries(method: Method, embedder: Embedder, documents: Side) -> np.ndarray:
    """Vectors of at most QUERIES queries, float32 [q, d], the same on every rank: query photos that nobody trained on
    where the catalogue has them, else photos of documents, or their titles for a method that takes texts; collective.
    """
    catalogue, model, mesh = documents.catalogue, embedder.model, embedder.mesh
    if query_kind(model) == "text":
        chosen = documents.select(evenly(len(documents.ids), QUERIES))
        (table,) = chosen.read(FIELDS[:1], range(len(chosen.ids)), QUERIES)
        own = embedder.embed_texts(method, table.column(FIELDS[0]).to_pylist())
    else:
        splits = [name for name in ("val", "test") if name in catalogue.meta["counts"]["splits"]]
        photos = side_of(catalogue, "query", splits[0], [], None, 0) if splits else None
        asked = photos if photos is not None and len(photos.ids) else documents
        own = embedder.embed(method, replace(asked.select(evenly(len(asked.ids), QUERIES)), kind="query"))
    parts = gather_objects(own.vectors.float().cpu().numpy(), mesh.dp)
    return np.concatenate(parts)
