"""Catalogues without images, and click logs of known truth, for the tests of governance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harness.catalogue.catalogue import CATALOGUE_FORMAT, INDEX_DTYPE, SAMPLE_SCHEMA

LOG = pa.schema(
    [("query", pa.string()), ("document", pa.string()), ("clicks", pa.int64()), ("impressions", pa.int64())]
)


def bare_catalogue(folder: Path, samples: Sequence[tuple[str, str, str, str | None]]) -> Path:
    """A catalogue of samples (item, kind, split, class_key) whose images are not there."""
    columns = dict(zip(("item", "kind", "split", "class_key"), zip(*samples, strict=True), strict=True))
    return bare_columns(folder, {name: pa.array(values, pa.string()) for name, values in columns.items()})


def bare_columns(folder: Path, columns: dict[str, Any]) -> Path:
    """As `bare_catalogue`, of whole columns."""
    (folder / "samples").mkdir(parents=True)
    (folder / "shards").mkdir()
    count = len(columns["item"])
    empty = pa.array(np.full(count, ""), pa.string())
    table = {name: columns.get(name, empty) for name in SAMPLE_SCHEMA.names[1:]}
    rows = pa.table({"sample_id": pa.array(np.arange(count)), **table}, schema=SAMPLE_SCHEMA)
    pq.write_table(rows, folder / "samples/part-00000.parquet")
    np.save(folder / "index.npy", np.zeros(count, INDEX_DTYPE))
    kinds = rows["kind"].value_counts().to_pylist()
    splits = rows["split"].value_counts().to_pylist()
    counts = {
        "query": 0, "document": 0, **{entry["values"]: entry["counts"] for entry in kinds},
        "splits": {entry["values"]: entry["counts"] for entry in splits},
    }  # fmt: skip
    meta = {
        "format": CATALOGUE_FORMAT, "num_samples": count, "num_shards": 0, "num_parts": 1, "attributes": [],
        "counts": counts,
    }  # fmt: skip
    (folder / "catalogue.json").write_text(json.dumps(meta))
    return folder


def write_log(file: Path, rows: Sequence[tuple[Any, ...]], schema: pa.Schema = LOG) -> Path:
    """A click log in Parquet."""
    columns = list(zip(*rows, strict=True)) or [[] for _ in schema]
    pq.write_table(pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema), file)
    return file
