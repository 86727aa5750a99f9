"""Stores of a catalogue's shards: its own folder, or any fsspec URL (s3, gcs, http …) behind a bounded local cache.

A reader asks for (file, offset, length) and gets these bytes, an error, or, where the file ends early, fewer bytes.
Nothing else is read: a sample costs one ranged request, once.
"""

from __future__ import annotations

import functools
import os
import random
import re
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import fsspec
import xxhash

from harness.core.errors import UserError
from harness.core.files import printable, read_record

T = TypeVar("T")
TRIES = 5
FIRST_PAUSE = 0.5  # seconds before the second try; each further pause is twice as long
PLACE_FILE, HERE = "shards.json", "here"
MOST_BYTES = 1 << 30  # of one read where the file's size is not known
TIMEOUT = 30.0  # seconds that one try may take
CACHE_PLACE, CACHE_BOUND = "SHELFMARK_CACHE", "SHELFMARK_CACHE_GIB"  # names in the environment
CACHE_FOLDER = "shelfmark-shards"  # below SHELFMARK_CACHE
ENTRY = re.compile(r"[0-9a-f]{30}(\.\d+-\d+)?")  # of a cache: a finished file, or one that is being written
# The convention of https://bford.info/cachedir/, by which backups leave caches out.
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# This folder is a cache of Shelfmark, which deletes in it.\n"


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
            return _pread(handle, offset, length)
        handle = os.open(self.folder / name, os.O_RDONLY)
        try:
            return _pread(handle, offset, length)
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


def _pread(handle: int, offset: int, length: int) -> bytes:
    """No memory is taken for more than the file holds."""
    length = min(length, os.fstat(handle).st_size - offset)
    return os.pread(handle, length, offset) if length > 0 else b""


class RemoteStore:
    """Files below a URL.

    Args:
        url: folder of the files, in any protocol that fsspec has a package for.
        cache: keeps what was read; None keeps nothing.

    Raises:
        UserError: a URL of an unknown protocol, or one with a password.
    """

    def __init__(self, url: str, cache: ReadCache | None = None) -> None:
        self.url, self._cache = url.rstrip("/"), cache
        if match := re.search(r"//[^/]*:[^/]*@", url):
            shown = printable(url.replace(match[0], "//…@"))
            raise UserError(
                f"the URL of the shards, {shown}, holds a password, which would stand in files and errors",
                "Leave it out, and give it to fsspec: ~/.config/fsspec/*.json, or the protocol's own place",
            )
        if "::" in url:  # a chain may run or unpack what lies there
            raise UserError(f"the URL of the shards, {printable(url)}, is a chain of several", "Name one place")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except Exception as error:  # every protocol has errors of its own
            raise UserError(
                f"{printable(url)}: {printable(str(error))}",
                "Install the fsspec package of that protocol (s3fs, gcsfs, …)",
            ) from error
        self._sizes: dict[str, int | None] = {}  # of the files, where the server tells
        self._limit = {"timeout": TIMEOUT} if self._fs.async_impl else {}

    def read(self, name: str, offset: int, length: int, fresh: bool = False) -> bytes:
        """See `Store.read`."""
        key = f"{self.url}/{name} {offset} {length}"
        if self._cache is not None and not fresh and (known := self._cache.get(key)) is not None:
            return known

        size = self._sizes.get(name)
        length = min(length, MOST_BYTES if size is None else size - offset)
        if length <= 0:
            return b""

        def ranged() -> bytes:
            data: bytes = self._fs.cat_file(f"{self._root}/{name}", start=offset, end=offset + length, **self._limit)
            return data[:length]

        data = _patiently(ranged, f"{self.url}/{name}")
        if self._cache is not None and len(data) == length:
            self._cache.put(key, data)
        return data

    def names(self) -> set[str]:
        """See `Store.names`."""
        found = _patiently(lambda: self._fs.ls(self._root, detail=True, **self._limit), self.url)
        self._sizes = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry.get("size") for entry in found}
        return set(self._sizes)

    def close(self) -> None:
        """See `Store.close`."""


def open_store(catalogue: Path, at: str | None = None) -> Store:
    """The shards of the catalogue folder.

    Args:
        catalogue: the folder.
        at: URL of the shards, or 'here' for the folder's own shards/; by default what shards.json says (`shelfmark
            shards`), and 'here' without one.

    Raises:
        UserError: shards.json is damaged, no shards/, no package for the URL's protocol, or a cache that cannot be
            used.
    """
    file = catalogue / PLACE_FILE
    if at is None and file.exists():
        place = read_record(file, f"Write it again: shelfmark shards {catalogue} --at URL")
        if place.values.get("cache"):
            _say_ignored(file)
        at = place.get("url", str)
    if at is None or at == HERE:
        if not (catalogue / "shards").is_dir():
            raise UserError(f"catalogue {catalogue}: shards is missing", "Restore it, or ingest again")
        return LocalStore(catalogue / "shards")
    return RemoteStore(at, cache_of_environment())


@functools.cache
def _say_ignored(file: Path) -> None:
    """Once for a file, on the first rank. A catalogue may be anybody's: it must not say what is written, and deleted,
    where.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"{file}: its cache is not used; {CACHE_PLACE} names one", file=sys.stderr, flush=True)


def cache_of_environment() -> ReadCache | None:
    """The cache that SHELFMARK_CACHE names (a folder), of SHELFMARK_CACHE_GIB GiB (50); None where it names none.

    Raises:
        UserError: the bound is not a number above 0, or the folder cannot be used.
    """
    folder, bound = os.environ.get(CACHE_PLACE), os.environ.get(CACHE_BOUND, "50")
    if not folder:
        return None
    try:
        limit = int(float(bound) * 2**30)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise UserError(f"{CACHE_BOUND} is {bound!r}", "It must be a number of GiB above 0")
    return ReadCache(Path(folder).absolute() / CACHE_FOLDER, limit)


class ReadCache:
    """Bytes on a local disk, at most so many; processes of a node may share the folder.

    Args:
        folder: made where it is missing. Nothing is deleted in it but files under the names that a cache gives.
        limit: bytes. Where they are used up, what was not asked for longest makes room.

    Raises:
        UserError: the folder cannot be made, or holds something and no mark of a cache of ours.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._mark()
        except OSError as error:
            raise UserError(f"cache {folder}: {error.strerror}", f"Choose another folder ({CACHE_PLACE})") from error
        self._used = sum(size for _, size, _ in self._entries())

    def _mark(self) -> None:
        """The mark is there before anything else, so that a folder which holds more without it is somebody else's."""
        mark = self.folder / "CACHEDIR.TAG"
        others = [name for name in os.listdir(self.folder) if not name.startswith(mark.name)]
        if mark.exists():
            ours = mark.read_bytes()[: len(TAG)] == TAG.encode()
        else:
            ours = not others
        if not ours:
            raise UserError(
                f"cache {self.folder} holds files and no mark that it is a cache of ours",
                f"Rename it, or choose another folder ({CACHE_PLACE}); nothing was deleted",
            )
        if not mark.exists():
            new = mark.with_name(f"{mark.name}.{os.getpid()}")
            new.write_text(TAG)
            new.replace(mark)

    def get(self, key: str) -> bytes | None:
        """Value of `key`; None where there is none, or no more."""
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
        """Evicts down to nine tenths, so that not every read has to; counts again, since other processes write too."""
        entries = sorted(self._entries())
        self._used = sum(size for _, size, _ in entries)
        for _, size, file in entries:
            if self._used <= 0.9 * self.limit:
                break
            Path(file).unlink(missing_ok=True)
            self._used -= size

    def _entries(self) -> list[tuple[float, int, str]]:
        """(time of last use, bytes, path) of every file that a cache of ours wrote."""
        found = []
        for folder in os.scandir(self.folder):
            if not re.fullmatch("[0-9a-f]{2}", folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder):
                try:
                    if ENTRY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        status = entry.stat()
                        found.append((status.st_mtime, status.st_size, entry.path))
                except OSError:  # another process made room
                    continue
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
