"""Routes of the search service."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Sequence
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

from harness.core.files import printable
from harness.serve import answers
from harness.serve.answers import About, Documents, Embedding, Explanation
from harness.serve.api_page import api_page
from harness.serve.front import Front
from harness.serve.requests import BODY, ExplainParameters, PartOfPhoto, SearchParameters
from harness.serve.service import Service, require_row

PAGE = Path(__file__).parent / "page"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PICTURE: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}}}


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

    @app.post("/explain", openapi_extra=BODY)
    async def explain(request: Request, parameters: Annotated[ExplainParameters, InQuery()]) -> Explanation:
        """Tells the parts of a photo that are like a document: the photo is embedded window by window."""
        return await service.explain(request, parameters)

    @app.get("/artefact")
    async def artefact() -> About:
        """Describes the artefact in use, and its filters."""
        return answers.about(service.shelf.current, service.limits.max_bytes)

    @app.get("/documents/{row}/thumbnail", response_class=Response, responses=_PICTURE)
    def thumbnail(row: Annotated[int, InPath(ge=0)], artefact: str = "") -> Response:
        """A small picture of a document."""
        opened = service.shelf.current
        require_row(opened, row, artefact)
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
