"""Heartbeats of every rank in the store of the process group: a rank that hangs is named before a timeout names those
that wait for it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from harness.core.cli import OTHERS_WAIT, USER_ERROR_CODE, tell
from harness.core.errors import UserError

_LONGEST_BEAT = 1.0  # seconds between looks: the delay until a silent rank is noticed
_LOOKS = 20  # beats within the silence after which a rank counts as lost
_CLOSED = "closed"
_FAILED = "failed"  # key of the store


class Watch:
    """Reports this rank's life and place, and watches others: rank 0 watches all, the others watch rank 0.

    A thread does both. A rank that waits for a collective cannot be reached: if a rank is lost, the thread prints one
    line and ends this process with exit code 2, unless `waits` is set by a caller that checks `lost` itself.

    Args:
        patience: seconds of silence allowed; less than the timeout of a collective, which would name a rank that waits.
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
        if self.world_size > 1 and dist.get_backend() != "fake":  # in a dry run, whose other ranks do not exist
            self._thread.start()

    def close(self) -> None:
        """Ends the heartbeats; the other ranks do not count this one as lost."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            with suppress(RuntimeError):
                self._store.set(f"beat/{self.rank}", _CLOSED)

    def fail(self) -> None:
        """Tells the other ranks that this one ends by an error. Theirs end a moment later: one that waits in a
        collective over NCCL would else not notice, nor take a signal.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ:  # a launcher has started these ranks for this command only
            self._ended.set()
            with suppress(RuntimeError):
                self._store.set(_FAILED, "")

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Context that adds `what` to the reported place of this rank."""
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
                if self._store.check([_FAILED]) and not self._ended.is_set():
                    time.sleep(OTHERS_WAIT)  # for an error of its own
                    sys.stdout.flush()
                    os._exit(1)
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
                    "See what stopped its process or machine, then start again; "
                    "mesh.timeout_minutes sets how long a rank may be silent",
                )
