"""`shelfmark run`: from a table and photos to search, stopped and gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.launcher import STOPPED_CODE
from tests.shops import draw_shop

STEPS = ("report", "train", "eval", "export", "search")


@pytest.mark.full  # trains, exports and searches
def test_a_stopped_run_goes_on_to_search(tmp_path: Path) -> None:
    draw_shop(tmp_path)
    words = ["run", "products.tsv", "photos/", "--out", "a shop", "--minutes", "1", "--json", "figures.json"]
    command = [sys.executable, "-m", "harness", *words]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    errors = tmp_path / "errors"
    with (
        errors.open("w") as written,
        subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=written, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 20:"):
                process.send_signal(signal.SIGINT)
        assert process.wait(100) == STOPPED_CODE, errors.read_text()
    assert "train ended with exit code 75. To go on, give the same command again" in errors.read_text()
    saved = [path.name for path in (tmp_path / "a shop/run/checkpoints").iterdir()]
    assert any("step-000000" in name for name in saved) and "step-00000100" not in saved
    assert not (tmp_path / "a shop/train.json").exists()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "columns" not in done.stdout and f"report: {Path('a shop/catalogue.html')} is there already" in done.stdout
    assert (tmp_path / "a shop/found.png").stat().st_size > 1000 and (tmp_path / "a shop/eval.html").exists()
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and [
        line.split(":")[0] for line in again.stdout.splitlines() if "already" in line
    ] == [*STEPS]
