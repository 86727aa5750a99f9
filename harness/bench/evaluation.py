"""Main memory of a rank that evaluates and exports a large catalogue, without its images and encoder."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from harness.artefact.document_chunks import Columns, embed_documents, place_parts
from harness.artefact.flat_index import write_index
from harness.bench.catalogues import write_bare
from harness.bench.ranks import MIB, Stages, on_ranks
from harness.bench.report import bench_main, finish
from harness.catalogue.catalogue import Catalogue
from harness.catalogue.writers import ROW_GROUP, NpyWriter
from harness.commands import tokenizer
from harness.core.errors import UserError
from harness.core.manifest import write_manifest
from harness.core.mesh import Mesh, MeshConfig
from harness.core.waiting import on_first_rank
from harness.data.config import DataConfig
from harness.data.images import Pixels
from harness.data.preprocess import WHITE
from harness.evaluate.embed import side_of
from harness.evaluate.evaluation import Evaluation, EvaluationConfig
from harness.text.tokenizer import FIELDS, Tokenizer, copy_tokenizer
from models.batch import Batch
from models.ranges import AtLeastTwo, PositiveInt

MODULE = "harness.bench.evaluation"
EXAMPLE = f"python -m {MODULE} --documents 1000000,2000000 --ranks 1,2 --json evaluation.json"
PHRASES = 997  # distinct titles, and distinct descriptions
COLOURS, CATEGORIES = 12, 50
STAGES = ("open", "evaluate", "export")


@dataclass(frozen=True, kw_only=True)
class EvaluationBenchConfig:
    """Evaluates and exports synthetic catalogues of texts with random vectors, on every number of ranks.

    Each document has an id and a title of its own, shares its class with one other, and has a colour and a category.
    The tasks are photo search, text search by category and category prediction; export writes documents, index and
    checksums, without thumbnails.

    Args:
        documents: sizes of the catalogues.
        ranks: numbers of processes that share each of them.
        queries: photos that are asked.
        embedding_dim: width of the vectors.
        probe_documents: as evaluation.probe_documents.
        bare_titles: also search by text without the colours' words, for which every title is encoded again.
    """

    documents: tuple[PositiveInt, ...] = (500_000, 1_000_000)
    ranks: tuple[PositiveInt, ...] = (1, 2)
    queries: PositiveInt = 100
    embedding_dim: PositiveInt = 16
    probe_documents: AtLeastTwo = 2000
    bare_titles: bool = False

    def __post_init__(self) -> None:
        if not self.documents or not self.ranks:
            raise UserError("--documents or --ranks is empty", "Name one number or more")
        if min(self.documents) < 4 * CATEGORIES:
            raise UserError(f"--documents has {min(self.documents)}", f"It must be at least {4 * CATEGORIES}")


def run(config: EvaluationBenchConfig) -> dict[str, Any]:
    """Measures, prints and returns the report (see `harness/bench/report.py`).

    Rows: the most memory that a rank held in each stage, libraries and mapped files included. Headline: the largest of
    all; and, where sizes and ranks allow it, the bytes that each document costs every rank, those that it costs its own
    rank besides, and what that gives for 10 million documents on 8 ranks, by least squares.
    """
    rows: list[dict[str, Any]] = []
    for documents in config.documents:
        with tempfile.TemporaryDirectory(prefix="shelfmark-bench-") as name:
            draw_catalogue(Path(name) / "catalogue", documents, config.queries)
            for ranks in config.ranks:
                found = on_ranks(ranks, measure, Path(name), config)
                rows += [{"documents": documents, "ranks": ranks, **row} for row in found]
    most = [max(row["peak_mib"] for row in rows[i : i + len(STAGES)]) for i in range(0, len(rows), len(STAGES))]
    headline = {"largest_peak_mib": max(most)}
    sizes = np.array([(row["documents"], row["documents"] / row["ranks"], 1) for row in rows[:: len(STAGES)]])
    if np.linalg.matrix_rank(sizes / sizes.max(0)) == 3:
        every, own, rest = np.linalg.lstsq(sizes, np.array(most) * MIB, rcond=None)[0]
        headline |= {"bytes_per_document": every, "bytes_per_own_document": own}
        headline["computed_mib_10m_on_8_ranks"] = (rest + 10e6 * (every + own / 8)) / MIB
    return finish(MODULE, config, headline, rows)


def draw_catalogue(folder: Path, documents: int, queries: int) -> None:
    """A catalogue of documents without images, then query photos without images, with classes and tokens."""
    total, rng = documents + queries, np.random.default_rng(0)
    words = np.array(["".join(rng.choice([*"abcdefghiklmnoprstuvw"], rng.integers(3, 9))) for _ in range(500)])
    phrases = {
        field: [" ".join(rng.choice(words, length)) for _ in range(PHRASES)]
        for field, length in zip(FIELDS, (12, 40), strict=True)
    }
    batches = (range(start, min(start + ROW_GROUP, total)) for start in range(0, total, ROW_GROUP))
    write_bare(folder, (_columns(ids, documents, phrases) for ids in batches), ("colour", "category"))
    (folder / "classes").mkdir()
    classes = {"class_key": [f"class-{i}" for i in range(4)], "tail": [False, True] * 2}
    pq.write_table(pa.table(classes), folder / "classes" / "classes.parquet")
    _draw_tokens(folder, documents, total, phrases)


def _columns(ids: range, documents: int, phrases: dict[str, list[str]]) -> dict[str, list[str]]:
    rows = [_row(i, documents, phrases) for i in ids]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _row(i: int, documents: int, phrases: dict[str, list[str]]) -> dict[str, str]:
    photo = i >= documents
    split = "test" if photo else "train" if i % 10 == 0 else "all"
    return {
        "item": f"photo-{i}" if photo else f"item-{i:09d}",
        "kind": "query" if photo else "document",
        "class_key": f"class-{(i - documents) * 7 % documents // 2 if photo else i // 2}",
        "split": split,
        "image": f"images/{i:09d}.jpg",
        **{field: "" if photo else texts[i % PHRASES] for field, texts in phrases.items()},
        "colour": f"colour {i % COLOURS}",
        "category": f"category {i // COLOURS % CATEGORIES}",
    }


def _draw_tokens(folder: Path, documents: int, total: int, phrases: dict[str, list[str]]) -> None:
    """tokenizer/: learned from the phrases, whose tokens are repeated as their texts are."""
    small = folder.parent / "phrases"
    write_bare(small, [{"item": phrases[FIELDS[0]], "kind": "document", "split": "train", **phrases}])
    tokenizer.run(tokenizer.TokenizerConfig(catalogue=small, vocab_size=400))
    copy_tokenizer(small, folder)
    learned = Tokenizer.load(folder)
    for field, texts in phrases.items():
        encoded = learned.encode_all(texts)
        lengths = np.array([len(ids) for ids in encoded])
        with (
            NpyWriter(folder / "tokenizer" / f"{field}.tokens.npy", np.int32) as tokens,
            NpyWriter(folder / "tokenizer" / f"{field}.offsets.npy", np.int64) as offsets,
        ):
            offsets.append([0])
            for start in range(0, documents, PHRASES):
                count = min(PHRASES, documents - start)
                ends = tokens.length + np.cumsum(lengths[:count])
                tokens.append(np.concatenate(encoded[:count]))
                offsets.append(ends)
            offsets.append(np.full(total - documents, tokens.length))


class Drawn:
    """A method whose vectors are waves of the sample's number, or of a text's tokens."""

    parts = ()

    def __init__(self, width: int) -> None:
        self.towers = nn.Linear(1, 1)
        self._speed = torch.arange(1, width + 1, dtype=torch.float64).sqrt()

    def embed_query(self, batch: Batch) -> Tensor:
        """[n, width]."""
        return self._wave(batch.query_tokens.sum(1) if len(batch.query_tokens) else batch.query_ids)

    def embed_document(self, batch: Batch, seen: str = "both") -> Tensor:
        """[n, width]."""
        return self._wave(batch.document_ids + batch.document_tokens.sum(1) % 2)

    def _wave(self, number: Tensor) -> Tensor:
        return nn.functional.normalize((number.double()[:, None] * self._speed).sin().float())


class Blank:
    """Reads images that are not there."""

    def stream(self, blocks: Iterable[np.ndarray]) -> Iterator[Pixels]:
        """One black pixel for each sample."""
        for ids in blocks:
            yield Pixels(torch.zeros(len(ids), 3, 1, 1), torch.ones(len(ids), dtype=torch.bool))

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class _Text:
    max_length: int = 64


@dataclass(frozen=True)
class _Model:
    embedding_dim: int
    text: _Text = _Text()
    query_text: _Text = _Text(32)


def measure(device: torch.device, folder: Path, config: EvaluationBenchConfig) -> list[dict[str, Any]]:
    """On every rank: a row for each of STAGES with the most memory that a rank held, and the seconds."""
    mesh, stages = Mesh(MeshConfig()), Stages()
    settings = EvaluationConfig(
        split="test",
        batch_size=512,
        tasks=("photo", "text", "category"),
        query_attributes=("category",),
        bare_titles=("colour",) if config.bare_titles else (),
        category="category",
        slices=("colour",),
        learn_split="train",
        probe_documents=config.probe_documents,
    )
    catalogue, learned = Catalogue(folder / "catalogue"), Tokenizer.load(folder / "catalogue")
    classes = folder / "catalogue" / "classes" / "classes.parquet"
    method: Any = Drawn(config.embedding_dim)
    model: Any = _Model(config.embedding_dim)

    evaluation = stages.run(
        "open", lambda: Evaluation(settings, "make", DataConfig(), model, catalogue, learned, classes, mesh)
    )
    setattr(evaluation.embedder, "reader", lambda catalogue: Blank())  # noqa: B010  (one object, for all tasks)
    stages.run("evaluate", lambda: evaluation.run(method))
    embedder = evaluation.embedder

    def export() -> None:
        out, kept = (folder / f"{name}-{mesh.world_size}" for name in ("artefact", "kept"))
        on_first_rank(out.mkdir, mesh, "making a folder")
        side = side_of(catalogue, "document", None, [], None, 0)
        embed_documents(method, embedder, side, "both", Columns("float32", 0, WHITE, 1), kept, {})
        on_first_rank(lambda: place_parts([kept], out / "documents"), mesh, "placing the documents")
        on_first_rank(lambda: write_index(out, config.embedding_dim), mesh, "writing the index")
        write_manifest(out, mesh)

    stages.run("export", export)
    return stages.rows


def main() -> int:
    """Entry point of `python -m harness.bench.evaluation`."""
    return bench_main(
        MODULE, EvaluationBenchConfig, run, "Main memory of evaluation and export by documents and ranks.", EXAMPLE
    )


if __name__ == "__main__":
    sys.exit(main())
