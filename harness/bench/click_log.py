"""Click log with known truth for a catalogue with a class column, to train on classes made of clicks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.bench.click_shops import truth_of
from harness.bench.report import bench_main, finish
from harness.catalogue.catalogue import Catalogue
from harness.catalogue.synth.clicks import LogShape, draw_log
from harness.core.errors import UserError
from models.ranges import ClosedUnitInterval, NonNegativeInt

MODULE = "harness.bench.click_log"
EXAMPLE = f"python -m {MODULE} --catalogue catalogues/grocery --out clicks.parquet"


@dataclass(frozen=True, kw_only=True)
class ClickLogConfig:
    """Draws a click log for the training samples of a catalogue, its class column being the truth, as `shelfmark govern
    --clicks` reads it.

    Args:
        catalogue: with a class column, which `govern --clicks` does not read.
        out: Parquet file to write.
        noise: share of wrong clicks, without those on hot items.
        seed: of all draws.
    """

    catalogue: Path
    out: Path
    noise: ClosedUnitInterval = 0.2
    seed: NonNegativeInt = 0


def run(config: ClickLogConfig) -> dict[str, Any]:
    """Writes the log and returns the report (see `harness/bench/report.py`).

    Headline:
        wrong_clicks: share of the clicks that are on a document of another class, those on hot items included.
    """
    catalogue = Catalogue(config.catalogue)
    truth, queries, documents = truth_of(catalogue)
    if not len(queries):
        raise UserError(
            f"{catalogue.path} has no training photo with a document of its class", "Name the classes at ingest"
        )
    items = catalogue.table(["item"])["item"]
    if len(items.take(pa.array(queries)).unique()) < len(queries):
        raise UserError(f"{catalogue.path} has photos with the same id", "Give each photo an id of its own at ingest")
    log = draw_log(truth, LogShape(noise=config.noise, seed=config.seed))
    pq.write_table(log.table(*(items.take(pa.array(ids)).combine_chunks() for ids in (queries, documents))), config.out)
    clicks = float(log.clicks.sum())
    wrong = float(log.clicks[~log.right].sum()) / clicks
    sizes = {"queries": len(queries), "documents": len(documents), "rows": len(log.query), "clicks": clicks}
    return finish(MODULE, config, {"wrong_clicks": wrong}, [sizes])


def main() -> int:
    """Entry point of `python -m harness.bench.click_log`."""
    return bench_main(
        MODULE, ClickLogConfig, run, "Click log with known truth for a catalogue with a class column.", EXAMPLE
    )


if __name__ == "__main__":
    sys.exit(main())
