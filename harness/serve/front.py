"""Checks in front of every route: host, headers, API key; the count and the time of every answer."""

from __future__ import annotations

import hmac
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harness.serve.limits import MOST_HEADER_BYTES, MOST_HEADERS
from harness.serve.metrics import Metrics

# Without a key: what tells nothing of the artefact. The page asks its reader for the key.
OPEN = ("/", "/healthz", "/readyz", "/api", "/openapi.json")
OPEN_FOLDER = "/page/"
_ALWAYS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]


class Front:
    """ASGI middleware.

    Args:
        app: what answers.
        metrics: counts.
        keys: of which a request must bring one; empty asks for none.
        hosts: names in the Host header that are answered, without ports; empty answers all. A page of another site
            whose name was pointed at this machine (DNS rebinding) is refused by it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, keys: Sequence[str], hosts: Sequence[str]) -> None:
        self._app, self._metrics = app, metrics
        self._keys = [key.encode() for key in keys]
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *_ALWAYS]}
            await send(message)

        try:
            refusal = self._refusal(scope)
            await (refusal or self._app)(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > MOST_HEADERS or sum(len(name) + len(value) for name, value in headers) > MOST_HEADER_BYTES:
            most = f"{MOST_HEADERS} headers or {MOST_HEADER_BYTES:,} bytes of them"
            return JSONResponse({"error": f"the request has more than {most}"}, 431, {"connection": "close"})
        values = dict(headers)
        host = urlsplit(f"//{values.get(b'host', b'').decode('latin-1')}").hostname or ""
        if self._hosts and host not in self._hosts:
            return JSONResponse({"error": "the Host header names another host (see --hosts)"}, 421)
        path: str = scope["path"]
        if self._keys and path not in OPEN and not path.startswith(OPEN_FOLDER) and not self._knows(values):
            answer = {"error": "this service wants an API key: send the header Authorization: Bearer KEY"}
            return JSONResponse(answer, 401, {"www-authenticate": "Bearer"})
        return None

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        """Compares with every key, each in constant time."""
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        found = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return kind.lower() == b"bearer" and any(found)
