"""A running search service, and a client that sends it anything, byte by byte."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple

from harness.commands import export
from harness.commands.serve import Prepared, ServeConfig, prepare
from tests.pool import ranks
from tests.runs import tiny_config, trainer

PATIENCE = 60.0  # seconds for any answer


class Answered(NamedTuple):
    """Status, content (JSON if it is), headers."""

    status: int
    content: Any
    headers: dict[str, str]


class Running:
    """A service on a free port of this machine."""

    def __init__(self, prepared: Prepared, loop: asyncio.AbstractEventLoop) -> None:
        self.service, self.server, self.loop = prepared.service, prepared.server, loop
        self.port: int = prepared.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"

    def reload(self) -> bool:
        """As SIGHUP, but waits."""
        return asyncio.run_coroutine_threadsafe(self.service.reload(), self.loop).result(PATIENCE)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def send(self, *parts: bytes) -> Answered:
        """Sends bytes, however wrong, and reads one answer."""
        with self.connect() as client:
            try:
                for part in parts:
                    client.sendall(part)
            except OSError:
                pass  # refused before all of it was sent
            return read(client)

    def ask(
        self, method: str, path: str, body: bytes = b"", kind: str = "", headers: Iterable[tuple[str, str]] = ()
    ) -> Answered:
        """One well-formed request on a connection of its own."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", "Connection: close"]
        lines += [f"Content-Type: {kind}"] if kind else []
        lines += [f"Content-Length: {len(body)}"] if body or method == "POST" else []
        lines += [f"{name}: {value}" for name, value in headers]
        return self.send("\r\n".join([*lines, "", ""]).encode() + body)


def until(condition: Callable[[], Any]) -> None:
    """Waits; fails where it would take too long."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def read(client: socket.socket) -> Answered:
    """The answer on a connection."""
    answer = HTTPResponse(client)
    answer.begin()
    content: Any = answer.read()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    if headers.get("content-type") == "application/json":
        content = json.loads(content)
    return Answered(answer.status, content, headers)


def exported(folder: Path, catalogue: Path, **overrides: Any) -> Path:
    """The artefact of a short run on `catalogue`."""
    ranks(1).run(_train_and_export, folder / "run", catalogue, folder / "artefact", overrides)
    return folder / "artefact"


def _train_and_export(run: Path, catalogue: Path, out: Path, overrides: dict[str, Any]) -> None:
    """In a pool."""
    with trainer(tiny_config(catalogue, run, **{"train.steps": 1, **overrides})) as t:
        t.fit()
    export.run(export.ExportConfig(run=run, out=out, onnx=False))


@contextmanager
def running(artefact: Path, **options: Any) -> Iterator[Running]:
    """`shelfmark serve ARTEFACT` in a thread of this process."""
    prepared = prepare(ServeConfig(**{"artefact": artefact, "port": 0, "threads": 1, **options}))
    started, found = threading.Event(), []

    async def serve() -> None:
        found.append(asyncio.get_running_loop())
        asyncio.get_running_loop().call_soon(started.set)
        await prepared.server.serve(sockets=[prepared.listener])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    started.wait()
    try:
        yield Running(prepared, found[0])
    finally:
        prepared.server.should_exit = True
        thread.join()


def form(*parts: tuple[str, bytes]) -> tuple[bytes, str]:
    """Body and content type of multipart/form-data; each part is its Content-Disposition behind form-data, and data."""
    pieces = [
        b"--b\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (name.encode(), data) for name, data in parts
    ]
    return b"".join([*pieces, b"--b--\r\n"]), "multipart/form-data; boundary=b"
