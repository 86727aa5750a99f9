"""`shelfmark serve`: a service over HTTP that answers as Artefact.search does, whatever else its clients send."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h11
import numpy as np
import pytest
from PIL import Image

from harness.artefact.artefact import Artefact, Photo
from harness.catalogue.catalogue import Catalogue
from harness.commands import serve
from harness.commands.queries import QueriesConfig
from harness.commands.queries import run as make_queries
from harness.commands.serve import ServeConfig
from harness.core.errors import UserError
from harness.core.manifest import fingerprint, write_manifest
from harness.serve import swap
from harness.serve.batching import Batcher, Busy
from tests import test_search
from tests.pool import ranks
from tests.service import Running, exported, form, read, running, until
from tests.twins import documents_alone

HEAD = b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\n"
ROOT = Path(__file__).parents[1]
KEY = "0123456789abcdef-first"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory, catalogue: Path) -> Path:
    return exported(tmp_path_factory.mktemp("served"), catalogue)


@pytest.fixture(scope="module")
def service(artefact: Path) -> Iterator[Running]:
    with running(artefact, max_bytes=1 << 20, max_pixels=1_000_000, queue=64, seconds=600.0) as started:
        yield started


@pytest.fixture(scope="module")
def photos(catalogue: Path) -> list[bytes]:
    opened = Catalogue(catalogue)
    queries = opened.table(["sample_id"], kind="query").column(0).to_pylist()
    return [bytes(opened.read_bytes(sample)) for sample in queries]


def encoded(kind: str = "JPEG", size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels: a thousandth of their memory."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(bytes((1 + side // 8) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def rows_of(content: dict[str, Any]) -> list[tuple[int, float]]:
    return [(found["row"], found["score"]) for found in content["found"]]


def expected(opened: Artefact, photo: Photo, k: int, where: Any = None) -> list[tuple[int, float]]:
    (hits,) = opened.search(opened.embed([photo]), k, where)
    return [(hit.row, hit.score) for hit in hits]


def same(found: list[tuple[int, float]], wanted: list[tuple[int, float]]) -> bool:
    """The same documents in the same order; scores differ by what another batch rounds."""
    rows = [row for row, _ in wanted]
    return [row for row, _ in found] == rows and np.allclose(found, wanted, rtol=0, atol=2e-6)


def test_answers_are_those_of_the_artefact(service: Running, artefact: Path, photos: list[bytes]) -> None:
    """Photo by photo, raw and as a form, a part of it, filtered; vectors, thumbnails, facts."""
    opened, whole = Artefact(artefact), fingerprint(artefact)[:12]
    for data in photos[:4]:
        wanted = expected(opened, Photo.read(data), 5)
        raw = service.ask("POST", "/search?k=5", data, "image/png")
        body, kind = form(('name="image"; filename="../../etc/passwd"', data))
        assert raw.status == 200 and same(rows_of(raw.content), wanted) and raw.content["artefact"] == whole
        assert service.ask("POST", "/search?k=5", body, kind).content == raw.content
        part = service.ask("POST", "/search?k=2&box=4,6,30,20", data, "image/png")
        assert same(rows_of(part.content), expected(opened, Photo.read(data, (4, 6, 30, 20)), 2))
        vector = service.ask("POST", "/embed", data, "image/png").content["embedding"]
        assert np.allclose(vector, opened.embed([Photo.read(data)])[0].numpy(), rtol=0, atol=1e-6)
    facts = service.ask("GET", "/artefact").content
    colours = facts["filters"]["colour"][:2]
    where = "&".join(f"filter=colour={colour}" for colour in colours)
    found = service.ask("POST", f"/search?k=100&{where}", photos[0], "image/png").content
    assert same(rows_of(found), expected(opened, Photo.read(photos[0]), 100, {"colour": colours}))
    assert {row["attributes"]["colour"] for row in found["found"]} == {*colours}
    first = found["found"][0]
    title, item = (opened.documents.column(name)[first["row"]].as_py() for name in ("title", "item"))
    assert (first["title"], first["id"]) == (title, item) and first["description"].startswith("A ")
    shares = {name: opened.documents.column(f"part_{name}")[first["row"]].as_py() for name in ("image", "concepts")}
    assert first["parts"] == pytest.approx(shares, abs=1e-6) and sum(shares.values()) == pytest.approx(1)
    assert {*facts["filters"]} == {"colour", "shape"} == {*first["attributes"]}
    nothing = service.ask("POST", "/search?filter=colour=no+such+colour", photos[0], "image/png")
    assert nothing.status == 200 and nothing.content["found"] == []
    picture = service.ask("GET", f"/{first['thumbnail']}")
    wanted_picture, file = opened.thumbnail(first["row"]), io.BytesIO()
    wanted_picture.save(file, "JPEG", quality=85)
    assert picture.content == file.getvalue() and "immutable" in picture.headers["cache-control"]
    assert (facts["takes"], facts["documents"], facts["artefact"]) == ("image", len(opened.documents), whole)


def test_parts_of_a_photo_that_are_like_a_document(service: Running, artefact: Path, photos: list[bytes]) -> None:
    """Each of 16 cells has the mean similarity of the windows that cover it, by the definition."""
    opened, box = Artefact(artefact), (3, 2, 40, 32)
    x, y, width, height = box
    similarity: list[list[float]] = [[] for _ in range(16)]
    for down, along in np.ndindex(3, 3):
        window = (x + width * along // 4, y + height * down // 4, width // 2, height // 2)
        (vector,) = opened.embed([Photo.read(photos[1], window)])
        for row, column in ((down, along), (down, along + 1), (down + 1, along), (down + 1, along + 1)):
            similarity[4 * row + column].append(float(vector @ opened.vector(2)[0]))
    answer = service.ask("POST", "/explain?row=2&box=3,2,40,32", photos[1], "image/png")
    assert answer.content["columns"] == 4
    assert np.allclose(answer.content["similarity"], [np.mean(cell) for cell in similarity], rtol=0, atol=1e-5)
    assert service.ask("POST", "/explain?row=99", photos[1], "image/png").status == 404
    assert service.ask("POST", "/explain", photos[1], "image/png").content["error"].startswith("row: ")


def test_pages_and_probes(service: Running) -> None:
    assert service.ask("GET", "/healthz").content == {"status": "ok"}
    assert service.ask("GET", "/readyz").content == {"status": "ready"}
    for path, piece in (("/", b"Find a product"), ("/page/app.js", b"fetch("), ("/page/style.css", b"--accent")):
        answer = service.ask("GET", path)
        assert answer.status == 200 and piece in answer.content
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert b"//" not in answer.content.replace(b"// ", b"").replace(b"http://www.w3.org/2000/svg", b""), "a host"
    assert "default-src 'none'" in service.ask("GET", "/").headers["content-security-policy"]
    routes = service.ask("GET", "/openapi.json").content["paths"]
    page = service.ask("GET", "/api").content.decode()
    assert all(path in page for path in ("/search", "/embed", *routes)) and "https://" not in page
    metrics = service.ask("GET", "/metrics").content.decode()
    assert 'shelfmark_requests_total{route="/healthz",status="200"} ' in metrics
    assert 'shelfmark_artefact_documents{artefact="' in metrics and "process_resident_memory_bytes" in metrics


def chunked(path: str, data: bytes, more: bytes = b"") -> list[bytes]:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"%x\r\n%s\r\n" % (len(data), data)
    return [head.encode(), *[piece] * (50 if more else 1), more or b"0\r\n\r\n"]


def bad_requests(good: bytes) -> Iterator[tuple[str, int, str, Any]]:
    """What it is, status, a piece of the message, how it is asked: (method, path, body, kind[, headers]) or bytes."""
    part = 'name="image"; filename="a.jpg"'
    image = "image/jpeg"
    yield "text", 422, "not an image", ("POST", "/search", b"hello" * 9, image)
    yield "HTML", 422, "not an image", ("POST", "/search", b"<!doctype html><script>1</script>", image)
    yield "SVG", 422, "SVG files are not read", ("POST", "/search", b"<svg xmlns='x'/>", "image/svg+xml")
    yield "cut off", 422, "truncated or damaged", ("POST", "/search", good[: len(good) // 2], image)
    yield "PNG, damaged", 422, "truncated or damaged", ("POST", "/search", encoded("PNG")[:-30], "image/png")
    yield "a bomb", 422, "too many pixels: 16000 x 16000", ("POST", "/search", bomb(16000), "image/png")
    yield "a bomb in a form", 422, "too many pixels", ("POST", "/embed", *form((part, bomb(4000))))
    yield "0 bytes", 422, "0 bytes", ("POST", "/search", b"", image)
    yield "0 bytes in a form", 422, "0 bytes", ("POST", "/search", *form((part, b"")))
    yield "50 MB, told", 413, "1,048,576 bytes", HEAD + b"Content-Length: 52428800\r\n\r\n"
    yield "50 MB, sent", 413, "1,048,576 bytes", ("POST", "/search", bytes(50 << 20), image)
    yield "50 MB in a form", 413, "1,048,576 bytes", ("POST", "/search", *form((part, bytes(50 << 20))))
    yield "50 MB in chunks", 413, "1,048,576 bytes", chunked("/search", bytes(1 << 20), b"0\r\n\r\n")
    yield "wrong chunks", 400, "not HTTP", [*chunked("/search", good)[:1], b"zzz\r\n"]
    yield "no type", 415, "Send an image", ("POST", "/search", good, "")
    yield "another type", 415, "'text/plain'", ("POST", "/search", good, "text/plain")
    yield "JSON for a photo", 415, "Send an image", ("POST", "/search", b'{"text": "red"}', "application/json")
    yield "no boundary", 400, "boundary", ("POST", "/search", form((part, good))[0], "multipart/form-data")
    yield "a broken form", 400, "multipart", ("POST", "/search", b"x" * 50, "multipart/form-data; boundary=b")
    yield "a form without an end", 422, "has nothing", ("POST", "/search", form((part, good))[0][:-20], form()[1])
    yield "an empty form", 422, "has nothing", ("POST", "/search", *form())
    yield "two files", 400, "Too many files", ("POST", "/search", *form((part, good), (part, good)))
    yield "a field of text", 422, "has 'image'", ("POST", "/search", *form(('name="image"', b"text")))
    yield "k in the form", 422, "go into the URL", ("POST", "/search", *form((part, good), ('name="k"', b"5")))
    yield "another name", 422, "has 'photo'", ("POST", "/search", *form(('name="photo"; filename="a"', good)))
    yield "a long field", 400, "maximum size", ("POST", "/search", *form(('name="k"', b"5" * 2000)))
    yield "k = 0", 422, "k: ", ("POST", "/search?k=0", good, image)
    yield "k = 101", 422, "k: ", ("POST", "/search?k=101", good, image)
    yield "k is a word", 422, "k: ", ("POST", "/search?k=many", good, image)
    yield "unknown parameter", 422, "boxx: ", ("POST", "/search?boxx=1", good, image)
    yield "three numbers", 422, "four whole numbers", ("POST", "/search?box=1,2,3", good, image)
    yield "not numbers", 422, "four whole numbers", ("POST", "/search?box=a,b,c,d", good, image)
    yield "large numbers", 422, "four whole numbers", ("POST", f"/search?box=1,1,1,{9**99}"[:90], good, image)
    yield "an empty box", 422, "is empty", ("POST", "/search?box=1,1,0,5", good, image)
    yield "a box outside", 422, "leaves the photo", ("POST", "/search?box=60,0,30,5", good, image)
    yield "half a filter", 422, "ATTRIBUTE=VALUE", ("POST", "/search?filter=colour", good, image)
    yield "unknown filter", 422, "unknown filter 'x'", ("POST", "/search?filter=x=1", good, image)
    yield "hidden column", 422, "unknown filter", ("POST", "/search?filter=class_key=1", good, image)
    yield "300 filters", 422, "filter: ", ("POST", "/search?" + "&".join(["filter=colour=r"] * 300), good, image)
    yield "out of the folder", 404, "nothing here", ("GET", "/../../etc/passwd", b"", "")
    yield "out of the page", 404, "nothing here", ("GET", "/page/../app.py", b"", "")
    yield "coded dots", 404, "nothing here", ("GET", "/page/%2e%2e/%2e%2e/serve/app.py", b"", "")
    yield "a zero byte", 404, "nothing here", ("GET", "/page/app.js%00.html", b"", "")
    yield "row below 0", 422, "row: ", ("GET", "/documents/-1/thumbnail", b"", "")
    yield "row too large", 404, "documents", ("GET", "/documents/999999999999999999999/thumbnail", b"", "")
    yield "row is a word", 422, "row: ", ("GET", "/documents/a/thumbnail", b"", "")
    yield "another artefact", 410, "replaced", ("GET", "/documents/0/thumbnail?artefact=0", b"", "")
    yield "unknown route", 404, "nothing here", ("GET", "/admin", b"", "")
    yield "another method", 405, "another method", ("GET", "/search", b"", "")
    yield "many headers", 431, "100 headers", ("GET", "/healthz", b"", "", [(f"X-{n}", "1") for n in range(200)])
    yield "long headers", 400, "bytes of headers", [b"GET / HTTP/1.1\r\n", *[b"X-A: " + b"a" * 9000 + b"\r\n"] * 40]
    yield "another host", 421, "another host", b"GET /artefact HTTP/1.1\r\nHost: evil.example\r\n\r\n"
    yield "no host", 400, "not HTTP", b"GET /artefact HTTP/1.1\r\n\r\n"
    yield "TLS", 400, "not HTTP", bytes.fromhex("16030100a5010000a10303") + b"\0" * 80
    yield "two lengths", 400, "not HTTP", HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!"
    yield "length below 0", 400, "not HTTP", HEAD + b"Content-Length: -5\r\n\r\n"


def test_bad_input_is_told_and_harms_nobody(service: Running, photos: list[bytes]) -> None:
    """Each gets its status and one message; the next request is answered as ever."""
    right = service.ask("POST", "/search?k=3", photos[0], "image/png")
    assert right.status == 200
    count = 0
    for what, status, piece, asked in bad_requests(encoded()):
        if isinstance(asked, tuple):
            answer = service.ask(*asked)
        else:
            answer = service.send(*([asked] if isinstance(asked, bytes) else asked))
        assert answer.status == status, f"{what}: {answer}"
        assert [*answer.content] == ["error"] and piece in answer.content["error"], f"{what}: {answer.content}"
        assert "\n" not in answer.content["error"] and "/tmp" not in answer.content["error"], what
        assert service.ask("POST", "/search?k=3", photos[0], "image/png").content == right.content, what
        count += 1
    assert count >= 50
    assert service.service.batcher.taken == 0


def test_slow_clients_are_ended(artefact: Path, photos: list[bytes]) -> None:
    """Nothing, half a header, half a body, either byte by byte, and a second half header on a connection that was good:
    all end, and meanwhile others are answered.
    """
    half, body = HEAD[:40], HEAD + b"Content-Length: 1000\r\n\r\n" + b"x" * 10
    good = HEAD + b"Content-Length: %d\r\n\r\n" % len(photos[0]) + photos[0]
    with running(artefact, seconds=1.0) as service, ThreadPoolExecutor(8) as pool:

        def end(first: bytes, drops: bytes = b"", answers: int = 0) -> tuple[int, str]:
            with service.connect() as client:
                client.sendall(first)
                for _ in range(answers):
                    assert read(client).status == 200
                    client.sendall(drops)
                for drop in drops if not answers else b"":
                    time.sleep(0.1)
                    try:
                        client.send(bytes([drop]))
                    except OSError:
                        break
                data = b"".join(iter(lambda: client.recv(65536), b""))
                return int(data[9:12] or 0), data.rpartition(b"\r\n\r\n")[2].decode()

        cases = [(b"",), (half,), (body,), (half, HEAD[40:90]), (body, b"y" * 50), (good, half, 1)]
        ended = [pool.submit(end, *case) for case in cases]
        while not all(done.done() for done in ended):
            assert service.ask("GET", "/healthz").status == 200
        (nothing, silence), *others = [done.result() for done in ended]
        assert (nothing, silence) == (0, "")
        assert {status for status, _ in others} == {408}
        assert all(json.loads(text) == {"error": "the request did not arrive within 1 seconds"} for _, text in others)
        assert service.ask("POST", "/search", photos[0], "image/png").status == 200
        assert service.service.batcher.taken == 0


def test_the_time_of_a_request_begins_with_its_first_byte(service: Running) -> None:
    """Not with the previous answer on its connection."""
    with service.connect() as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert read(client).status == 200
        port = client.getsockname()[1]
        (connection,) = (made for made in service.server.server_state.connections if made.client[1] == port)
        until(lambda: connection.conn.their_state is h11.IDLE)
        ends = connection.timer.when()
        client.sendall(b"G")
        until(lambda: connection.conn.trailing_data[0])
        assert connection.timer.when() > ends


def test_more_than_the_queue_or_the_connections_hold_is_refused(artefact: Path, photos: list[bytes]) -> None:
    with running(artefact, queue=1, connections=2) as service:
        with service.connect() as slow:
            slow.sendall(HEAD + b"Content-Length: 99\r\n\r\n")
            until(lambda: service.service.batcher.taken)
            answer = service.ask("POST", "/search", photos[0], "image/png")
            assert answer.status == 503 and answer.headers["retry-after"] == "1"
            assert answer.content == {"error": "too many requests at once: try again later"}
            assert service.ask("GET", "/readyz").status == 503
            with service.connect():
                answer = service.ask("GET", "/healthz")
                assert answer.status == 503 and answer.content == {"error": "too many connections: try again later"}
        until(lambda: not service.service.batcher.taken)  # the client left, and with it its place
        assert service.ask("POST", "/search", photos[0], "image/png").status == 200


def test_a_client_that_leaves_frees_its_place(service: Running, photos: list[bytes]) -> None:
    """Before its answer: the encoder is busy all the while."""
    batcher, free = service.service.batcher, threading.Event()
    batcher.thread.submit(free.wait)
    try:
        with service.connect() as client:
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(photos[0]) + photos[0])
            until(lambda: batcher.taken == 1)
        until(lambda: batcher.taken == 0)
    finally:
        free.set()
    assert service.ask("POST", "/search", photos[0], "image/png").status == 200


def test_queries_that_wait_make_one_batch() -> None:
    """Those that came while the thread was busy, without the cancelled one; a failed query costs itself; a full queue
    refuses.
    """
    free, batches = threading.Event(), []

    def work(queries: list[int]) -> list[int | Exception]:
        batches.append(queries)
        free.wait()
        return [ValueError(str(query)) if query == 3 else 10 * query for query in queries]

    async def scenario() -> None:
        batcher = Batcher(work, 4, 0.0, places=2)
        runs = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.ask(0))
        while not batches:
            await asyncio.sleep(0)
        others = [asyncio.create_task(batcher.ask(query)) for query in range(1, 8)]
        await asyncio.sleep(0)
        others[1].cancel()
        await asyncio.sleep(0)
        free.set()
        answers = await asyncio.gather(first, *others, return_exceptions=True)
        assert batches == [[0], [1, 3, 4], [5, 6, 7]]
        assert [answer for answer in answers if isinstance(answer, int)] == [0, 10, 40, 50, 60, 70]
        assert isinstance(answers[2], asyncio.CancelledError) and str(answers[3]) == "3"
        with batcher.place(), batcher.place():
            with pytest.raises(Busy), batcher.place():
                pass
        assert batcher.taken == 0
        runs.cancel()

    asyncio.run(scenario())


def renamed(artefact: Path, copy: Path) -> Path:
    """The same artefact under another name of its run, and so with another identity."""
    shutil.copytree(artefact, copy)
    meta = json.loads((copy / "artefact.json").read_text())
    (copy / "artefact.json").write_text(json.dumps({**meta, "run": copy.name}))
    (copy / "manifest.json").unlink()
    write_manifest(copy, algorithm="sha256")
    return copy


def test_a_swap_under_load_drops_nothing(
    artefact: Path, photos: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link is pointed elsewhere twice, once at a folder that is damaged: every request is answered rightly."""
    monkeypatch.setattr(swap, "WATCH", 0.2)
    other, link, stop = renamed(artefact, tmp_path / "other"), tmp_path / "link", threading.Event()
    damaged = renamed(artefact, tmp_path / "damaged")
    (damaged / "artefact.json").write_text("{}")
    link.symlink_to(artefact)
    wanted = [expected(Artefact(artefact), Photo.read(photo), 3) for photo in photos[:4]]

    def point(folder: Path) -> None:
        (tmp_path / "next").symlink_to(folder)
        os.replace(tmp_path / "next", link)

    with running(link) as service, ThreadPoolExecutor(6) as pool:

        def load(worker: int) -> list[str]:
            seen = []
            while not stop.is_set():
                answer = service.ask("POST", "/search?k=3", photos[worker % 4], "image/png")
                assert answer.status == 200 and same(rows_of(answer.content), wanted[worker % 4]), answer
                seen.append(answer.content["artefact"])
            return seen

        try:
            workers = [pool.submit(load, worker) for worker in range(6)]
            point(damaged)
            assert not service.reload() and service.service.shelf.current.id == fingerprint(artefact)[:12]
            point(other)
            until(lambda: service.service.shelf.swaps)  # the service looks by itself
            for _ in range(3):
                assert service.ask("GET", "/artefact").content["run"] == "other"
        finally:
            stop.set()
        seen = [worker.result() for worker in workers]
        ids = [fingerprint(folder)[:12] for folder in (artefact, other)]
        assert {name for names in seen for name in names} == {*ids}
        assert all(names == sorted(names, key=ids.index) for names in seen), "an answer of the previous artefact"
        assert service.ask("GET", f"/documents/0/thumbnail?artefact={ids[0]}").status == 410
        text = service.ask("GET", "/metrics").content.decode()
        assert 'shelfmark_swaps_total{result="done"} 1.0' in text and 'swaps_total{result="refused"}' in text
        assert 'route="/search",status="200"' in text and not [
            line for line in text.splitlines() if 'status="5' in line
        ]


def test_a_key_is_wanted_where_there_is_one(artefact: Path, tmp_path: Path, photos: list[bytes]) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\nanother-key-of-24-letters\n")
    with running(artefact, api_key_file=file, hosts=("shop.example",)) as service:

        def status(path: str, *headers: tuple[str, str]) -> int:
            return service.ask("GET", path, headers=headers).status

        for path in ("/artefact", "/metrics", "/documents/0/thumbnail", "/nothing"):
            assert status(path) == 401
        answer = service.ask("POST", "/search", photos[0], "image/png")
        assert answer.status == 401 and "API key" in answer.content["error"]
        for wrong in (KEY[:-1], f"{KEY}x", "", "é"):
            assert status("/artefact", ("Authorization", f"Bearer {wrong}")) == 401
        assert status("/artefact", ("Authorization", f"Basic {KEY}")) == 401
        for right in (KEY, "another-key-of-24-letters"):
            assert status("/artefact", ("Authorization", f"Bearer {right}")) == 200
        assert [status(path) for path in ("/", "/page/app.js", "/healthz", "/api", "/openapi.json")] == [200] * 5
        assert service.send(b"GET /healthz HTTP/1.1\r\nHost: Shop.Example:443\r\n\r\n").status == 200


def test_mistakes_of_the_command(artefact: Path, tmp_path: Path) -> None:
    def message(**values: Any) -> str:
        with pytest.raises(UserError) as error:
            serve.prepare(ServeConfig(**{"artefact": artefact, "port": 0, **values}))
        assert "\n" not in str(error.value)
        return str(error.value)

    short = tmp_path / "short"
    short.write_text("abc\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in message(port=taken.getsockname()[1])
    assert "no such folder" in message(artefact=tmp_path / "none")
    assert "no artefact" in message(artefact=tmp_path)
    assert "0..65535" in message(port=70000)
    assert "--host no.such.host.invalid" in message(host="no.such.host.invalid")
    assert "No such file" in message(api_key_file=tmp_path / "none")
    assert "fewer than 16" in message(api_key_file=short)
    assert serve.allowed_hosts("127.0.0.1", ()) and serve.allowed_hosts("0.0.0.0", ()) == []


@pytest.mark.full
def test_the_command_swaps_on_sighup_and_ends_after_the_last_answer(
    artefact: Path, photos: list[bytes], tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(artefact)
    command = [sys.executable, "-m", "harness", "serve", str(link), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        lines = [process.stdout.readline() for _ in range(3)]
        assert "6 documents, answers image queries" in lines[0] and "only this machine" in lines[2]
        port = int(lines[1].split(":")[3].split("/")[0])
        link.unlink()
        link.symlink_to(renamed(artefact, tmp_path / "other"))
        process.send_signal(signal.SIGHUP)
        assert "in place of" in process.stderr.readline()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            half = len(photos[0]) // 2
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(photos[0]) + photos[0][:half])
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            client.sendall(photos[0][half:])
            answer = read(client)
            assert answer.status == 200 and answer.content["artefact"] == fingerprint(tmp_path / "other")[:12]
        assert process.wait(60) == 0


@pytest.mark.full
def test_texts_are_searched_for(tmp_path: Path) -> None:
    """MAKE: words in JSON; all else is told."""
    products = documents_alone(tmp_path / "documents")
    make_queries(QueriesConfig(catalogue=products, min_count=2, category="shape"))
    ranks(1).run(test_search.exported, "make", products, tmp_path / "run")
    opened, kind = Artefact(tmp_path / "make"), "application/json"
    with running(tmp_path / "make") as service:
        for text in ("red disc", "a box", "日本 \N{FACE WITH TEARS OF JOY}"):
            (hits,) = opened.search(opened.embed_texts([text]), 4)
            answer = service.ask("POST", "/search?k=4", json.dumps({"text": text}).encode(), kind)
            assert same(rows_of(answer.content), [(hit.row, hit.score) for hit in hits])
        for body, status, piece in (
            (b"", 400, "not JSON"),
            (b"{", 400, "not JSON"),
            (b"[" * 50_000, 400, "not JSON"),
            (b'{"text": ' + b"1" * 9000 + b"}", 400, "not JSON"),
            (b"\xff\xfe\x00", 400, "not JSON"),
            (b'"red"', 422, "one text"),
            (b'{"text": 5}', 422, "one text"),
            (b'{"text": "red", "k": 5}', 422, "one text"),
            (b'{"text": "  "}', 422, "not only spaces"),
            (b'{"text": "%s"}' % (b"x" * 1001), 422, "1,001 characters"),
            (b'{"text": "\\ud800"}', 422, "surrogate"),
            (b" " * 100_000, 413, "65,536 bytes"),
        ):
            answer = service.ask("POST", "/search", body, kind)
            assert answer.status == status and piece in answer.content["error"], (body[:40], answer)
        assert service.ask("POST", "/search", encoded(), "image/jpeg").status == 415
        assert service.ask("POST", "/search?box=1,1,5,5", b'{"text": "red"}', kind).status == 422
