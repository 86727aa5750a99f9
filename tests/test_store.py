"""Shards on a real HTTP server: the same bytes, a bounded cache, patience with a server in trouble, one error where it
stays in trouble.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.catalogue import store
from harness.catalogue.catalogue import Catalogue, CorruptSample
from harness.catalogue.store import LocalStore, ReadCache, RemoteStore
from harness.commands import shards
from harness.core.errors import UserError
from harness.data.images import ImageReader
from harness.data.preprocess import PreprocessSpec
from tests.catalogues import make_catalogue

CPU = torch.device("cpu")


class Server(ThreadingHTTPServer):
    """Serves a folder by ranges. `fail` answers so many requests with 500, `stall` lets so many wait."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fail, self.stall = folder, 0, 0
        self.ranges: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.server.stall:
            self.server.stall -= 1
            time.sleep(2)
            return
        if self.server.fail:
            self.server.fail -= 1
            return self.send_error(500)
        path = self.server.folder / self.path.strip("/")
        if path.is_dir():
            body = "".join(f'<a href="{name}">{name}</a>' for name in os.listdir(path)).encode()
        elif path.is_file():
            body = path.read_bytes()
        else:
            return self.send_error(404)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.send_response(206 if wanted else 200)
        if wanted:
            self.server.ranges.append(wanted[0])
            body = body[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(store, "TIMEOUT", 0.5)


@pytest.fixture
def placed(tmp_path: Path) -> Iterator[tuple[Path, Server]]:
    """A catalogue whose shards lie on a server and nowhere else."""
    catalogue = make_catalogue(tmp_path)
    shutil.move(catalogue / "shards", tmp_path / "away")
    server = Server(tmp_path / "away")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield catalogue, server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache that the environment names: the folder that a reader makes in it."""
    monkeypatch.setenv("SHELFMARK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shelfmark-shards"


def test_the_same_bytes_from_a_server(placed: tuple[Path, Server], tmp_path: Path, cached: Path) -> None:
    catalogue, server = placed
    figures = shards.run(shards.ShardsConfig(catalogue=catalogue, at=server.url))
    assert figures["shards"] == 1
    local = LocalStore(tmp_path / "away")
    opened = Catalogue(catalogue)
    server.ranges.clear()
    for sample in (5, 0, 5, 35):
        _, offset, length, *_ = opened.index[sample].item()
        assert opened.read_bytes(sample) == local.read("shard-000000.tar", offset, length)
    # A sample is asked for once, and nothing but it; the last one was read by `shelfmark shards`.
    sizes = [int(end) - int(start) + 1 for start, end in (r[6:].split("-") for r in server.ranges)]
    assert sizes == [int(opened.index[sample]["length"]) for sample in (5, 0)]


def test_a_damaged_cache_is_read_again(placed: tuple[Path, Server], cached: Path) -> None:
    catalogue, server = placed
    shards.run(shards.ShardsConfig(catalogue=catalogue, at=server.url))
    good = Catalogue(catalogue).read_bytes(7)
    for file in cached.glob("??/*"):
        file.write_bytes(b"x" * file.stat().st_size)
    assert Catalogue(catalogue).read_bytes(7) == good
    server.folder.joinpath("shard-000000.tar").write_bytes(b"y" * 10**6)
    assert Catalogue(catalogue).read_bytes(7) == good, "the cache was not mended"
    with pytest.raises(CorruptSample, match="checksum"):
        Catalogue(catalogue).read_bytes(8)


def test_trouble_is_waited_out_and_then_told(placed: tuple[Path, Server]) -> None:
    catalogue, server = placed
    shards.run(shards.ShardsConfig(catalogue=catalogue, at=server.url))
    opened = Catalogue(catalogue)
    good = opened.read_bytes(3)
    server.fail = 4
    assert opened.read_bytes(3) == good and server.fail == 0
    server.stall = 1
    assert opened.read_bytes(3) == good and server.stall == 0
    server.fail = 1000
    with pytest.raises(UserError, match=r"shard-000000\.tar cannot be read: 500.*\(5 tries\)"):
        opened.read_bytes(3)
    server.fail, server.stall = 0, 1000
    started = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be read: .*\(5 tries\)"):
        opened.read_bytes(3)
    assert time.monotonic() - started < 60, "a server that says nothing must not hold a run"
    server.stall = 0
    (server.folder / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000000\.tar cannot be read"):
        opened.read_bytes(3)


def test_a_place_without_the_shards_is_refused(placed: tuple[Path, Server], tmp_path: Path) -> None:
    catalogue, server = placed

    def refused(at: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            shards.run(shards.ShardsConfig(catalogue=catalogue, at=at))
        assert not (catalogue / store.PLACE_FILE).exists(), "a place that was refused must not stay"

    (tmp_path / "empty").mkdir()
    refused(f"file://{tmp_path}/empty", "shard-000000.tar is missing")
    refused("nosuch://bucket/shards", "nosuch")
    refused("here", "shards is missing")
    refused("simplecache::file:///tmp", "is a chain of several")
    cut = tmp_path / "cut"
    shutil.copytree(server.folder, cut)
    os.truncate(cut / "shard-000000.tar", 20_000)
    refused(f"file://{cut}", "does not hold this catalogue's shards")
    shards.run(shards.ShardsConfig(catalogue=catalogue, at=f"file://{server.folder}"))
    assert Catalogue(catalogue).read_bytes(0)[:4]


def test_the_cache_keeps_its_bound_and_what_was_used_last(tmp_path: Path) -> None:
    cache = ReadCache(tmp_path / "cache", limit=1000)
    for number in range(9):
        cache.put(f"key {number}", bytes([number]) * 100)
        os.utime(cache._file(f"key {number}"), (number, number))
    assert cache.get("key 0") == bytes(100)  # used again: now the youngest
    for number in range(9, 12):
        cache.put(f"key {number}", bytes([number]) * 100)
    kept = {number for number in range(12) if cache.get(f"key {number}") is not None}
    assert {0, 11, 10} <= kept and not {1, 2} & kept
    assert sum(size for _, size, _ in cache._entries()) <= 1000
    again = ReadCache(tmp_path / "cache", limit=1000)
    assert again.get("key 11") == bytes([11]) * 100
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache .*File exists"):
        ReadCache(tmp_path / "file", 1)


def test_the_cache_deletes_nothing_but_its_own(
    placed: tuple[Path, Server], tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder full of somebody's files, at every depth and under names like a cache's, keeps them all."""
    catalogue, server = placed
    monkeypatch.setenv("SHELFMARK_CACHE_GIB", "0.00001")
    names = [
        "thesis.txt",
        "photos/a.raw",
        ".ssh/id_rsa",
        "ab/notes.txt",
        f"ab/{'0' * 31}",
        f"photos/{'0' * 30}",
        "abc/deep/er.txt",
        "CACHEDIR.TAG.old",
    ]
    precious = [folder / name for folder in (cached.parent, cached) for name in names]

    def fill() -> None:
        for file in precious:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"p" * 20_000)
            os.utime(file, (0, 0))  # older than all that a cache holds

    def read_all() -> None:
        opened = Catalogue(catalogue)
        for sample in range(opened.num_samples):
            opened.read_bytes(sample)

    shards.run(shards.ShardsConfig(catalogue=catalogue, at=server.url))
    fill()
    read_all()
    assert all(file.stat().st_size == 20_000 for file in precious)
    kept = [file for file in cached.glob("??/*") if len(file.name) == 30 and file not in precious]
    assert 0 < sum(file.stat().st_size for file in kept) <= 0.00001 * 2**30 and len(kept) < 36
    # Without the mark it is somebody else's folder, and nothing in it is touched.
    (cached / "CACHEDIR.TAG").unlink()
    before = {file: file.read_bytes() for file in cached.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"shelfmark-shards holds files and no mark .*nothing was deleted"):
        Catalogue(catalogue)
    (cached / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n# of another program\n")
    with pytest.raises(UserError, match="no mark that it is a cache of ours"):
        Catalogue(catalogue)
    (cached / "CACHEDIR.TAG").unlink()
    assert {file: file.read_bytes() for file in cached.rglob("*") if file.is_file()} == before


def test_a_catalogue_does_not_say_where_a_cache_is(
    placed: tuple[Path, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stranger's shards.json names a home as its cache, with no room in it: nothing there is read, written or
    deleted.
    """
    catalogue, server = placed
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh/id_rsa").write_text("key")
    place = {"url": server.url, "cache": str(home), "cache_bytes": 0}
    (catalogue / store.PLACE_FILE).write_text(json.dumps(place))
    for _ in range(2):
        opened = Catalogue(catalogue)
        opened.read_bytes(3)
    assert [path for path in home.rglob("*") if path.is_file()] == [home / ".ssh/id_rsa"]
    assert capfd.readouterr().err.count("its cache is not used; SHELFMARK_CACHE names one") == 1
    for bound in ("0", "-1", "much", "nan"):
        monkeypatch.setenv("SHELFMARK_CACHE_GIB", bound)
        monkeypatch.setenv("SHELFMARK_CACHE", str(home))
        with pytest.raises(UserError, match=f"SHELFMARK_CACHE_GIB is '{bound}'"):
            Catalogue(catalogue)


@pytest.mark.parametrize("url", ["http://me:PW@{host}/x", "http://:PW@{host}", "s3://k:PW@bucket/a"])
def test_a_password_is_refused_and_shown_nowhere(
    placed: tuple[Path, Server], url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    catalogue, server = placed
    url = url.format(host=server.url.removeprefix("http://"))
    with pytest.raises(UserError, match="holds a password") as asked:
        shards.run(shards.ShardsConfig(catalogue=catalogue, at=url))
    assert not (catalogue / store.PLACE_FILE).exists()
    (catalogue / store.PLACE_FILE).write_text(json.dumps({"url": url}))
    with pytest.raises(UserError, match="holds a password") as read:
        Catalogue(catalogue)
    assert "PW" not in f"{asked.value}{read.value}{capfd.readouterr()}"


@pytest.mark.parametrize(
    "text,message",
    [
        ("{}", r"shards\.json is damaged \(url is missing\)"),
        ("[", "is damaged"),
        ('{"url": 7}', "url is 7, not text"),
        ('{"url": "simplecache::file:///tmp"}', "is a chain of several"),
        ('{"url": "reference://a"}', "reference://a: "),
    ],
)
def test_an_odd_place_is_one_line(placed: tuple[Path, Server], text: str, message: str) -> None:
    catalogue, _ = placed
    (catalogue / store.PLACE_FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        Catalogue(catalogue)


def test_a_full_disk_costs_the_cache_alone(placed: tuple[Path, Server], small_disk: Callable[[int], Path]) -> None:
    catalogue, server = placed
    remote = RemoteStore(server.url, ReadCache(small_disk(4) / "cache", 10**9))
    shards.run(shards.ShardsConfig(catalogue=catalogue, at=server.url))
    opened = Catalogue(catalogue)
    for sample in range(20):
        _, offset, length, *_ = opened.index[sample].item()
        assert remote.read("shard-000000.tar", offset, length) == opened.read_bytes(sample)


def test_a_reader_asks_for_many_samples_at_once(placed: tuple[Path, Server]) -> None:
    """Pixels from a server are those from the disk; damage and trouble reach the caller."""
    catalogue, server = placed
    shards.run(shards.ShardsConfig(catalogue=catalogue, at=server.url))
    before = threading.active_count()
    ids = np.array([3, 30, 3, 17])
    with closing(ImageReader(Catalogue(catalogue), PreprocessSpec(image_size=16), "reference", 4, 1, CPU)) as reader:
        images, ok = reader.read(ids, reader.parameters(ids))
        server.fail = 1000
        with pytest.raises(UserError, match="cannot be read"):
            reader.read(ids, reader.parameters(ids))
        server.fail = 0
    (catalogue / store.PLACE_FILE).unlink()
    shutil.copytree(server.folder, catalogue / "shards")
    with closing(ImageReader(Catalogue(catalogue), PreprocessSpec(image_size=16), "reference", 4, 1, CPU)) as reader:
        expected, _ = reader.read(ids, reader.parameters(ids))
    assert ok.all() and torch.equal(images, expected)
    assert threading.active_count() <= before + 1, "fsspec keeps one thread of its own"
