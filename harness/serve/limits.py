"""Bounds on what a client may send, and on the time it may take."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
from fastapi import HTTPException, Request
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_HEADERS, MOST_HEADER_BYTES = 100, 16 << 10  # of a request
LINGER = 2.0  # seconds in which a refused client may still send, so that it reads why


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the service.

    Args:
        max_bytes: of a request's body.
        max_pixels: of a photo; a JPEG of up to four times as many is decoded at half its width and height.
        queue: requests being read, decoded or embedded; more are refused with 503.
        connections: open connections; more are refused with 503.
        seconds: in which a request has to arrive, and then in which it has to be answered.
    """

    max_bytes: int
    max_pixels: int
    queue: int
    connections: int
    seconds: float


async def body_parts(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body of a request, piece by piece.

    Raises:
        HTTPException: 413 for more than `most` bytes; nothing is read where Content-Length says so.
    """
    refusal = HTTPException(413, f"the body has more than {most:,} bytes: send a smaller photo")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:  # h11 lets only digits pass
        raise refusal
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise refusal
        yield part


def guarded_protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with a deadline and a bound on connections, which uvicorn has for neither half a header nor
    half a body. Every refusal is an HTTP answer with one JSON message.
    """

    class Guarded(H11Protocol):
        """One connection."""

        timer: asyncio.TimerHandle | None = None
        refused = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._restart()
            if len(self.connections) > limits.connections:
                self._refuse(503, "too many connections: try again later", "retry-after: 1\r\n")

        def data_received(self, data: bytes) -> None:
            if self.refused:
                return  # read and dropped: closing would reset the connection before the client reads the answer
            if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
                self._restart()  # first byte of another request
            super().data_received(data)

        def handle_events(self) -> None:
            super().handle_events()
            # While the service works on a whole request, time counts against the service.
            if self.timer is not None and self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
                self.timer.cancel()
                self.timer = None

        def on_response_complete(self) -> None:
            self._restart()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.timer is not None:
                self.timer.cancel()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._restart()  # the client does not read its answer

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, f"this is not HTTP/1.1, or has more than {MOST_HEADER_BYTES:,} bytes of headers")

        def _restart(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
            self.timer = self.loop.call_later(limits.seconds, self._late)

        def _late(self) -> None:
            begun = self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]
            if self.refused or not begun or self.flow.write_paused:
                self.transport.abort()
            else:
                self._refuse(408, f"the request did not arrive within {limits.seconds:g} seconds")

        def _refuse(self, status: int, message: str, more: str = "") -> None:
            self.refused = True
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is on its way, or was sent
                self.transport.abort()
                return
            if self.cycle is not None:
                self.cycle.disconnected = True  # what waits for the body ends
                self.cycle.message_event.set()
            body = json.dumps({"error": message}).encode()
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n{more}\r\n"
            )
            self.flow.resume_reading()
            self.transport.write(head.encode() + body)
            self.transport.write_eof()
            self.loop.call_later(LINGER, self.transport.abort)

    return Guarded
