"""An artefact with attributes and golden queries, made without training, for tests of its way out."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from harness.artefact.artefact import ARTEFACT_FORMAT
from harness.artefact.flat_index import write_index
from harness.artefact.query_encoder import write_query_encoder
from harness.core.manifest import write_manifest
from harness.data.preprocess import PreprocessSpec
from models.oclear import OclearConfig
from models.plain.transformer import PlainBuilder
from models.registry import METHODS
from models.text import TextConfig
from models.vision import VisionConfig

WIDTH = 16
TINY = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
MODEL = OclearConfig(
    vision=VisionConfig(**TINY, image_size=16, patch_size=8),  # type: ignore[arg-type]
    text=TextConfig(**TINY, vocab_size=48),  # type: ignore[arg-type]
    embedding_dim=WIDTH,
)
COLOURS = ("red", "blue", 'it\'s "odd" \\ ')


def artefact(folder: Path, rows: int = 300, seed: int = 0, first: int = 0, parts: int = 2) -> Path:
    """Writes an artefact of `rows` documents with sample ids from `first` on, in so many parts."""
    (folder / "documents").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) * 1.0001
    numbers = range(first, first + rows)
    table = pa.table(
        {
            "sample_id": pa.array(numbers, pa.int64()),
            "class_key": pa.array([f"class {i % 40}" for i in numbers]),
            "item": pa.array([f"item {i}" for i in numbers]),
            "title": pa.array([f"title\t{i}\n\\N “quoted” \0" for i in numbers]),
            "description": pa.array([""] * rows),
            "colour": pa.array([COLOURS[i % 3] if i % 7 else None for i in numbers], pa.string()),
            "shoe size": pa.array([str(i % 11) for i in numbers]),
            "thumbnail": pa.array([None] * rows, pa.binary()),
            "part_image": pa.array(vectors[:, 0]),
            "part_text": pa.array(1 - vectors[:, 0]),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), WIDTH),
        }
    )
    bounds = np.linspace(0, rows, parts + 1).astype(int)
    for part, (start, stop) in enumerate(pairwise(bounds)):
        file = folder / "documents" / f"part-{part:05d}.parquet"
        pq.write_table(table.slice(start, stop - start), file, row_group_size=50)
    write_index(folder, WIDTH)
    spec = METHODS["oclear"]
    torch.manual_seed(seed)
    write_query_encoder(spec.query_encoder(spec.towers(MODEL, PlainBuilder())), folder)
    (folder / "preprocess.json").write_text(json.dumps(PreprocessSpec(image_size=16).to_dict()))
    meta = {"format": ARTEFACT_FORMAT, "method": "oclear", "model": asdict(MODEL), "query": "image"}
    meta |= {"embedding_dim": WIDTH, "documents": rows, "backend": "reference", "run": "a run"}
    meta |= {"index": {"kind": "flat", "parameters": {}, "recall_at_10": 1.0}}
    (folder / "artefact.json").write_text(json.dumps(meta))
    write_manifest(folder, algorithm="sha256")
    return folder
