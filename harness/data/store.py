"""Where a catalogue's shards lie: its own folder, or any fsspec URL (s3, gcs, http …) behind a bounded local cache.

A reader asks for (file, offset, length) and gets these bytes, an error, or, where the file ends early, fewer bytes. Nothing else is read:
a sample costs one ranged request, once.
"""

from __future__ import annotations

import json
import os
import random
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import fsspec
import xxhash

from harness.errors import UserError

T = TypeVar("T")
TRIES = 5
FIRST_PAUSE = 0.5  # seconds before the second try; each further pause is twice as long
PLACE_FILE = "shards.json"
TIMEOUT = 30.0  # seconds that one try may take


class Store(Protocol):
    """Ranged reads of named files; threads may share one."""

    def read(self, name: str, offset: int, length: int, fresh: bool = False) -> bytes:
        """The bytes there; fewer where the file ends. `fresh` passes over what a cache holds.

        Raises:
            UserError: the file could not be read in several tries.
        """
        ...

    def names(self) -> set[str]:
        """Files that there are.

        Raises:
            UserError: they cannot be listed.
        """
        ...

    def close(self) -> None:
        """Releases files; a later read opens them again."""
        ...


class LocalStore:
    """Files of a folder, kept open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()
        # A catalogue may have more shards than a process may open files; those beyond are opened for each read.
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2

    def read(self, name: str, offset: int, length: int, fresh: bool = False) -> bytes:
        """See `Store.read`."""
        return _patiently(lambda: self._read(name, offset, length), f"{self.folder / name}")

    def _read(self, name: str, offset: int, length: int) -> bytes:
        with self._lock:
            handle = self._handles.get(name)
            if handle is None and len(self._handles) < self._most:
                handle = self._handles[name] = os.open(self.folder / name, os.O_RDONLY)
        if handle is not None:
            return os.pread(handle, length, offset)
        handle = os.open(self.folder / name, os.O_RDONLY)
        try:
            return os.pread(handle, length, offset)
        finally:
            os.close(handle)

    def names(self) -> set[str]:
        """See `Store.names`."""
        return set(os.listdir(self.folder))

    def close(self) -> None:
        """See `Store.close`; no read may be under way."""
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()


class RemoteStore:
    """Files below a URL.

    Args:
        url: folder of the files, in any protocol that fsspec has a package for.
        cache: keeps what was read; None keeps nothing.
    """

    def __init__(self, url: str, cache: ReadCache | None = None) -> None:
        self.url, self._cache = url.rstrip("/"), cache
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"{url}: {error}", "Install the fsspec package of that protocol (s3fs, gcsfs, …)"
            ) from error
        self._limit = {"timeout": TIMEOUT} if self._fs.async_impl else {}

    def read(self, name: str, offset: int, length: int, fresh: bool = False) -> bytes:
        """See `Store.read`."""
        key = f"{self.url}/{name} {offset} {length}"
        if self._cache is not None and not fresh and (known := self._cache.get(key)) is not None:
            return known

        def ranged() -> bytes:
            data: bytes = self._fs.cat_file(f"{self._root}/{name}", start=offset, end=offset + length, **self._limit)
            return data[:length]

        data = _patiently(ranged, f"{self.url}/{name}")
        if self._cache is not None and len(data) == length:
            self._cache.put(key, data)
        return data

    def names(self) -> set[str]:
        """See `Store.names`."""
        found = _patiently(lambda: self._fs.ls(self._root, detail=False, **self._limit), self.url)
        return {entry.rstrip("/").rsplit("/", 1)[-1] for entry in found}

    def close(self) -> None:
        """See `Store.close`."""


def open_store(catalogue: Path) -> Store:
    """The shards of the catalogue folder: where its shards.json says (`shelfmark shards`), else in its own shards/.

    Raises:
        UserError: shards.json is damaged, no shards/, or no package for the URL's protocol.
    """
    file = catalogue / PLACE_FILE
    if not file.exists():
        if not (catalogue / "shards").is_dir():
            raise UserError(f"catalogue {catalogue}: shards is missing", "Restore it, or ingest again")
        return LocalStore(catalogue / "shards")
    try:
        place = json.loads(file.read_text(encoding="utf-8"))
        url, cache, limit = place["url"], place["cache"], place["cache_bytes"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{file} is damaged ({error})", f"Write it anew: shelfmark shards {catalogue} --at URL"
        ) from error
    return RemoteStore(url, None if cache is None else ReadCache(Path(cache), limit))


class ReadCache:
    """Bytes on a local disk, at most so many; processes of a node may share the folder.

    Args:
        folder: made where it is missing.
        limit: bytes. Where they are used up, what was not asked for longest makes room.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache {folder}: {error.strerror}", "Choose another folder") from error
        self._used = sum(size for _, size, _ in self._entries())

    def get(self, key: str) -> bytes | None:
        """What was put under `key`, if it is still there."""
        file = self._file(key)
        try:
            data = file.read_bytes()
            os.utime(file)
        except OSError:  # never there, or another process made room
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keeps `data`; in silence not at all where the disk is full."""
        file = self._file(key)
        new = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            file.parent.mkdir(exist_ok=True)
            new.write_bytes(data)
            new.replace(file)
        except OSError:
            new.unlink(missing_ok=True)
            return
        with self._lock:
            self._used += len(data)
            if self._used > self.limit:
                self._make_room()

    def _make_room(self) -> None:
        """Down to nine tenths, so that not every read has to; counts anew, for other processes write too."""
        entries = sorted(self._entries())
        self._used = sum(size for _, size, _ in entries)
        for _, size, file in entries:
            if self._used <= 0.9 * self.limit:
                break
            Path(file).unlink(missing_ok=True)
            self._used -= size

    def _entries(self) -> list[tuple[float, int, str]]:
        """(time of last use, bytes, path) of every file."""
        found = []
        for folder in os.scandir(self.folder):
            for entry in os.scandir(folder) if folder.is_dir() else ():
                try:
                    status = entry.stat()
                except OSError:  # another process made room
                    continue
                found.append((status.st_mtime, status.st_size, entry.path))
        return found

    def _file(self, key: str) -> Path:
        name = xxhash.xxh3_128_hexdigest(key.encode())
        return self.folder / name[:2] / name[2:]


def _patiently(read: Callable[[], T], what: str) -> T:
    """`read`, again after a pause where it fails: disks and servers have bad moments.

    Raises:
        UserError: it failed every time.
    """
    for attempt in range(TRIES):
        try:
            return read()
        except Exception as error:  # every protocol has errors of its own
            last = error
        if attempt < TRIES - 1:
            # Not all ranks at the same moment.
            time.sleep(FIRST_PAUSE * 2**attempt * random.uniform(0.8, 1.2))
    reason = getattr(last, "strerror", None) or str(last) or type(last).__name__
    raise UserError(
        f"{what} cannot be read: {reason} ({TRIES} tries)", "Check the disk or server, then start again"
    ) from last
