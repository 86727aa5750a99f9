"""Requests of the ranks at the boundary of a step: a stop, by a signal to any of them, a checkpoint, by the first
rank's clock, and the end of one that is written in the background, once all ranks have written it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from harness.core.launcher import SIGNALS
from harness.core.mesh import Mesh

INTERRUPTED_CODE = 130
_TWICE = 1.0  # seconds: of a launcher and of SLURM the same signal may come to a rank twice


class Boundary:
    """Notes signals and the time of the last checkpoint; what one rank asks for, all know after the step's finite gate.

    Args:
        mesh: the ranks.
        minutes: between two checkpoints by the clock; 0 asks for none.

    Attributes:
        stop: a signal came to some rank; the same on every rank.
        save: a checkpoint is due; the same on every rank.
        written: all ranks have written their part of a checkpoint in the background; the same on every rank.
        own_written: tells whether this rank has.
        noted: name of the signal that came to this rank; empty without one.
    """

    def __init__(self, mesh: Mesh, minutes: float) -> None:
        self.mesh, self.minutes = mesh, minutes
        self.stop = self.save = self.written = False
        self.own_written: Callable[[], bool] = lambda: False
        self.noted = ""
        self._handlers: dict[signal.Signals, Any] = {}
        self._terminal: list[int] = []  # descriptors of output that are one
        self._saved = self._when = time.monotonic()

    def open(self) -> None:
        """Begins to note signals, except those that this process ignores (nohup, a shell's background jobs)."""
        self.saved()
        self._terminal = [number for number in (1, 2) if os.isatty(number)]
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._handlers[number] = signal.signal(number, self._note)

    def close(self, failed: bool = False) -> None:
        """Restores what signals do; one that was noted and that no checkpoint answers takes effect where the run has
        `failed`.
        """
        for number, handler in self._handlers.items():
            # A launcher sends SIGTERM to the ranks that are left once the first has ended.
            signal.signal(number, _ignore if self.stop and number != signal.SIGINT else handler)
        self._handlers = {}
        if failed and self.noted and not self.stop:
            signal.raise_signal(signal.Signals[self.noted])

    def saved(self) -> None:
        """Begins the time until the next checkpoint."""
        self._saved, self.save = time.monotonic(), False

    def own(self, like: Tensor) -> list[Tensor]:
        """Requests of this rank, to be summed over all: a stop, a checkpoint, the end of one; [] each, of the type of
        `like`. Without a wait for the device.
        """
        due = self.mesh.rank == 0 and 0 < 60 * self.minutes <= time.monotonic() - self._saved
        return [like.new_full((), float(asked)) for asked in (bool(self.noted), due, self.own_written())]

    def agree(self, stop: float, save: float, written: float) -> None:
        """Takes the sums of `own` over all ranks."""
        self.stop, self.save, self.written = self.stop or stop > 0, save > 0, written == self.mesh.world_size

    def ask(self) -> None:
        """Sums the requests now, between two steps; collective, waits for the device."""
        own = self.own(torch.zeros((), dtype=torch.float64, device=self.mesh.device))
        self.agree(*self.mesh.sum(torch.stack(own)).tolist())

    def _note(self, number: int, _: FrameType | None) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if name == "SIGHUP":  # the terminal is gone: what is written there would be an error amid the save
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for output in self._terminal:
                os.dup2(nowhere, output)
            os.close(nowhere)
        if self.noted == "SIGINT" and now - self._when > _TWICE:
            os.write(2, b"\ninterrupted, without a checkpoint\n")
            os._exit(INTERRUPTED_CODE)
        if not self.noted:
            self.noted, self._when = name, now
            if self.mesh.rank == 0:  # os.write: a handler may interrupt a print
                more = "; a second Ctrl-C ends it at once" if name == "SIGINT" else ""
                os.write(2, f"\n{name}: the run saves after this step and stops{more}\n".encode())


def _ignore(*_: object) -> None:
    """In place of SIG_IGN, which another run in this process would take for its caller's wish."""
