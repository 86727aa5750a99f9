"""The benchmark of checkpoints at a small size: what it reports besides times, and that nothing stays on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.errors import UserError
from tests.test_bench import report_of


@pytest.mark.full
def test_checkpoints_are_timed_and_their_memory_is_measured(tmp_path: Path) -> None:
    from harness.bench import checkpoint  # here: it imports megatron-core, which takes seconds

    with pytest.raises(UserError, match="GB of tensors"):
        checkpoint.CheckpointBenchConfig(num_classes=10**11)
    (tmp_path / "scratch").mkdir()
    flags = f"--num-classes 20001 --embedding-dim 16 --ranks 2 --batch 8 --pairs 2 --steps 2 --folder {tmp_path}"
    report = report_of(checkpoint.MODULE, f"{flags}/scratch", tmp_path / "checkpoint.json")
    headline, share = report["headline"], 10001 * (12 * 16 + 12) / 1e6
    assert {"save_vs_dcp", "resume_vs_dcp", "background_cost", "save_beyond_mb"} < set(headline)
    assert headline["share_mb"] == pytest.approx(share) and headline["gb"] == pytest.approx(2 * share / 1e3, rel=1e-3)
    assert headline["background_budget_mb"] == pytest.approx(share, rel=1e-3)
    rounds, ranks = report["rows"][:2], report["rows"][2:]
    assert [row["round"] for row in rounds] == [1, 2] and [row["rank"] for row in ranks] == [0, 1]
    assert all(row["save_s"] > 0 < row["dcp_load_s"] for row in rounds)
    assert not [*(tmp_path / "scratch").iterdir()], "what was written is deleted"
