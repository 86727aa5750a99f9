"""Lock of a folder: one process at a time, named to the others.

The kernel's lock on a file (flock) ends with the process that holds it, so a killed process blocks nobody. Some shared
disks keep this lock to one host. So the holder rewrites its file every few seconds; a process that finds another host's
name in it first watches for such a sign of life. Clocks are not compared.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.core.errors import UserError
from harness.core.files import printable

BEAT = 5.0  # seconds between two signs of life
WATCH = 3 * BEAT  # seconds without one after which another host's process counts as dead
_FIELDS = {"host": str, "pid": int, "command": str, "since": str, "beat": int}
_SIZE = 1024  # bytes of a lock's file, padded with spaces: rewritten in one write
_held: set[int] = set()  # descriptors of the locks of this process


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Holds the lock `file`: creates it with its folder, and removes it at the end. A file left by a killed process
    blocks nobody. A forked child does not hold the lock.

    Args:
        file: the lock's file.
        what: the guarded folder, for the error.

    Raises:
        UserError: another process holds it, which is named; the file cannot be written; or it is not a lock.
    """
    me, made = _myself(), not os.path.lexists(file.parent)
    handle = _take(file, what, me)
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(handle, me, ended), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        if handle in _held:  # not in a forked child, which leaves the block too
            thread.join()
            if _is_at(file, handle):
                file.unlink()
            _held.discard(handle)
            os.close(handle)
            with suppress(OSError):  # nothing was written
                if made:
                    file.parent.rmdir()


def is_lock(file: Path) -> bool:
    """True for a lock that one of our processes has written: the mark that the folder is ours."""
    try:
        with file.open("rb") as opened:
            return not file.is_symlink() and _parse(opened.read(_SIZE + 1)) is not None
    except OSError:
        return False


def _take(file: Path, what: str, me: dict[str, Any]) -> int:
    for _ in range(100):  # a holder that ends removes its file, so that the one opened here may be nobody's
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Not through a link: what it points to is not ours to write.
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if isinstance(error, FileNotFoundError | FileExistsError) and (
                file.parent.is_dir() or not os.path.lexists(file.parent)
            ):
                continue
            raise UserError(f"{what}: cannot create {file.name}: {error.strerror}", "Choose another folder") from error
        try:
            alone = _flock(handle)
            if not _is_at(file, handle):
                continue
            content = os.pread(handle, _SIZE + 1, 0)
            holder = _parse(content)
            if content and holder is None:
                raise UserError(
                    f"{file} is not a lock of ours", "Rename it, or choose another folder; nothing was written"
                )
            if alone is False:
                if holder is None:  # it has not written its name yet
                    time.sleep(0.05)
                    continue
                raise _refusal(what, holder)
            if holder is not None and (alone is None or holder["host"] != socket.gethostname()):
                _watch(file, what, holder)
            try:
                _write(handle, me)
            except OSError:  # a full disk
                file.unlink()
                raise
            _held.add(handle)
            return handle
        finally:
            if handle not in _held:
                os.close(handle)
    raise UserError(f"{what} is in use by another process", "Wait for its end")


def _flock(handle: int) -> bool | None:
    """True if locked, False if another process holds the lock, None if this disk has no such locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return None
        raise
    return True


def _is_at(file: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(file, follow_symlinks=False), os.fstat(handle))
    except OSError:
        return False


def _watch(file: Path, what: str, holder: dict[str, Any]) -> None:
    """Returns after WATCH seconds without a sign of life of the holder; raises UserError at the first sign."""
    print(f"{what}: looking for {WATCH:g} s whether {_named(holder)} is still at work", file=sys.stderr, flush=True)
    end = time.monotonic() + WATCH
    while time.monotonic() < end:
        time.sleep(WATCH / 30)
        with suppress(OSError):  # reopened, so that a network disk asks its server
            now = _parse(file.read_bytes())
            if now is not None and now != holder:
                raise _refusal(what, now)


def _beat(handle: int, me: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        me["beat"] += 1
        with suppress(OSError):  # a full disk ends the work anyway
            _write(handle, me)


def _myself() -> dict[str, Any]:
    program = Path(sys.argv[0])
    command = program.name
    if (program.parent.name, command) == ("train", "__main__.py"):
        command = "shelfmark train"
    elif command in ("shelfmark", "__main__.py"):
        command = f"shelfmark {sys.argv[1]}"
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    return {"host": socket.gethostname(), "pid": os.getpid(), "command": command[:100], "since": since, "beat": 0}


def _write(handle: int, me: dict[str, Any]) -> None:
    os.pwrite(handle, json.dumps(me).ljust(_SIZE).encode(), 0)
    os.fsync(handle)  # for the other hosts of a shared disk


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(content) if len(content) <= _SIZE else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or any(type(values.get(name)) is not kind for name, kind in _FIELDS.items()):
        return None
    return values


def _named(holder: dict[str, Any]) -> str:
    command, host, since = (printable(holder[name]) for name in ("command", "host", "since"))
    return f"`{command}` (host {host}, process {holder['pid']}, since {since})"


def _refusal(what: str, holder: dict[str, Any]) -> UserError:
    return UserError(f"{what} is in use by {_named(holder)}", "Wait for its end, or choose another folder")


def _forget() -> None:
    """Closes the locks in a forked child: they stay with the parent, and end with it even if the child lives on."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
