"""Export of a large catalogue: time and memory of a rank; and documents embedded per second beside the forward only."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.artefact.document_chunks import Columns, embed_documents, place_parts
from harness.artefact.index_export import IndexConfig, make_index
from harness.artefact.index_kinds import KINDS
from harness.bench.catalogues import numbered, write_bare
from harness.bench.evaluation import Blank
from harness.bench.ranks import Stages, on_ranks
from harness.bench.report import bench_main, finish
from harness.catalogue.catalogue import Catalogue
from harness.core.errors import UserError
from harness.core.manifest import write_manifest
from harness.core.mesh import Mesh, MeshConfig
from harness.core.waiting import on_first_rank
from harness.data.backends import decoding_threads
from harness.data.config import DataConfig
from harness.data.preprocess import WHITE
from harness.evaluate.embed import Embedder, side_of
from harness.text.tokenizer import Tokenizer
from harness.train.open_run import find_checkpoint, load_method, open_settings
from models.batch import Batch
from models.ranges import NonNegativeInt, PositiveInt

MODULE = "harness.bench.export"
EXAMPLE = f"python -m {MODULE} --documents 1000000 --kind ivf_sq8 --run-folder runs/demo/run --json export.json"
_ROWS = 1 << 16  # of the catalogue written at once
_CLUSTERS, _COLOURS = 4096, 12
_COMPUTED = 4096  # vectors computed at once
_KEPT = 16  # batches that the forward is timed on
_BATCH, _THUMBNAIL = 128, 160  # the defaults of `shelfmark export`


@dataclass(frozen=True, kw_only=True)
class ExportBenchConfig:
    """Exports a synthetic catalogue whose vectors are computed from the sample's number: every step of
    `shelfmark export` but the encoder and its input. With a run it also embeds the documents of the run's catalogue.

    Args:
        documents: of the catalogue; 0: it is not exported.
        width: numbers of a vector.
        kind: of index.
        ranks: processes that share the work.
        recall: share of the 10 nearest that the index must find.
        run_folder: a run, whose checkpoint embeds the documents of its catalogue, thumbnails included.
    """

    documents: NonNegativeInt = 10_000_000
    width: PositiveInt = 16
    kind: str = "ivf_sq8"
    ranks: PositiveInt = 1
    recall: float = 0.95
    run_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"--kind is {self.kind}", f"It can be {', '.join(KINDS)}")


def run(config: ExportBenchConfig) -> dict[str, Any]:
    """Measures, prints and returns the report (see `harness/bench/report.py`).

    Rows: for each stage the seconds, and the most memory that a rank held, libraries and mapped files included.
    Headline: the largest of these; documents per second of processor time, embedded, decoded and written, beside the
    method's forward on batches that are there.
    """
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    if config.documents:
        with tempfile.TemporaryDirectory(prefix="shelfmark-bench-") as name:
            write_bare(Path(name) / "catalogue", drawn(config.documents), ("colour",))
            rows = on_ranks(config.ranks, export, Path(name), config)
        headline["largest_peak_mib"] = max(row["peak_mib"] for row in rows)
        headline["export_documents_s"] = config.documents / sum(row["seconds"] for row in rows)
    if config.run_folder is not None:
        headline |= on_ranks(1, embed, config.run_folder)
    return finish(MODULE, config, headline, rows)


def drawn(documents: int) -> Iterator[dict[str, Any]]:
    """Columns of documents without texts, with a colour each."""
    for start in range(0, documents, _ROWS):
        ids = np.arange(start, min(start + _ROWS, documents))
        yield {
            "item": numbered("item-", ids),
            "kind": "document",
            "class_key": numbered("", ids),
            "split": "all",
            "colour": numbered("colour ", ids % _COLOURS),
        }


class Numbered:
    """A method whose vectors follow from the sample's number: clusters, and waves around their centres."""

    def __init__(self, width: int) -> None:
        self.towers = nn.Linear(1, 1)
        self._speed = torch.arange(1, width + 1, dtype=torch.float64).sqrt()
        self._centres = nn.functional.normalize(torch.randn(_CLUSTERS, width, generator=torch.Generator()))

    def embed_query(self, batch: Batch) -> Tensor:
        """[n, width], a little beside the document of the number."""
        return self._vectors(batch.query_ids, 0.5)

    def embed_document(self, batch: Batch, seen: str = "both") -> Tensor:
        """[n, width]."""
        return self._vectors(batch.document_ids, 0.0)

    def _vectors(self, numbers: Tensor, beside: float) -> Tensor:
        waves = ((numbers.double() + beside)[:, None] * self._speed).sin().float()
        return nn.functional.normalize(self._centres[numbers * 7919 % _CLUSTERS] + 0.1 * waves)


@dataclass(frozen=True)
class _Text:
    max_length: int = 1


@dataclass(frozen=True)
class _Model:
    embedding_dim: int
    text: _Text = _Text()
    query_text: None = None


def export(device: torch.device, folder: Path, config: ExportBenchConfig) -> list[dict[str, Any]]:
    """On every rank: a row for each stage with the most memory that a rank held, and the seconds."""
    mesh, stages = Mesh(MeshConfig(device="cpu")), Stages()
    out, kept = folder / "artefact", folder / "kept"
    model: Any = _Model(config.width)
    method: Any = Numbered(config.width)
    embedder = Embedder(DataConfig(), model, None, _COMPUTED, mesh)
    setattr(embedder, "reader", lambda catalogue: Blank())  # noqa: B010  (one object)
    catalogue = Catalogue(folder / "catalogue")

    def place() -> None:
        out.mkdir()
        place_parts([kept], out / "documents")

    index = IndexConfig(kind=config.kind, recall=config.recall)
    side = stages.run("open", lambda: side_of(catalogue, "document", None, [], None, 0))
    columns = Columns("float32", 0, WHITE, 1)
    stages.run("documents", lambda: embed_documents(method, embedder, side, "both", columns, kept, {}))
    on_first_rank(place, mesh, "placing the documents")
    stages.run("index", lambda: make_index(index, config.kind, out, method, embedder, side, "float32", 1))
    stages.run("checksums", lambda: write_manifest(out, mesh, "sha256"))
    return stages.rows


class _Kept:
    """A method that keeps the first batches of documents that it is given."""

    def __init__(self, method: Any) -> None:
        self.method, self.towers = method, method.towers
        self.batches: list[Batch] = []

    def embed_document(self, batch: Batch, seen: str = "both") -> Tensor:
        """The method's."""
        if len(self.batches) < _KEPT:
            self.batches.append(batch)
        found: Tensor = self.method.embed_document(batch, seen=seen)
        return found


def embed(device: torch.device, folder: Path) -> dict[str, float]:
    """Documents of a run's catalogue embedded per second of processor time, and by the forward only."""
    settings, tokenizer = open_settings(folder, 1), Tokenizer.load(folder)
    mesh = Mesh(MeshConfig())
    catalogue = Catalogue(settings.data.catalogue)
    method, model = load_method(settings, find_checkpoint(folder, None, mesh), tokenizer, mesh)
    side = side_of(catalogue, "document", None, [], None, 0)
    embedder = Embedder(settings.data, model, tokenizer, _BATCH, mesh)
    columns = Columns("float32", _THUMBNAIL, WHITE, decoding_threads(settings.data.threads))
    keeping: Any = _Kept(method)
    with tempfile.TemporaryDirectory(prefix="shelfmark-bench-") as name:
        started, used = time.perf_counter(), time.process_time()
        embed_documents(keeping, embedder, side, "both", columns, Path(name) / "kept", {})
        seconds, processor = time.perf_counter() - started, time.process_time() - used
    used = time.process_time()
    with torch.no_grad():
        for batch in keeping.batches:
            method.embed_document(batch, seen="both")
    forward = time.process_time() - used
    return {
        "embedded_documents": len(side.ids),
        "embedded_documents_s": len(side.ids) / seconds,
        "embedded_documents_cpu_s": len(side.ids) / processor,
        "forward_documents_cpu_s": sum(len(batch.document_ids) for batch in keeping.batches) / forward,
    }


def main() -> int:
    """Entry point of `python -m harness.bench.export`."""
    return bench_main(MODULE, ExportBenchConfig, run, "Export of large catalogues: time and memory.", EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
