"""Training on classes made of clicks: their rows follow their keys over a rebuild, and trained products are known; and
the benchmark of governance by the size of the log.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from harness.bench import governance_scale
from harness.catalogue.catalogue import Catalogue
from harness.commands.govern import GovernConfig, run
from harness.evaluate.tasks.photo import KINDS
from models.comm import gather_shards
from tests.click_logs import write_log
from tests.pool import ranks
from tests.runs import tiny_config, trainer
from tests.test_bench import check_report


def train(catalogue: Path, folder: Path, steps: int) -> dict[str, Any]:
    """In a pool: trains to step `steps` and saves; rows, phases, and the slice `class` of the evaluation's queries."""
    config = tiny_config(catalogue, folder, **{"train.steps": steps, "train.new_phase": True})
    with trainer(config, ready=False) as t:
        rows = gather_shards(t.method.head.rows, t.method.head.row_group).clone()  # before the first step
        losses = [t.train_step(data).loss.item() for data in t.loader.steps(t.step, steps)]
        t.save()
        after = gather_shards(t.method.head.rows, t.method.head.row_group).clone()
        groups = t.validation.evaluation.tasks[0].groups["class"]
        return {"rows": rows, "after": after, "losses": losses, "kinds": groups.codes}


@pytest.mark.full  # trains on two ranks
def test_rows_follow_the_keys_of_classes_made_of_clicks(catalogue: Path, tmp_path: Path) -> None:
    own = shutil.copytree(catalogue, tmp_path / "catalogue")
    shutil.rmtree(own / "classes")
    samples = Catalogue(own).table(["item", "kind", "class_key", "split"]).to_pylist()
    document = {row["class_key"]: row["item"] for row in samples if row["kind"] == "document"}
    rows = [
        (row["item"], document[row["class_key"]], 4, 5)
        for row in samples
        if row["kind"] == "query" and row["split"] == "train"
    ]
    few = [row for row in rows if row[1] not in (document["c0"], document["c4"])]
    log = tmp_path / "log.parquet"
    run(GovernConfig(catalogue=own, clicks=write_log(log, few)))
    first = ranks(2).run(train, own, tmp_path / "run", 3)[0]
    assert np.isfinite(first["losses"]).all() and first["rows"].shape[0] == 4
    names = [KINDS[code] for code in first["kinds"]]
    assert names.count("never trained") == 2 and names.count("head") == 4
    summary = run(GovernConfig(catalogue=own, clicks=write_log(log, rows)))
    assert summary["history"] == {"kept": 4, "new": 2}
    # c0's document has the lowest sample id, so that every class id moves.
    keys = pq.read_table(own / "classes/classes.parquet")["class_key"].to_pylist()
    assert keys == ["click-4", "click-0", "click-1", "click-2", "click-5", "click-3"]
    second = ranks(2).run(train, own, tmp_path / "run", 5)[0]
    torch.testing.assert_close(second["rows"][[1, 2, 3, 5]], first["after"], rtol=0, atol=0)
    assert np.isfinite(second["losses"]).all() and len(second["losses"]) == 2
    assert (second["kinds"] == KINDS.index("head")).all()


@pytest.mark.full  # starts processes
def test_the_benchmark_reports_each_size(tmp_path: Path) -> None:
    report = governance_scale.run(governance_scale.GovernanceScaleConfig(rows=(2000, 3000), folder=tmp_path))
    check_report(report)
    assert [row["rows"] for row in report["rows"]] == [2000, 3000]
    assert all(row["classes"] > 10 and 0 < row["edges"] < row["rows"] for row in report["rows"])
    assert not list(tmp_path.iterdir())
