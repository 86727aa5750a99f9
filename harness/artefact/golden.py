"""Golden inputs of an artefact: a few queries with the embeddings and the documents that they had at export.

    golden/golden.json       each query: its photo or text, its class, the best documents by exact search
    golden/photo-NN.*        the photos as they came
    golden/inputs.npy        what the encoder takes: float32 [n, 3, S, S], or tokens int64 [n, L]
    golden/embeddings.npy    float32 [n, d]

They show on any machine, years later, that decoder, preprocessing, encoder and index still do what they did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.artefact.rows import Rows, exact_top
from harness.catalogue.catalogue import Catalogue, CorruptSample, open_array
from harness.catalogue.images import Rejected, check_image
from harness.core.errors import UserError
from harness.core.evenly import evenly
from harness.core.files import read_record, write_json
from harness.data.backends import open_pipeline
from harness.data.config import DataConfig
from harness.data.preprocess import PreprocessSpec, draw_parameters
from harness.text.tokenizer import Tokenizer, TokenStore
from models.method import MethodConfig

FOLDER = "golden"
TOP = 10
MOST = 64  # queries that are read
MOST_INPUT = 1 << 24  # bytes of inputs.npy, more for two queries only
MOST_PHOTO = 1 << 20  # bytes of a photo
_SEEN = 4096  # samples of the catalogue that are looked at
_LONGEST = 200  # characters of a text


@dataclass(frozen=True)
class Query:
    """A golden query.

    Args:
        photo: file of the photo, all of which is searched for; None for a text.
        text: the text; empty for a photo.
        class_key: class of the right documents; empty: unknown.
        found: sample ids of the best documents, by exact search.
    """

    photo: Path | None
    text: str
    class_key: str
    found: list[int]


@dataclass(frozen=True)
class Golden:
    """The golden inputs of an artefact, n queries."""

    queries: list[Query]
    inputs: np.ndarray
    embeddings: np.ndarray


@torch.no_grad()
def write_golden(
    stage: Path,
    encoder: nn.Module,
    model: MethodConfig,
    data: DataConfig,
    catalogue: Catalogue,
    tokenizer: Tokenizer,
    count: int,
) -> Golden:
    """Writes stage/golden beside the finished documents, and reads it.

    Queries are photos of split test, else of any split, else pictures of documents; texts are titles of documents.

    Args:
        stage: the artefact in the making.
        encoder: the query encoder, fp32 on the CPU.
        model: the method's configuration.
        data: the run's preprocessing and decoder.
        catalogue: where photos and titles come from.
        tokenizer: the run's.
        count: queries wanted, at most 64; fewer where their inputs need more than 16 MiB.
    """
    if not count:
        return read_golden(stage, model.embedding_dim)
    folder, spec = stage / FOLDER, data.preprocess
    folder.mkdir()
    if model.query_text is None:
        room = max(2, MOST_INPUT // (12 * spec.image_size**2))
        told, inputs = _photos(folder, catalogue, spec, data.backend, min(count, MOST, room))
    else:
        rows = [row for row in _samples(catalogue, ("document", None)) if row["title"].strip()]
        chosen = [rows[place] for place in evenly(len(rows), min(count, MOST))]
        told = [{"text": row["title"][:_LONGEST], "class_key": row["class_key"] or ""} for row in chosen]
        store = TokenStore.encode(tokenizer, {"query": [row["text"] for row in told]})
        inputs = torch.from_numpy(store.batch(np.arange(len(told)), model.query_text.max_length, ["query"]))
    embeddings = encoder(inputs) if told else torch.empty(0, model.embedding_dim)
    for name, array in (("inputs", inputs), ("embeddings", embeddings)):
        np.save(folder / f"{name}.npy", array.numpy())
    documents = Rows(stage)
    best, scores = exact_top(documents, embeddings, TOP)
    samples = _sample_ids(documents, best)
    for row, found, score in zip(told, samples, scores.tolist(), strict=True):
        row["found"] = [{"sample_id": i, "score": s} for i, s in zip(found, score, strict=True)]
    write_json(folder / "golden.json", {"queries": told})
    return read_golden(stage, model.embedding_dim)


def _samples(catalogue: Catalogue, *choices: tuple[str, str | None]) -> list[dict[str, Any]]:
    """The first samples of the first (kind, split) that has some."""
    for kind, split in choices:
        batches = catalogue.batches(["class_key", "title"], kind=kind, split=split)
        if found := [*islice((row for batch in batches for row in batch.to_pylist()), _SEEN)]:
            return found
    return []


def _photos(
    folder: Path, catalogue: Catalogue, spec: PreprocessSpec, backend: str, count: int
) -> tuple[list[dict[str, Any]], Tensor]:
    """Writes the photos; returns what golden.json says of them, and the encoder's inputs."""
    told: list[dict[str, Any]] = []
    photos: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    rows = _samples(catalogue, ("query", "test"), ("query", None), ("document", None))
    for row in (rows[place] for place in evenly(len(rows), count)):
        try:
            data = catalogue.read_bytes(row["sample_id"])
            image = check_image(data, 1 << 24, halve=False)
        except (CorruptSample, Rejected):
            continue
        if len(data) > MOST_PHOTO:
            continue
        name = f"photo-{len(told):02d}.{image.extension}"
        (folder / name).write_bytes(data)
        photos.append(data)
        sizes.append((image.width, image.height))
        told.append({"photo": name, "class_key": row["class_key"] or ""})
    if not photos:
        return told, torch.empty(0, 3, spec.image_size, spec.image_size)
    widths, heights = np.array(sizes).T
    parameters = draw_parameters(spec, 0, 0, np.arange(len(told)), widths, heights, train=False)
    with closing(open_pipeline(spec, backend, len(told), 1, torch.device("cpu"))) as pipeline:
        images, ok = pipeline.decode(photos, parameters)
    for row, good in zip(told, ok.tolist(), strict=True):
        if not good:  # checked by Pillow, refused by DALI
            (folder / row["photo"]).unlink()
    return [row for row, good in zip(told, ok.tolist(), strict=True) if good], images[ok]


def _sample_ids(rows: Rows, best: Tensor) -> list[list[int]]:
    """Sample ids of row numbers [n, k]."""
    ids: dict[int, int] = {}
    wanted, first = torch.unique(best).numpy(), 0
    for table in rows.batches(["sample_id"]):
        inside = wanted[(wanted >= first) & (wanted < first + len(table))]
        ids.update(zip(inside.tolist(), table.column(0).to_numpy()[inside - first].tolist(), strict=True))
        first += len(table)
    return [[ids[row] for row in found] for found in best.tolist()]


def read_golden(folder: Path, width: int) -> Golden:
    """The golden inputs of the artefact `folder`, whose embeddings have `width` numbers; none of 0 queries where it was
    exported without.

    Raises:
        UserError: the files are damaged, or do not belong together.
    """
    golden = folder / FOLDER
    if not golden.is_dir():
        return Golden([], np.empty((0, 1), np.int64), np.empty((0, width), np.float32))
    record = read_record(golden / "golden.json", "Export again")
    queries = [*_queries(record.file, record.list_of("queries", dict))]
    inputs = _inputs(golden / "inputs.npy", photos=bool(queries) and queries[0].photo is not None)
    embeddings = open_array(golden / "embeddings.npy", np.float32, "Export again", 2)
    if len(inputs) != len(queries) or embeddings.shape != (len(queries), width) or len(queries) > MOST:
        record.refuse(f"{len(queries)} queries, inputs {inputs.shape}, embeddings {embeddings.shape}")
    return Golden(queries, np.array(inputs), np.array(embeddings))


def _inputs(file: Path, photos: bool) -> np.ndarray:
    return open_array(file, np.float32, "Export again", 4) if photos else open_array(file, np.int64, "Export again", 2)


def _queries(file: Path, rows: list[Any]) -> Iterator[Query]:
    for row in rows:
        photo, found = row.get("photo"), row.get("found")
        texts = (row.get("text", ""), row.get("class_key", ""), photo or "")
        whole = (
            all(isinstance(text, str) for text in texts)
            and isinstance(found, list)
            and all(isinstance(hit, dict) and type(hit.get("sample_id")) is int for hit in found)
        )
        if not whole or Path(texts[2]).name != texts[2]:
            raise UserError(f"{file} is damaged (queries)", "Export again")
        path = file.parent / photo if photo else None
        yield Query(path, texts[0], texts[1], [hit["sample_id"] for hit in found])


def lowest_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The lowest cosine of pairs of vectors [n, d]; -1 where one is 0 or not finite."""
    a, b = (vectors.astype(np.float64) for vectors in (a, b))
    with np.errstate(all="ignore"):
        cosines = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(np.nan_to_num(cosines, nan=-1, posinf=-1, neginf=-1).min(initial=1))
