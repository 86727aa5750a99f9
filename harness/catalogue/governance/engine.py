"""Engines of the rules: DuckDB, embedded, which spills to disk; Spark, for clusters.

An engine reads Parquet, and runs an expression into Parquet. No other call is used: Ibis on these versions of DuckDB
lacks some, and a result on disk bounds memory on both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pyarrow.parquet as pq
from tqdm import tqdm

from harness.core.errors import UserError

STEPS = 40  # of classes from clicks that need no split


class Engine:
    """DuckDB in this process.

    Args:
        spill: an empty folder for results and temporary files.
        memory: limit, as 8GB; 80 % of the machine's by default.

    Raises:
        UserError: `memory` is not an amount.
    """

    def __init__(self, spill: Path, memory: str = "") -> None:
        self.spill = spill
        self._steps = tqdm(desc="govern", unit=" steps", total=STEPS, leave=False, delay=5)
        self._backend = self._connect(memory)

    def _connect(self, memory: str) -> Any:
        limit = {"memory_limit": memory} if memory else {}
        return ibis.duckdb.connect(temp_directory=str(self.spill), preserve_insertion_order=False, **limit)

    def read(self, files: Sequence[Path]) -> ibis.Table:
        """The rows of Parquet files of equal columns."""
        return self._backend.read_parquet([str(file) for file in files])

    def keep(self, name: str, table: ibis.Table) -> ibis.Table:
        """Runs `table` into the spill folder, and reads the result back."""
        self._steps.set_postfix_str(name, refresh=False)
        self._steps.total = max(STEPS, self._steps.n + 1)  # a split takes more
        self.write(table, self.spill / f"{name}.parquet")
        self._steps.update()
        return self.read(self.parts(name))

    def write(self, table: ibis.Table, path: Path) -> None:
        """Runs `table` into the Parquet file `path`, which Spark makes a folder."""
        self._backend.to_parquet(table, path)

    def parts(self, name: str) -> list[Path]:
        """Files of the result `name` of `keep`."""
        path = self.spill / f"{name}.parquet"
        return sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]

    def batches(self, name: str, columns: list[str] | None, rows: int) -> Iterator[Any]:
        """Record batches of the result `name`, at most `rows` each; None for all columns."""
        for part in self.parts(name):
            with pq.ParquetFile(part) as file:
                yield from file.iter_batches(rows, columns=columns)

    def close(self) -> None:
        """Ends the engine."""
        self._steps.close()
        self._backend.disconnect()


class SparkEngine(Engine):
    """Spark. A cluster's nodes must see the catalogue, the log and the folder of the classes under the same paths.

    Args:
        spill: as for Engine.
        memory: of the driver and of each executor, as 8g; Spark's default otherwise.
        master: master of the session.

    Raises:
        UserError: pyspark or Java is missing, or the session does not start.
    """

    def __init__(self, spill: Path, memory: str = "", master: str = "local[*]") -> None:
        self._master = master
        super().__init__(spill, memory)

    def _connect(self, memory: str) -> Any:
        try:
            failure = import_module("pyspark.errors").PySparkException
            builder = import_module("pyspark.sql").SparkSession.builder
        except ImportError as error:
            raise UserError("--engine spark needs pyspark", "Install it: pip install 'shelfmark[spark]'") from error
        local = self._master.startswith("local")
        if local:
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        os.environ.setdefault("SPARK_WORKER_DIR", str(self.spill / "spark-work"))
        options = {
            "spark.ui.enabled": "false",
            "spark.sql.session.timeZone": "UTC",
            "spark.sql.ansi.enabled": "true",  # an overflow is an error, as it is in DuckDB
            "spark.sql.warehouse.dir": str(self.spill / "warehouse"),
            "spark.local.dir": str(self.spill / "spark"),
            **({"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"} if local else {}),
            **({"spark.sql.shuffle.partitions": "4"} if local else {}),
            **({"spark.driver.memory": memory, "spark.executor.memory": memory} if memory else {}),
        }
        builder = builder.master(self._master).appName("shelfmark govern")
        for name, value in options.items():
            builder = builder.config(name, value)
        try:
            self._session = builder.getOrCreate()
        except (failure, RuntimeError, OSError) as error:
            raise UserError(
                f"Spark does not start on {self._master} ({first_line(error)})", "Check --master, --memory and Java 17"
            ) from error
        self._session.sparkContext.setLogLevel("ERROR")
        return ibis.pyspark.connect(self._session)

    def read(self, files: Sequence[Path]) -> ibis.Table:
        """See Engine."""
        name = ibis.util.gen_name("read")
        self._session.read.parquet(*(f"file://{file.absolute()}" for file in files)).createOrReplaceTempView(name)
        return self._backend.table(name)

    def write(self, table: ibis.Table, path: Path) -> None:
        """See Engine."""
        self._backend.to_parquet(table, f"file://{path.absolute()}")

    def close(self) -> None:
        """See Engine."""
        self._steps.close()
        self._session.stop()


@contextmanager
def failing_clearly(place: Path) -> Iterator[None]:
    """Turns what an engine cannot read, write or hold into one clear error.

    Raises:
        UserError: an engine failed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, duckdb.Error) and not type(error).__module__.startswith(("pyspark", "py4j")):
            raise
        raise UserError(f"{place} cannot be governed: {first_line(error)}", "Its previous classes are kept") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without JVM classes in front."""
    return re.sub(r"^(?:[\w.$]+(?:Exception|Error): )+", "", str(error).strip().partition("\n")[0])[:300]


def row(table: ibis.Table) -> dict[str, Any]:
    """The only row of `table`."""
    (values,) = table.to_pyarrow().to_pylist()
    return values
