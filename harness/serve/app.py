"""Routes of the search service."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi import Path as InPath
from fastapi import Query as InQuery
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from harness.artefact.artefact import Photo
from harness.core.errors import UserError
from harness.core.files import printable
from harness.serve import answers
from harness.serve.answers import About, Documents, Embedding
from harness.serve.api_page import api_page
from harness.serve.batching import Batcher, Busy
from harness.serve.front import Front
from harness.serve.limits import Limits
from harness.serve.metrics import Metrics
from harness.serve.opened import Answer, Query, Where
from harness.serve.requests import BODY, PartOfPhoto, SearchParameters, boxed, filtered, photo_bytes, query_text
from harness.serve.swap import Shelf

PAGE = Path(__file__).parent / "page"
BATCH_WAIT = 0.002  # seconds
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PICTURE: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}}}


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
        try:
            with self.batcher.place():
                return await self._answer(request, parameters)
        except Busy:
            raise HTTPException(503, "too many requests at once: try again later", {"retry-after": "1"}) from None
        except UserError as error:
            raise HTTPException(422, printable(str(error), 500)) from None

    async def _answer(self, request: Request, parameters: PartOfPhoto) -> Answer:
        opened, box = self.shelf.current, boxed(parameters.box)
        k: int = 0
        where: Where = ()
        if isinstance(parameters, SearchParameters):
            k, where = parameters.k, filtered(parameters.filter, opened.columns)
        if opened.takes == "text":
            if box:
                raise HTTPException(422, "box is a part of a photo, and this artefact answers texts")
            ask = self.batcher.ask(Query(text=await query_text(request), k=k, where=where))
        else:
            ask = self._photo(await photo_bytes(request, self.limits), box, k, where)
        task, gone = asyncio.ensure_future(ask), asyncio.ensure_future(request.receive())
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

    async def _photo(self, data: bytes, box: tuple[int, ...], k: int, where: Where) -> Answer:
        loop = asyncio.get_running_loop()
        photo = await loop.run_in_executor(self._decoders, Photo.read, data, box, self.limits.max_pixels)
        return await self.batcher.ask(Query(photo=photo, k=k, where=where))

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


def make_app(service: Service, keys: Sequence[str] = (), hosts: Sequence[str] = ()) -> FastAPI:
    """The service as an ASGI application; `keys` and `hosts` as in `Front`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="Shelfmark",
        description="Search of an exported artefact.",
        version=version("shelfmark"),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load from another host
        redoc_url=None,
    )
    app.add_middleware(Front, metrics=service.metrics, keys=keys, hosts=hosts)
    _explain_refusals(app)

    @app.post("/search", openapi_extra=BODY)
    async def search(request: Request, parameters: Annotated[SearchParameters, InQuery()]) -> Documents:
        """Finds the documents most similar to a photo, or to a text."""
        return answers.documents(await service.answer(request, parameters))

    @app.post("/embed", openapi_extra=BODY)
    async def embed(request: Request, parameters: Annotated[PartOfPhoto, InQuery()]) -> Embedding:
        """Embeds a photo, or a text, without a search."""
        answer = await service.answer(request, parameters)
        return Embedding(artefact=answer.opened.id, embedding=answer.vector.tolist())

    @app.get("/artefact")
    async def artefact() -> About:
        """Describes the artefact in use, and its filters."""
        return answers.about(service.shelf.current, service.limits.max_bytes)

    @app.get("/documents/{row}/thumbnail", response_class=Response, responses=_PICTURE)
    def thumbnail(row: Annotated[int, InPath(ge=0)], artefact: str = "") -> Response:
        """A small picture of a document."""
        opened = service.shelf.current
        if artefact not in ("", opened.id):
            raise HTTPException(410, "the artefact was replaced: search again")
        if row >= len(opened.artefact.documents):
            raise HTTPException(404, f"there are {len(opened.artefact.documents):,} documents")
        file = io.BytesIO()
        opened.artefact.thumbnail(row).save(file, "JPEG", quality=85)
        age = "private, max-age=86400, immutable" if artefact else "no-store"
        return Response(file.getvalue(), media_type="image/jpeg", headers={"cache-control": age})

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Answers as long as the process does."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Answers 200 while there is a place in the queue, else 503."""
        if service.batcher.full:
            raise HTTPException(503, "the queue is full", {"retry-after": "1"})
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Metrics in Prometheus's text format."""
        content, kind = service.metrics.text()
        return Response(content, headers={"content-type": kind})

    @app.get("/api", include_in_schema=False)
    async def api() -> Response:
        return api_page(app.openapi())

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(
            PAGE / "index.html", headers={"content-security-policy": _POLICY, "cache-control": "no-cache"}
        )

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


def _explain_refusals(app: FastAPI) -> None:
    """Every refusal is {"error": one sentence}."""

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> JSONResponse:
        told = {404: "there is nothing here: see /api", 405: "another method is wanted here: see /api"}
        known = error.detail if isinstance(error, HTTPException) else told.get(error.status_code, error.detail)
        return JSONResponse({"error": known}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse({"error": printable(f"{where}: {first['msg']}", 300)}, 422)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> JSONResponse:
        return JSONResponse({"error": "the client left"}, 499)  # for the metrics; nobody reads it

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "the service failed; its log has more"}, 500)
