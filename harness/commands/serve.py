"""`shelfmark serve`: Answer searches over HTTP, with a page for the browser."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from harness.artefact.flat_index import import_faiss
from harness.core.errors import UserError
from harness.core.files import printable
from models.ranges import PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from uvicorn import Server

    from harness.serve.service import Service

EXAMPLE = "shelfmark serve artefacts/grocery --port 8080"
SHORTEST_KEY = 16
BACKLOG = 2048  # connections that wait to be accepted
KEEP_ALIVE = 30  # seconds that an idle connection stays open


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serves an artefact until it is stopped: a page at /, its routes at /api. Takes the next artefact into use when
    the link ARTEFACT is pointed at it, without a lost request.

    Args:
        artefact: the folder that `shelfmark export` wrote, or a link to it.
        host: address to listen on; this machine only by default.
        port: 0 takes a free one.
        api_key_file: file of keys, one a line, of which each request must bring one; none is asked for by default.
        hosts: further names by which clients may call the service (the Host header).
        batch: queries embedded together at most.
        queue: requests at work at once; more are refused with 503.
        connections: open connections at most.
        max_bytes: of a photo.
        max_pixels: of a photo; a JPEG of up to four times as many is decoded at half its width and height.
        seconds: in which a request has to arrive, and then in which it has to be answered.
        threads: for decoding, and for embedding; half the cores by default.
        backend: decoder of the photos; the one that the run was trained with by default.
    """

    artefact: Path = field(kw_only=False)
    host: str = "127.0.0.1"
    port: int = 8080
    api_key_file: Path | None = None
    hosts: tuple[str, ...] = ()
    batch: PositiveInt = 32
    queue: PositiveInt = 256
    connections: PositiveInt = 512
    max_bytes: PositiveInt = 8 << 20
    max_pixels: PositiveInt = 25_000_000
    seconds: PositiveFloat = 30.0
    threads: PositiveInt | None = None
    backend: Literal["dali", "reference"] | None = None


def run(config: ServeConfig) -> dict[str, Any]:
    """Serves until SIGINT or SIGTERM; requests at work are answered first. SIGHUP opens the artefact again.

    Returns:
        requests answered, and swaps.

    Raises:
        UserError: as `prepare`.
    """
    prepared = prepare(config)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        reloads = []  # a task lives as long as something refers to it
        loop.add_signal_handler(signal.SIGHUP, lambda: reloads.append(loop.create_task(prepared.service.reload())))
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, prepared.server.handle_exit, number, None)
        await prepared.server.serve(sockets=[prepared.listener])

    for line in _greeting(config, prepared):
        print(line, flush=True)
    asyncio.run(serve())
    return {"requests": prepared.server.server_state.total_requests, "swaps": prepared.service.shelf.swaps}


class Prepared(NamedTuple):
    """A service that only has to be started: `await server.serve(sockets=[listener])`."""

    server: Server
    service: Service
    listener: socket.socket


def prepare(config: ServeConfig) -> Prepared:
    """Listens, and opens the artefact.

    Raises:
        UserError: an artefact that cannot be opened, a port that is taken, a key file without good keys, or a package
            of shelfmark[serve] that is missing.
    """
    try:
        from uvicorn import Config, Server

        from harness.serve.app import make_app
        from harness.serve.limits import Limits, guarded_protocol
        from harness.serve.opened import Opened
        from harness.serve.service import Service
        from harness.serve.swap import Shelf
    except ImportError as error:
        raise UserError(f"the service does not import ({error})", "Install shelfmark[serve]") from error

    class Ended(Server):
        """Leaves the signals to `run`; uvicorn would end the process by the one that it got."""

        @contextmanager
        def capture_signals(self) -> Generator[None, None, None]:
            """Does nothing."""
            yield

    keys = read_keys(config.api_key_file)
    listener = listen(config.host, config.port)  # before the artefact: a taken port is told at once
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // 2)
    torch.set_num_threads(threads)
    import_faiss().omp_set_num_threads(1)  # FAISS's threads and torch's would share the same cores
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a bad client is not worth a line
    shelf = Shelf(config.artefact, partial(Opened, backend=config.backend, threads=threads, batch=config.batch))
    limits = Limits(
        max_bytes=config.max_bytes,
        max_pixels=config.max_pixels,
        queue=config.queue,
        connections=config.connections,
        seconds=config.seconds,
    )
    service = Service(shelf, limits, config.batch, threads)
    server = Ended(
        Config(
            make_app(service, keys, allowed_hosts(config.host, config.hosts)),
            http=guarded_protocol(limits),
            loop="asyncio",
            ws="none",
            log_config=None,
            access_log=False,  # /metrics counts
            server_header=False,
            proxy_headers=False,  # nothing asks for the client's address
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=int(limits.seconds) + 1,
        )
    )
    return Prepared(server, service, listener)


def read_keys(file: Path | None) -> list[str]:
    """The keys of a file, one a line.

    Raises:
        UserError: the file cannot be read, has none, or one that is short or not plain ASCII.
    """
    if file is None:
        return []
    try:
        keys = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"--api-key-file {file}: {reason}", "Name a file with a key a line") from error
    if not keys or any(len(key) < SHORTEST_KEY or not key.isascii() for key in keys):
        raise UserError(
            f"--api-key-file {file} has no key, or one of fewer than {SHORTEST_KEY} characters",
            "Write one, as from `openssl rand -hex 32`",
        )
    return keys


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: no such address, or the port is taken or not allowed.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}", "It must be in 0..65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {printable(host)} --port {port}: {reason}", "Choose another") from error


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allowed_hosts(host: str, more: tuple[str, ...]) -> list[str]:
    """Names of the Host header that are answered; empty: all."""
    if not is_loopback(host) and not more:
        return []
    return ["localhost", "127.0.0.1", "::1", host, *more]


def _greeting(config: ServeConfig, prepared: Prepared) -> list[str]:
    name = f"[{config.host}]" if ":" in config.host else config.host
    opened, at = prepared.service.shelf.current, f"http://{name}:{prepared.listener.getsockname()[1]}"
    count = len(opened.artefact.documents)
    lines = [
        f"{config.artefact} ({opened.id}): {count:,} documents, answers {opened.takes} queries",
        f"page: {at}/   routes: {at}/api",
    ]
    if is_loopback(config.host):
        return [*lines, "only this machine reaches it; --host 0.0.0.0 opens it to others. Ctrl-C ends it"]
    key = "an API key is wanted" if config.api_key_file else "NO API key is wanted (--api-key-file)"
    return [*lines, f"every machine that reaches this address may ask; {key}; no encryption. Ctrl-C ends it"]
