"""Profile of a few steps by torch's profiler, into the run's TensorBoard folder; Perfetto opens the same file."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from harness.core.errors import UserError


def parse_window(window: str) -> tuple[int, int] | None:
    """`train.profile_steps` as (first, last) step, both 0-based, the last excluded; None where it is empty.

    Raises:
        UserError: the window is not FIRST:LAST with FIRST < LAST.
    """
    if not window:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", window)
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(f"train.profile_steps is '{window}'", "Give FIRST:LAST with FIRST < LAST, such as 100:103")
    return int(found[1]), int(found[2])


class StepProfiler:
    """Records the steps of one window.

    The trace is tensorboard/profile/steps-FIRST-LAST.rank-R.pt.trace.json.gz under the run folder: one file a rank. A
    run that starts or stops within the window writes the steps that it did.

    Args:
        window: `train.profile_steps`, FIRST:LAST; empty records nothing.
        run_dir: the run folder.
        rank: this process's.
    """

    def __init__(self, window: str, run_dir: Path, rank: int) -> None:
        self.window, self.folder, self.rank = parse_window(window), run_dir / "tensorboard" / "profile", rank
        self.file: Path | None = None
        self._stack = ExitStack()
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Call before step `step` (0-based): starts at the window's first step."""
        if self._profile is None and self.file is None and self.window is not None:
            first, last = self.window
            if first <= step < last:
                self._begin(step)

    def after(self, step: int) -> None:
        """Call after step `step` (0-based): writes the trace after the window's last."""
        if self._profile is not None and self.window is not None and step >= self.window[1] - 1:
            self._write()

    def close(self) -> None:
        """Writes the trace of a window that was cut short."""
        if self._profile is not None:
            self._write()

    def _begin(self, step: int) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._first = step
        self._profile = self._stack.enter_context(profile(activities=activities, record_shapes=True))

    def _write(self) -> None:
        assert self.window is not None
        made, self._profile = self._profile, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._stack.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._first}-{self.window[1]}.rank-{self.rank}.pt.trace.json.gz"
        self.file = self.folder / name
        made.export_chrome_trace(str(self.file))
