"""A command that was killed before any of its file operations, run again, ends as an undisturbed one: nothing doubled,
nothing left.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kills import CASES

ROOT = Path(__file__).parents[1]
SLOW = {"synth": 6, "train": 5, "export": 4}  # every so many operations: hundreds, seconds each
SHARE = "append merge tokenizer-kept govern-again ingest".split()  # those that replace, remove or add to what is there


def kill(folder: Path, every: int, *names: str) -> str:
    """Kills these commands before every `every`-th operation; what tests/kills.py found."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", str(folder), str(every), *names],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


def test_a_share_of_the_points_of_the_most_exposed_commands(tmp_path: Path) -> None:
    said = kill(tmp_path, 9, *SHARE)
    assert said.count("its operations, the last before number") == len(SHARE)


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_every_point(tmp_path: Path, name: str) -> None:
    kill(tmp_path, SLOW.get(name, 1), name)
