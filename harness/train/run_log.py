"""Run logging on rank 0: JSONL, TensorBoard, progress bar."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tqdm import tqdm

from harness.core.files import printable, write_whole
from harness.core.mesh import Mesh
from harness.core.progress import progress
from harness.train.tensorboard import Board


class RunLog:
    """Writes a run's figures; silent on every rank but 0.

    Args:
        folder: the run folder: log.jsonl and tensorboard/ in it.
        mesh: the ranks.
        first: step at which this process starts. An earlier process's lines of later steps are removed: they will be
            written again.
        steps: last step, for the progress bar.
        again: True if step `first` is evaluated again: the line of its evaluation is removed too.

    Attributes:
        board: the run's TensorBoard, on rank 0 only.
    """

    def __init__(self, folder: Path, mesh: Mesh, first: int, steps: int, again: bool = False) -> None:
        self.active = mesh.rank == 0
        if not self.active:
            return
        self._file = folder / "log.jsonl"
        if self._file.exists():
            # An evaluation has a line of its own.
            last = first - again
            lines = [(_step(line), line) for line in self._file.read_text().splitlines()]
            kept = [line for step, line in lines if step <= (first if "train/loss" in line else last)]
            write_whole(self._file, "".join(f"{line}\n" for line in kept))
        self._jsonl = self._file.open("a")
        self.board = Board(folder / "tensorboard", first)
        self._bar = progress("training", steps, first, " steps")

    def advance(self, shown: dict[str, str]) -> None:
        """Counts a finished step; `shown` is displayed beside the progress bar."""
        if self.active:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()

    def scalars(self, step: int, figures: dict[str, float], split: str = "") -> None:
        """Writes a line of log.jsonl and points of TensorBoard's curves; `step` counts finished steps. `split`: of an
        evaluation's figures.
        """
        if self.active:
            self._jsonl.write(json.dumps({"step": step, **figures}) + "\n")
            self._jsonl.flush()
            self.board.scalars(step, figures, split)

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if self.active:
            tqdm.write(printable(line, 1000))
            sys.stdout.flush()  # in a file it stands in order with the progress on standard error

    def close(self) -> None:
        """Flushes and closes everything."""
        if self.active:
            self._bar.close()
            self._jsonl.close()
            self.board.close()


def _step(line: str) -> float:
    """Step of a line of the log; infinite for a line that a killed process left unfinished."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
