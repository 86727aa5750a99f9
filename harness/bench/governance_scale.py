"""Time and memory of `shelfmark govern` on click logs of several sizes."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from harness.bench.report import bench_main, finish
from harness.catalogue.catalogue import CATALOGUE_FORMAT, INDEX_DTYPE, SAMPLE_SCHEMA
from harness.catalogue.writers import NpyWriter
from harness.commands.govern import GovernConfig
from harness.commands.govern import run as govern
from harness.core.errors import UserError
from models.ranges import NonNegativeInt, PositiveInt

Engine = Literal["duckdb", "spark"]
MODULE = "harness.bench.governance_scale"
EXAMPLE = f"python -m {MODULE} --rows 1000000,10000000 --memory 8GB --json governance_scale.json"
SHOWN = 7  # documents that a query is shown: two of its product, four others, a hot one
QUERIES_OF_A_PRODUCT = 12  # on average; each has two documents
HOT = 20  # one document in so many is hot
AT_ONCE = 1 << 18  # queries
RATES = np.array([0.35, 0.35, 0.03, 0.03, 0.03, 0.03, 0.15])  # clicks of an impression
LOG = pa.schema(
    [("query", pa.string()), ("document", pa.string()), ("clicks", pa.int64()), ("impressions", pa.int64())]
)


@dataclass(frozen=True, kw_only=True)
class GovernanceScaleConfig:
    """Draws click logs and governs each in a process of its own, with default values.

    Args:
        rows: rows of each log.
        engine: as `shelfmark govern` takes it.
        compare: with Spark: governs by DuckDB too and compares the files of both, byte for byte.
        master: of Spark.
        memory: limit, as 8GB.
        folder: for the logs and what spills; the system's temporary folder by default.
        seed: of all draws.
    """

    rows: tuple[PositiveInt, ...] = (1_000_000, 10_000_000)
    engine: Engine = "duckdb"
    compare: bool = False
    master: str = "local[*]"
    memory: str = ""
    folder: Path | None = None
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if min(self.rows, default=0) < 1000:
            raise UserError("--rows must name 1,000 rows or more")
        if self.compare and self.engine == "duckdb":
            raise UserError("--compare true compares Spark with DuckDB", "Add --engine spark")


def run(config: GovernanceScaleConfig) -> dict[str, Any]:
    """Measures, prints and returns the report (see `harness/bench/report.py`).

    Headline:
        seconds_N, cpu_seconds_N, peak_gb_N: of a log of N rows; seconds by the clock, cpu_seconds of all threads, the
            largest main memory of the process. Those of Spark's own processes are not counted.
        same_N: with --compare: 1 if both engines wrote the same files, else 0.
    """
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    for count in config.rows:
        with tempfile.TemporaryDirectory(prefix="shelfmark-bench-", dir=config.folder) as name:
            folder = Path(name)
            edges = draw(folder, count, config.seed)
            engines: list[Engine] = ["spark", "duckdb"] if config.compare else [config.engine]
            for engine in engines:
                shutil.copytree(folder / "catalogue", folder / engine)
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    measured = pool.submit(_measure, folder, engine, config).result()
                rows.append({"rows": count, "edges": edges, "engine": engine, **measured})
            first = rows[-len(engines)]
            headline |= {f"{what}_{count}": first[what] for what in ("seconds", "cpu_seconds", "peak_gb")}
            if config.compare:
                headline[f"same_{count}"] = float(_classes(folder / "spark") == _classes(folder / "duckdb"))
    return finish(MODULE, config, headline, rows)


def _measure(folder: Path, engine: Engine, config: GovernanceScaleConfig) -> dict[str, Any]:
    """In a process of its own: governs folder/ENGINE, and says what it took."""
    started = time.perf_counter()
    with redirect_stdout(StringIO()):
        summary = govern(
            GovernConfig(
                catalogue=folder / engine,
                clicks=folder / "clicks.parquet",
                engine=engine,
                master=config.master,
                memory=config.memory,
            )
        )
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_gb": used.ru_maxrss / 1e6,
        "classes": summary["num_classes"],
    }


def _classes(catalogue: Path) -> dict[str, bytes]:
    """The tables and arrays of a catalogue's classes, by name."""
    files = (catalogue / "classes").iterdir()
    return {path.name: path.read_bytes() for path in files if path.suffix in (".parquet", ".npy")}


def draw(folder: Path, rows: int, seed: int) -> int:
    """Writes folder/clicks.parquet and a catalogue without images; returns the number of rows with a click.

    Products have traffic by Zipf's law of exponent 1, and impressions a heavy tail.
    """
    queries = rows // SHOWN + 1
    products = queries // QUERIES_OF_A_PRODUCT + HOT
    _write_catalogue(folder / "catalogue", 2 * products, queries)
    clicked = 0
    with pq.ParquetWriter(folder / "clicks.parquet", LOG) as writer:
        for first in tqdm(range(0, queries, AT_ONCE), "log", unit=f" x {AT_ONCE} queries", leave=False, delay=5):
            rng = np.random.default_rng([seed, first])
            count = min(AT_ONCE, queries - first)
            product = (products ** rng.random(count)).astype(np.int64) - 1
            own = 2 * product[:, None] + [0, 1]
            others = rng.integers(0, 2 * products, (count, SHOWN - 3))
            hot = HOT * rng.integers(0, 2 * products // HOT, (count, 1))
            document = np.concatenate([own, others, hot], 1)
            impressions = np.minimum(1 + 2 * rng.pareto(1.1, (count, 1)) * rng.random((count, SHOWN)), 1000).astype(int)
            clicks = rng.binomial(impressions, RATES)
            order = rng.permutation(document.size)[: rows - first * SHOWN]
            query = np.repeat(first + np.arange(count), SHOWN)
            table = [_names("q", query[order]), _names("d", document.ravel()[order])]
            clicked += int((clicks.ravel()[order] > 0).sum())
            numbers = [pa.array(values.ravel()[order]) for values in (clicks, impressions)]
            writer.write_table(pa.table([*table, *numbers], schema=LOG))
    return clicked


def _names(prefix: str, numbers: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(prefix, pa.array(numbers).cast(pa.string()), "")


def _write_catalogue(folder: Path, documents: int, queries: int) -> None:
    """A catalogue whose images are not there: documents, then queries."""
    for name in ("samples", "shards"):
        (folder / name).mkdir(parents=True)
    total = documents + queries
    with (
        NpyWriter(folder / "index.npy", INDEX_DTYPE) as index,
        pq.ParquetWriter(folder / "samples/part-00000.parquet", SAMPLE_SCHEMA) as samples,
    ):
        for kind, offset, count in (("document", 0, documents), ("query", documents, queries)):
            for first in range(0, count, AT_ONCE):
                ids = np.arange(first, min(first + AT_ONCE, count))
                index.append(np.zeros(len(ids), INDEX_DTYPE))
                columns = {name: pa.repeat(pa.scalar(""), len(ids)) for name in SAMPLE_SCHEMA.names}
                columns |= {"sample_id": pa.array(offset + ids), "kind": pa.repeat(pa.scalar(kind), len(ids))}
                columns |= {"item": _names(kind[0], ids), "split": pa.repeat(pa.scalar("all"), len(ids))}
                samples.write_table(pa.table(columns, schema=SAMPLE_SCHEMA))
    meta = {
        "format": CATALOGUE_FORMAT, "num_samples": total, "num_shards": 0, "num_parts": 1, "attributes": [],
        "counts": {"query": queries, "document": documents, "splits": {"all": total}},
    }  # fmt: skip
    (folder / "catalogue.json").write_text(json.dumps(meta))


def main() -> int:
    """Entry point of `python -m harness.bench.governance_scale`."""
    sentence = "Time and memory of classes made of click logs of several sizes."
    return bench_main(MODULE, GovernanceScaleConfig, run, sentence, EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
