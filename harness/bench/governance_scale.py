"""Time and memory of `shelfmark govern` on click logs of several sizes."""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from harness.bench.catalogues import numbered, write_bare
from harness.bench.report import bench_main, finish
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
    write_bare(folder / "catalogue", _samples(2 * products, queries))
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
            table = [numbered("q", query[order]), numbered("d", document.ravel()[order])]
            clicked += int((clicks.ravel()[order] > 0).sum())
            numbers = [pa.array(values.ravel()[order]) for values in (clicks, impressions)]
            writer.write_table(pa.table([*table, *numbers], schema=LOG))
    return clicked


def _samples(documents: int, queries: int) -> Iterator[dict[str, Any]]:
    """Columns of a catalogue of documents, then queries."""
    for kind, count in (("document", documents), ("query", queries)):
        for first in range(0, count, AT_ONCE):
            ids = np.arange(first, min(first + AT_ONCE, count))
            yield {"item": numbered(kind[0], ids), "kind": kind, "split": "all"}


def main() -> int:
    """Entry point of `python -m harness.bench.governance_scale`."""
    sentence = "Time and memory of classes made of click logs of several sizes."
    return bench_main(MODULE, GovernanceScaleConfig, run, sentence, EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
