"""What a run says of itself at its start, on its way and at its end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from harness.core import progress
from harness.train.run import train
from tests.runs import arguments


def test_a_run_says_what_it_trains_and_what_came_out(
    catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(**settings: Any) -> dict[str, str]:
        train(arguments(catalogue, tmp_path / "run", **settings))
        out = capsys.readouterr().out
        assert out.count(f"run {tmp_path}/run: steps ") == 1
        assert ("next: shelfmark eval " in out) == ("stop_at" not in str(settings))
        return dict(reversed(re.findall(r"^(a step|[a-z]+) +(\S.*)$", out, re.MULTILINE)))

    every = {"train.checkpoint_every": 3, "train.evaluate_every": 2, "train.margin_warmup": 3}
    first = run(**{"train.stop_at": 1}, **every)
    assert first["run"] == f"{tmp_path}/run, oclear, step 0 to 4"
    assert "30 photos, 6 documents, 6 classes; splits all 6, test 6, train 18, val 6" in first["catalogue"]
    assert first["a step"] == "8 photos and 4 documents"
    assert first["epochs"] == "1.8 of 18 photos, 0.9 of 18 documents"
    assert "every 3 steps, next at step 3; kept are the newest 2" in first["checkpoints"]
    assert first["evaluation"] == "on split val, every 2 steps, next at step 2"
    assert "until step 3; until then the loss may rise" in first["margin"]
    assert "map" not in first, "nothing was evaluated"
    at_the_end = {"train.checkpoint_every": 0, "train.checkpoint_minutes": 0, "train.keep_best": "map"}
    last = run(**every | at_the_end | {"train.margin_warmup": 1})
    assert last["run"].endswith("step 1 to 4") and "margin" not in last
    assert last["checkpoints"].endswith("checkpoints, at step 4, the last; kept are the newest 2, the best by map")
    assert float(last["map"]) > 0 and last["queries"] == "6"


def test_without_a_terminal_progress_is_a_line_for_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress.progress("training", 1000, 250, " steps")
    for step in range(250, 1000):
        bar.set_postfix({"loss": f"{step}"})
        bar.update()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[0] for line in lines] == [
        f"training: {n:,} of 1,000 steps ({n // 10}%)" for n in range(300, 1001, 100)
    ]
    assert lines[0].endswith("loss 299") and "to go" in lines[0]


def test_a_slow_run_is_not_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    bar = progress.progress("training", 1_000_000, 0, " steps")
    bar.update()
    assert capsys.readouterr().err.startswith("training: 1 of 1,000,000 steps (0%), ")
