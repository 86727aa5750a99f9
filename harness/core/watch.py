"""Heartbeats of every rank in the store of the process group: a rank that is silent, or that stands still in a step, is
named before a timeout names those that wait for it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from harness.core.cli import OTHERS_WAIT, USER_ERROR_CODE, tell
from harness.core.errors import UserError
from harness.core.launcher import LOST, start_folder

_LONGEST_BEAT = 1.0  # seconds between looks: the delay until a silent rank is noticed
_LOOKS = 20  # beats within the silence after which a rank counts as lost
_CLOSED = "closed"
_FAILED = "failed"  # key of the store
_STILL = "still"  # key of the store: ranks that stand still
_MOST_STACKS = 8  # ranks whose stacks are written


class Pace(NamedTuple):
    """Way of a rank through its steps.

    Attributes:
        marks: parts of steps that it has begun; a rank that others wait for has begun fewer than they.
        patience: seconds that the present one may last; 0 for any length.
    """

    marks: int = 0
    patience: float = 0.0


class Watch:
    """Reports this rank's life and place, and watches others: rank 0 watches all, the others watch rank 0.

    Silence is the end of a process's beats, as where it is stopped; a process that hangs goes on beating, and is found
    by its `pace`.

    A thread does both. A rank that waits for a collective cannot be reached: if a rank is lost, the thread prints one
    line and ends this process with exit code 2, unless `waits` is set by a caller that checks `lost` itself.

    Args:
        patience: seconds of silence allowed; less than the timeout of a collective, which would name a rank that waits.
    """

    def __init__(self, patience: float) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.patience = patience
        self.at: Callable[[], str] = lambda: "the start"  # where this rank is, in words
        self.pace: Callable[[], Pace] = Pace
        self.folder: Path | None = None  # for the stacks of a rank that stands still, and for the last collectives
        self.lost: UserError | None = None
        self.waits, self._written = False, False
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
        paces: dict[int, tuple[Pace, float]] = {}
        beats, next_look = 0, 0.0
        while not self._ended.wait(min(_LONGEST_BEAT, self.patience / _LOOKS)) and not self.lost:
            with suppress(RuntimeError):  # where the store is gone the run ends otherwise
                self._store.set(f"beat/{self.rank}", f"{beats}{self._beat()}")
                beats += 1
                self._write_traces()
                if self._store.check([_FAILED]) and not self._ended.is_set():
                    time.sleep(OTHERS_WAIT)  # for an error of its own
                    sys.stdout.flush()
                    os._exit(1)
                if time.monotonic() > next_look:
                    self._look(heard)
                    if self.rank == 0:
                        self._look_for_still(heard, paces)
                    next_look = time.monotonic() + (self.pace().patience or self.patience) / _LOOKS
        if self.lost and not self.waits:
            tell(self.lost)
            self.fail()
            sys.stdout.flush()
            os._exit(USER_ERROR_CODE)

    def _beat(self) -> str:
        """Report of this rank, without the number of the beat."""
        return f"\n{self.pace().marks} {self.pace().patience} {int(_in_collective())}\n{self.at()}"

    def _look(self, heard: dict[int, tuple[str, float]]) -> None:
        for rank, (before, when) in heard.items():
            beat = self._store.get(f"beat/{rank}").decode() if self._store.check([f"beat/{rank}"]) else ""
            if beat != before:
                heard[rank] = beat, time.monotonic()
            elif beat != _CLOSED and time.monotonic() - when > self.patience:
                place = f"; it was last in {beat.split(chr(10), 2)[2]}" if beat else ""
                self._lose(
                    [],
                    f"rank {rank} was not heard of for {self.patience:g} s{place}",
                    "See what stopped its process or machine, then start again; "
                    "mesh.timeout_minutes sets how long a rank may be silent",
                )
                return

    def _look_for_still(self, heard: dict[int, tuple[str, float]], paces: dict[int, tuple[Pace, float]]) -> None:
        """Looks for ranks that stay in one part of a step for longer than their patience; to be called on rank 0."""
        now, places, waiting = time.monotonic(), {}, set()
        for rank, beat in {0: self._beat(), **{rank: beat for rank, (beat, _) in heard.items()}}.items():
            if beat in ("", _CLOSED):
                paces.pop(rank, None)
                continue
            numbers, places[rank] = beat.split("\n", 2)[1:]
            marks, patience, waits = numbers.split()
            if int(waits):
                waiting.add(rank)
            pace = Pace(int(marks), float(patience))
            if rank not in paces or pace != paces[rank][0]:
                paces[rank] = pace, now
        if not any(0 < pace.patience < now - since for pace, since in paces.values()):
            return
        in_step = {rank: pace.marks for rank, (pace, _) in paces.items() if pace.patience}
        still = [rank for rank, marks in in_step.items() if marks == min(in_step.values())]  # the others wait for them
        still = [rank for rank in still if rank not in waiting] or still
        if any(now - heard[rank][1] > self.patience / 2 for rank in still if rank):
            return  # its process is stopped: `_look` names it
        shown = still[:_MOST_STACKS]
        which = ", ".join(map(str, shown)) + (", …" if len(still) > len(shown) else "")
        who = f"rank {which} stands" if len(still) == 1 else f"ranks {which} stand"
        where = "" if self.folder is None else f"Stacks: {self.folder}/stacks-rank-*.txt; "
        self._lose(
            shown,
            f"{who} still for {now - paces[still[0]][1]:.0f} s in {places[still[0]]}",
            f"{where}mesh.step_minutes sets how long a part of a step may last",
        )

    def _lose(self, still: list[int], what: str, fix: str) -> None:
        """Ends the run by `lost`, once the ranks have written their traces; a launcher may start them again."""
        self._store.set(_STILL, " ".join(map(str, still)))
        self._write_traces()
        time.sleep(2 * min(_LONGEST_BEAT, self.patience / _LOOKS))  # in which the other ranks write theirs
        if (folder := start_folder()) is not None:
            with suppress(OSError):
                (folder / LOST).touch()
        self.lost = UserError(what, fix)

    def _write_traces(self) -> None:
        """Writes this rank's last collectives, once a rank is lost, and the stacks of all its threads where it stands
        still. `torchfrtrace --prefix collectives-rank- FOLDER` compares the ranks' collectives, if NCCL's.
        """
        if self.folder is None or self._written or not self._store.check([_STILL]):
            return
        self._written = True
        with suppress(OSError):
            if str(self.rank) in self._store.get(_STILL).decode().split():
                with (self.folder / f"stacks-rank-{self.rank}.txt").open("w") as out:
                    faulthandler.dump_traceback(out, all_threads=True)
            if os.environ.get("TORCH_FR_BUFFER_SIZE"):
                (self.folder / f"collectives-rank-{self.rank}").write_bytes(_recorded())


def _recorded() -> bytes:
    """Last collectives of this process in torch's flight recorder, a pickle: over NCCL if there are any, else gloo."""
    module: Any = torch._C._distributed_c10d
    dump = getattr(module, "_dump_nccl_trace", None) if torch.cuda.is_initialized() else None
    found: bytes = (dump or module._dump_fr_trace)()
    return found


def _in_collective() -> bool:
    """True while the main thread waits for other ranks; over NCCL, which waits later, False."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and "torch/distributed" in frame.f_code.co_filename
