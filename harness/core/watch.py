"""Beats of every rank in the store of the process group: a rank that stands still is named, before a timeout names
those who wait.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from harness.core.cli import USER_ERROR_CODE, tell
from harness.core.errors import UserError

_LONGEST_BEAT = 1.0  # seconds: a rank that stands still was last heard of that much earlier at most
_LOOKS = 20  # in the time after which a rank that is not heard of counts as lost
_CLOSED = "closed"


class Watch:
    """Shows that this rank lives and where it is, and looks after others: rank 0 after all, the others after rank 0.

    A thread does both. Whoever waits for a collective cannot be reached: where a rank is lost, the thread prints one
    line and ends this process with exit code 2, unless `waits` is set, by one who looks at `lost` himself.

    Args:
        patience: seconds for which a rank may be silent; less than a collective may take, whose timeout would name one
            who waits.
    """

    def __init__(self, patience: float) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.patience = patience
        self.at: Callable[[], str] = lambda: "the start"  # where this rank is, in words
        self.lost: UserError | None = None
        self.waits = False
        self._store = dist.distributed_c10d._get_default_store()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        if self.world_size > 1 and dist.get_backend() != "fake":  # of a dry run, whose other ranks there are not
            self._thread.start()

    def close(self) -> None:
        """Ends the beats; nobody misses them."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            with suppress(RuntimeError):
                self._store.set(f"beat/{self.rank}", _CLOSED)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Inside, this rank is said to be doing that too."""
        at = self.at
        self.at = lambda: f"{at()}, {what}"
        try:
            yield
        finally:
            self.at = at

    def _run(self) -> None:
        heard = {rank: ("", time.monotonic()) for rank in (range(1, self.world_size) if self.rank == 0 else [0])}
        beats, next_look = 0, 0.0
        while not self._ended.wait(min(_LONGEST_BEAT, self.patience / _LOOKS)) and not self.lost:
            with suppress(RuntimeError):  # where the store is gone the run ends otherwise
                self._store.set(f"beat/{self.rank}", f"{beats}\n{self.at()}")
                beats += 1
                if time.monotonic() > next_look:
                    self._look(heard)
                    next_look = time.monotonic() + self.patience / _LOOKS
        if self.lost and not self.waits:
            tell(self.lost)
            sys.stdout.flush()
            os._exit(USER_ERROR_CODE)

    def _look(self, heard: dict[int, tuple[str, float]]) -> None:
        for rank, (before, when) in heard.items():
            beat = self._store.get(f"beat/{rank}").decode() if self._store.check([f"beat/{rank}"]) else ""
            if beat != before:
                heard[rank] = beat, time.monotonic()
            elif beat != _CLOSED and time.monotonic() - when > self.patience:
                place = f"; it was last in {beat.partition(chr(10))[2]}" if beat else ""
                self.lost = UserError(
                    f"rank {rank} was not heard of for {self.patience:g} s{place}",
                    "See what stopped its process or machine, then start again; mesh.timeout_minutes sets how long a rank may be silent",
                )
