"""Progress of long work on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

SILENCE = 600.0  # seconds after which a line is due, however little was done


class Lines:
    """Stands in for tqdm where no terminal redraws a line: a line for each 10 %, and after each SILENCE."""

    def __init__(self, desc: str, total: int, initial: int, unit: str) -> None:
        self.desc, self.total, self.done, self.unit = desc, total, initial, unit
        self._first, self._began = initial, time.monotonic()
        self._said = self._began
        self._shown: dict[str, str] = {}

    def set_postfix(self, shown: dict[str, str], refresh: bool = False) -> None:
        """Figures at the end of the next line."""
        self._shown = shown

    def update(self) -> None:
        """Counts one more."""
        tenth, self.done, now = 10 * self.done // self.total, self.done + 1, time.monotonic()
        if 10 * self.done // self.total == tenth and now - self._said < SILENCE:
            return
        self._said, spent = now, now - self._began
        left = spent / (self.done - self._first) * (self.total - self.done)
        more = "".join(f", {name} {value}" for name, value in self._shown.items())
        what = f"{self.desc}: {self.done:,} of {self.total:,}{self.unit} ({self.done / self.total:.0%})"
        times = f"{tqdm.format_interval(spent)} so far, {tqdm.format_interval(left)} to go"
        print(f"{what}, {times}{more}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """As tqdm's."""


def progress(desc: str, total: int, initial: int, unit: str) -> Any:
    """A bar that counts to `total` from `initial`, or its stand-in, by what standard error is."""
    if sys.stderr.isatty():
        return tqdm(desc=desc, total=total, initial=initial, unit=unit, smoothing=0.05, mininterval=0.2)
    return Lines(desc, total, initial, unit)
