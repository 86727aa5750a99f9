"""Spark gives the classes that DuckDB gives."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest

from harness.bench import governance_scale
from harness.commands.govern import GovernConfig, run
from tests.click_logs import write_log
from tests.test_governance import BAD_ROWS, TIMED, draw_rows, shop


@pytest.mark.full
@pytest.mark.timeout(1800)  # Spark starts slowly on a busy machine
@pytest.mark.skipif(importlib.util.find_spec("pyspark") is None, reason="pyspark is not installed")
def test_spark_gives_the_same_files(tmp_path: Path) -> None:
    rows = [(*row, 7) for row in draw_rows(5, 0.2, hot=0)]
    found = {}
    for engine in ("duckdb", "spark"):
        catalogue = shop(tmp_path / engine)
        random.Random(engine).shuffle(rows)
        log = write_log(tmp_path / f"{engine}.parquet", [*rows, *BAD_ROWS], TIMED)
        relations = tmp_path / "relations.csv"
        relations.write_text("item_a,item_b,kind\nd0,d9,same\nd4,d5,variant\n")
        config = GovernConfig(
            catalogue=catalogue, clicks=log, relations=relations, until="60", max_documents=2, min_share=0.2,
            min_overlap=0.1, min_common=1, hold_out_classes=0.2, engine=engine, master="local-cluster[2,1,1024]",
        )  # fmt: skip
        summary = run(config)
        tables = [*(catalogue / "classes").glob("*.parquet"), *(catalogue / "classes").glob("*.npy")]
        files = {path.name: path.read_bytes() for path in tables}
        summary.pop("before", None)  # DuckDB only
        found[engine] = files, summary
    assert found["spark"] == found["duckdb"]
    assert found["duckdb"][1]["components"]["split"]


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("pyspark") is None, reason="pyspark is not installed")
def test_the_benchmark_compares_the_files_of_both_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = governance_scale.GovernanceScaleConfig(rows=(3000,), engine="spark", compare=True, folder=tmp_path)
    report = governance_scale.run(config)
    assert report["headline"]["same_3000"] == 1 and [row["engine"] for row in report["rows"]] == ["spark", "duckdb"]
    monkeypatch.setattr(governance_scale, "_classes", lambda catalogue: {catalogue.name: b""})
    assert governance_scale.run(config)["headline"]["same_3000"] == 0
