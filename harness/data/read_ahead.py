"""Thread that reads training steps ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

Planned = TypeVar("Planned")
Decoded = TypeVar("Decoded")


class ReadAhead(Generic[Planned, Decoded]):
    """Plans and decodes steps in a thread of its own, in order, at most `depth` of them before they are taken.

    Args:
        plan: step -> a step whose samples are being read.
        decode: that -> the decoded step.
        depth: steps that lie ready or are being decoded.
        stream: stream of the thread's GPU work: decoding must not queue behind a training step's kernels, nor those
            behind decoding. None on a CPU.
    """

    def __init__(
        self,
        plan: Callable[[int], Planned],
        decode: Callable[[Planned], Decoded],
        depth: int,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._plan, self._decode, self._depth, self._stream = plan, decode, depth, stream
        # SimpleQueue only: a Ctrl-C amid the Python code of any other queue, semaphore or event leaves its lock held,
        # and `close` waits for ever.
        self._decoded: queue.SimpleQueue[Decoded | BaseException] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()  # an entry for each step that may be decoded
        for _ in range(depth):
            self._room.put(None)
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def ready(self) -> int:
        """Number of decoded steps that nobody has taken."""
        return self._decoded.qsize()

    def steps(self, first: int, end: int) -> Iterator[tuple[Decoded, float]]:
        """Yields steps first .. end - 1, each with the share of the read-ahead that was ready when it was asked for.

        Raises what `plan` and `decode` raise.
        """
        self._thread = threading.Thread(target=self._run, args=(first, end), name="read-ahead", daemon=True)
        self._thread.start()
        for step in range(first, end):
            ready = self.ready / min(self._depth, end - step)  # at the end there is less to read ahead
            item = self._decoded.get()
            if isinstance(item, BaseException):
                try:
                    raise item
                finally:
                    del item  # its traceback holds this frame: a cycle that would keep the catalogue's files open
            self._room.put(None)
            yield item, ready

    def close(self) -> None:
        """Ends the thread."""
        self._closing = True
        self._room.put(None)  # the thread may wait for it
        if self._thread is not None:
            self._thread.join()

    def _run(self, first: int, end: int) -> None:
        try:
            with torch.cuda.stream(self._stream):  # does nothing for None
                if first >= end:
                    return
                planned = self._plan(first)
                for step in range(first, end):
                    self._room.get()
                    if self._closing:
                        return
                    current = planned
                    if step + 1 < end:
                        planned = self._plan(step + 1)  # read while `step` is decoded
                    self._decoded.put(self._decode(current))
        except BaseException as error:  # handed to the training thread, which raises it
            self._decoded.put(error)
