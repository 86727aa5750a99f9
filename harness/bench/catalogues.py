"""Catalogues without images, for measurements that need only their tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harness.catalogue.catalogue import CATALOGUE_FORMAT, INDEX_DTYPE, SAMPLE_SCHEMA, part_name, shard_name
from harness.catalogue.writers import NpyWriter


def write_bare(folder: Path, batches: Iterable[Mapping[str, Any]], attributes: Sequence[str] = ()) -> Path:
    """Makes a catalogue whose images are not there, and returns `folder`.

    Args:
        folder: to make.
        batches: columns of the samples, batch after batch: name -> a value for each sample, or one text for all. A
            column of SAMPLE_SCHEMA that is missing is "" throughout; sample_id is the sample's place.
        attributes: names of the columns behind those of SAMPLE_SCHEMA.
    """
    for name in ("samples", "shards"):
        (folder / name).mkdir(parents=True)
    (folder / "shards" / shard_name(0)).touch()
    schema = pa.schema([*SAMPLE_SCHEMA, *((name, pa.string()) for name in attributes)])
    kinds, splits = Counter({"query": 0, "document": 0}), Counter[str]()
    with (
        NpyWriter(folder / "index.npy", INDEX_DTYPE) as index,
        pq.ParquetWriter(folder / "samples" / part_name(0), schema) as samples,
    ):
        for batch in batches:
            count = len(batch["item"])
            ids = np.arange(index.length, index.length + count)
            columns = {name: batch.get(name, "") for name in schema.names} | {"sample_id": ids}
            columns = {name: pa.repeat(x, count) if isinstance(x, str) else x for name, x in columns.items()}
            index.append(np.ones(count, INDEX_DTYPE))
            rows = pa.table(columns).cast(schema)
            samples.write_table(rows)
            for counter, name in ((kinds, "kind"), (splits, "split")):
                for entry in rows[name].value_counts().to_pylist():
                    counter[entry["values"]] += entry["counts"]
        total = index.length
    meta = {"format": CATALOGUE_FORMAT, "num_samples": total, "num_shards": 1, "num_parts": 1}
    counts = {**kinds, "splits": dict(splits)}
    (folder / "catalogue.json").write_text(json.dumps({**meta, "attributes": list(attributes), "counts": counts}))
    return folder


def numbered(prefix: str, numbers: np.ndarray) -> pa.Array:
    """Names of `numbers` [n]: each behind `prefix`."""
    return pc.binary_join_element_wise(prefix, pa.array(numbers).cast(pa.string()), "")
