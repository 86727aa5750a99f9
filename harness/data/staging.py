"""A folder that appears under its final name complete, or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.errors import UserError

HOST_FILE = ".host"


@contextmanager
def staged_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives a new folder beside `final` to write into; on leaving, syncs it to disk and renames it to `final`.

    An exception removes the folder. A killed process leaves `final.tmp-<pid>`, which the next call for the same `final`
    removes. With `replace` an existing `final` gives way: for an instant between two renames neither is there.

    Raises:
        UserError: `final` exists and may not be replaced, cannot be created, or the disk is full.
    """
    final = Path(os.path.abspath(final))
    taken = UserError(f"{final} exists already", "Choose another folder, or remove this one first; nothing was written")
    if not replace and os.path.lexists(final):
        raise taken
    stage = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(final)
        stage.mkdir()
        (stage / HOST_FILE).write_text(socket.gethostname())
    except OSError as error:
        raise UserError(f"cannot create {stage}: {error.strerror}") from error
    try:
        yield stage
        (stage / HOST_FILE).unlink()
        _sync_tree(stage)
        old = final.with_name(f"{stage.name}-old")
        if replace and final.exists():
            final.rename(old)
        try:
            stage.rename(final)
        except OSError as error:
            raise taken if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) else error from None
        sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        # DuckDB and Arrow report a full disk by its text alone.
        full = getattr(error, "errno", None) == errno.EDQUOT or os.strerror(errno.ENOSPC) in str(error)
        if full and not isinstance(error, UserError):
            raise UserError(
                f"no space left on the disk of {final}", "Free space there, or write to another disk; nothing was kept"
            ) from error
        raise


def _remove_stale(final: Path) -> None:
    for folder in final.parent.glob(f"{_escape(final.name)}.tmp-*"):
        match = re.fullmatch(r".*\.tmp-(\d+)(-old)?", folder.name)
        host = folder / HOST_FILE
        # On a shared disk the writer may be alive on another machine, where our process table says nothing.
        elsewhere = host.is_file() and host.read_text() != socket.gethostname()
        if match and not elsewhere and not _alive(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _alive(pid: int) -> bool:
    if pid == os.getpid():  # in a container every run may get the same pid
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def sync(path: Path) -> None:
    """Writes a file or folder through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
