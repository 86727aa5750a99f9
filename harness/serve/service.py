"""An artefact behind a bounded queue: from a request to its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect

from harness.artefact.artefact import Photo
from harness.core.errors import UserError
from harness.core.files import printable
from harness.serve.answers import Explanation
from harness.serve.batching import Batcher, Busy
from harness.serve.limits import Limits
from harness.serve.metrics import Metrics
from harness.serve.opened import Answer, Opened, Query, Where
from harness.serve.requests import (
    ExplainParameters,
    PartOfPhoto,
    SearchParameters,
    boxed,
    filtered,
    photo_bytes,
    query_text,
)
from harness.serve.swap import Shelf
from harness.serve.windows import COLUMNS, cells, windows

BATCH_WAIT = 0.002  # seconds
REPLACED = "the artefact was replaced: search again"
T = TypeVar("T")


class Service:
    """An artefact behind a queue.

    Args:
        shelf: the artefact in use.
        limits: of requests.
        batch: queries embedded together at most.
        threads: photos that are checked at once.
    """

    def __init__(self, shelf: Shelf, limits: Limits, batch: int, threads: int) -> None:
        self.shelf, self.limits = shelf, limits
        self.batcher = Batcher(self._work, batch, BATCH_WAIT, limits.queue)
        self.metrics = Metrics(shelf, lambda: self.batcher.taken)
        self._decoders = ThreadPoolExecutor(threads, "decoder")

    def _work(self, queries: list[Query]) -> list[Answer | Exception]:
        started = time.perf_counter()
        answered = self.shelf.current.answer(queries)
        self.metrics.batch(len(queries), time.perf_counter() - started)
        return answered

    async def answer(self, request: Request, parameters: PartOfPhoto) -> Answer:
        """The answer to a request's photo or text.

        Raises:
            HTTPException: 4xx for a request that cannot be answered, 503 where the service is too busy.
            ClientDisconnect: the client left; nothing was computed for it that had not begun.
        """
        with self._place():
            k: int = 0
            where: Where = ()
            if isinstance(parameters, SearchParameters):
                k, where = parameters.k, filtered(parameters.filter, self.shelf.current.columns)
            if self.shelf.current.takes == "image":
                ask = self._answer_photo(await self._photo(request, parameters), k, where)
            elif parameters.box:
                raise HTTPException(422, "box is a part of a photo, and this artefact answers texts")
            else:
                ask = self.batcher.ask(Query(text=await query_text(request), k=k, where=where))
            return await self._while_wanted(request, ask)

    async def explain(self, request: Request, parameters: ExplainParameters) -> Explanation:
        """The parts of a request's photo that are like a document; raises as `answer`."""
        opened = self.shelf.current
        with self._place():
            if opened.takes != "image":
                raise HTTPException(422, "only a photo has parts, and this artefact answers texts")
            require_row(opened, parameters.row, parameters.artefact)
            read = await self._photo(request, parameters)

            async def ask() -> list[Answer]:
                photo = await read
                return await asyncio.gather(*(self.batcher.ask(Query(photo=window)) for window in windows(photo)))

            answered = await self._while_wanted(request, ask())
        if any(answer.opened is not opened for answer in answered):
            raise HTTPException(410, REPLACED)
        document = opened.artefact.vector(parameters.row)[0]
        found = cells([float(answer.vector @ document) for answer in answered])
        return Explanation(artefact=opened.id, columns=COLUMNS, similarity=found)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """A place in the queue; what refuses the query is told to the client."""
        try:
            with self.batcher.place():
                yield
        except Busy:
            raise HTTPException(503, "too many requests at once: try again later", {"retry-after": "1"}) from None
        except UserError as error:
            raise HTTPException(422, printable(str(error), 500)) from None

    async def _photo(self, request: Request, parameters: PartOfPhoto) -> Awaitable[Photo]:
        """Reads the body, then checks the photo on a thread."""
        box = boxed(parameters.box)
        data, loop = await photo_bytes(request, self.limits), asyncio.get_running_loop()
        return loop.run_in_executor(self._decoders, Photo.read, data, box, self.limits.max_pixels)

    async def _answer_photo(self, read: Awaitable[Photo], k: int, where: Where) -> Answer:
        return await self.batcher.ask(Query(photo=await read, k=k, where=where))

    async def _while_wanted(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """Result of `work`, which ends with the time allowed or with the client's connection."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
        try:
            # After the body, the only thing left to receive is the end of the connection.
            await asyncio.wait((task, gone), timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientDisconnect
            late = f"not answered within {self.limits.seconds:g} seconds: try again later"
            raise HTTPException(503, late, {"retry-after": "5"})
        finally:
            task.cancel()
            gone.cancel()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Works through the queue and watches the artefact's path."""
        tasks = [asyncio.create_task(self.batcher.run()), asyncio.create_task(self.watch())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.batcher.thread.shutdown()
            self._decoders.shutdown()

    async def watch(self) -> None:
        """See `Shelf.watch`."""
        await self.shelf.watch(self.batcher.thread)

    async def reload(self) -> bool:
        """See `Shelf.reload`."""
        return await self.shelf.reload(self.batcher.thread)


def require_row(opened: Opened, row: int, artefact: str) -> None:
    """Raises HTTPException where `row` is not one of the artefact in use, or of another `artefact` (if it is named)."""
    if artefact not in ("", opened.id):
        raise HTTPException(410, REPLACED)
    if row >= len(opened.artefact.documents):
        raise HTTPException(404, f"there are {len(opened.artefact.documents):,} documents")
