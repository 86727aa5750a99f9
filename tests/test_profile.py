"""The profiler's window: which steps a trace holds, whatever the first and last step of the run are."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from harness.train.profiler import StepProfiler


def traced(folder: Path, window: str, first: int, end: int) -> tuple[str, list[int]]:
    """Name of the trace of a run over steps first .. end - 1, "" without one, and the steps in it."""
    profiler = StepProfiler(window, folder, rank=3)
    for step in range(first, end):
        profiler.before(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(2) + 1
        profiler.after(step)
    profiler.close()
    files = list((folder / "tensorboard/profile").glob("*"))
    if not files:
        return "", []
    (file,) = files
    names = {event.get("name", "") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    return file.name, sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step (\d+)", name)))


@pytest.mark.parametrize(
    ("window", "first", "end", "name", "steps"),
    [
        ("2:4", 0, 6, "steps-2-4", [2, 3]),
        ("0:1", 0, 6, "steps-0-1", [0]),
        ("2:4", 3, 6, "steps-3-4", [3]),  # resumed within the window
        ("2:9", 0, 4, "steps-2-9", [2, 3]),  # stopped within it
        ("2:4", 4, 6, "", []),
        ("", 0, 2, "", []),
    ],
)
def test_a_trace_holds_the_steps_of_its_window(tmp_path, window, first, end, name, steps):
    assert traced(tmp_path, window, first, end) == (name and f"{name}.rank-3.pt.trace.json.gz", steps)
