"""Requests that arrive together are embedded together: a bounded queue in front of one thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Busy(Exception):
    """There is no place in the queue."""


class Batcher(Generic[Q, A]):
    """Queue and thread of one event loop.

    Args:
        work: answers a batch on the thread: an answer, or the exception to raise, for each query in order.
        most: queries in a batch.
        wait: seconds that a batch waits for more queries, where there are fewer.
        places: requests at once, from the reading of their bodies on.

    Attributes:
        thread: runs `work`, and anything else that must not run beside it.
        taken: places in use.
    """

    def __init__(self, work: Callable[[list[Q]], Sequence[A | Exception]], most: int, wait: float, places: int) -> None:
        self._work, self._most, self._wait, self._places = work, most, wait, places
        self._queue: asyncio.Queue[tuple[Q, asyncio.Future[A]]] = asyncio.Queue()  # bounded by the places
        self.thread = ThreadPoolExecutor(1, "encoder")
        self.taken = 0

    @property
    def full(self) -> bool:
        """No place is free."""
        return self.taken >= self._places

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the places; raises Busy where none is free."""
        if self.full:
            raise Busy
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    async def ask(self, query: Q) -> A:
        """The answer to one query. A cancelled call is left out of its batch, if that has not begun."""
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((query, future))
        return await future

    async def run(self) -> None:
        """Works until it is cancelled. Queries gather while the thread is at the previous batch."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            if self._queue.qsize() + 1 < self._most:
                await asyncio.sleep(self._wait)
            while len(batch) < self._most and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [(query, future) for query, future in batch if not future.done()]
            if not batch:
                continue
            try:
                answers = await loop.run_in_executor(self.thread, self._work, [query for query, _ in batch])
            except Exception as error:  # a fault of the service, not of a query
                answers = [error] * len(batch)
            for answer, (_, future) in zip(answers, batch, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
