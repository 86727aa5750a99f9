"""Catalogues without images, and click logs of known truth, for the tests of governance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.bench.catalogues import write_bare

LOG = pa.schema(
    [("query", pa.string()), ("document", pa.string()), ("clicks", pa.int64()), ("impressions", pa.int64())]
)


def bare_catalogue(folder: Path, samples: Sequence[tuple[str, str, str, str | None]]) -> Path:
    """A catalogue of samples (item, kind, split, class_key) whose images are not there."""
    columns = dict(zip(("item", "kind", "split", "class_key"), zip(*samples, strict=True), strict=True))
    return write_bare(folder, [{name: pa.array(values, pa.string()) for name, values in columns.items()}])


def write_log(file: Path, rows: Sequence[tuple[Any, ...]], schema: pa.Schema = LOG) -> Path:
    """A click log in Parquet."""
    columns = list(zip(*rows, strict=True)) or [[] for _ in schema]
    pq.write_table(pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema), file)
    return file
