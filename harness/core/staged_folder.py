"""A folder that appears under its final name complete, or not at all.

Unfinished work on `final` lies in one folder beside it:

    final.tmp/
        lock    process at work; also the mark that the folder is ours: without it nothing is deleted
        new/    the future `final`
        old/    the `final` that a new one replaces, between two renames
        gone/   files on their way to deletion
        kept/   finished parts of long work, which the next process goes on with; deleted where `final` exists
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from harness.core.errors import UserError
from harness.core.lock import is_lock, locked

_KEPT = "kept"


@dataclass(frozen=True)
class Holder:
    """The folder `final`.tmp, held by this process.

    Args:
        final: the folder being made.
        folder: the holder.
    """

    final: Path
    folder: Path

    @property
    def kept(self) -> Path:
        """The folder for finished parts, which outlives a process that is killed or fails, but for a full disk."""
        return self.folder / _KEPT

    def new(self) -> Path:
        """A new empty folder, deleted at the end unless it was renamed."""
        folder = self.folder / "new"
        folder.mkdir()
        return folder

    @contextmanager
    def stage(self, *, replace: bool = False) -> Iterator[Path]:
        """Gives a new folder to write into; on leaving, syncs it to disk and renames it to `final`.

        Raises:
            UserError: `final` exists and may not be replaced.
        """
        if not replace and os.path.lexists(self.final):
            raise _taken(self.final)
        new, old = self.new(), self.folder / "old"
        yield new
        sync_tree(new)
        if replace and os.path.lexists(self.final):
            self.final.rename(old)
        try:
            new.rename(self.final)
        except OSError as error:
            taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
            raise _taken(self.final) if taken else error from None
        sync(self.final.parent)
        self.discard(old)

    def discard(self, folder: Path) -> None:
        """Deletes a folder of the same disk. It leaves its place at once; if this process is killed, the next hold
        finishes the deletion.
        """
        gone = self.folder / "gone"
        if os.path.lexists(folder):
            folder.rename(gone)
            _delete(gone)

    def recover(self) -> bool:
        """Restores one `final`, the old one if a replacement had begun; True if there was something to do."""
        new, old, gone = (self.folder / name for name in ("new", "old", "gone"))
        left = [folder for folder in (new, old, gone) if os.path.lexists(folder)]
        if old in left and not os.path.lexists(self.final):
            old.rename(self.final)
        for folder in (gone, new, old):
            _delete(folder)
        if os.path.lexists(self.final):
            _delete(self.kept)
        return bool(left)


@contextmanager
def held(final: Path) -> Iterator[Holder]:
    """Holds `final` and its unfinished state for this process, after clearing away the leftovers of a killed one.

    Raises:
        UserError: another process holds it, which is named; the holder cannot be made or is not ours; or the disk is
            full.
    """
    final = Path(os.path.abspath(final))
    holder = Holder(final, final.with_name(f"{final.name}.tmp"))
    lock = holder.folder / "lock"
    _require_ours(holder.folder, lock)
    try:
        with _full_disk(final), locked(lock, str(final)):
            if holder.recover():
                print(f"{final}: cleared away leftovers of a killed process in {holder.folder.name}", flush=True)
            try:
                yield holder
            except Exception as error:
                if _is_full_disk(error):
                    _delete(holder.kept)
                raise
            finally:
                holder.recover()
    finally:
        with suppress(OSError):  # another process is in it, or is the next already
            holder.folder.rmdir()


@contextmanager
def staged_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives a new folder to write into; on leaving, syncs it to disk and renames it to `final`. An exception removes
    it.

    With `replace` an existing `final` is replaced: for an instant between two renames neither exists. The next call for
    the same `final` clears away the leftovers of a killed process; `final` is then the old or the new one, complete.

    Raises:
        UserError: `final` exists and may not be replaced, is in use by another process, cannot be created, or the disk
            is full.
    """
    if not replace:
        require_free(final)
    with held(final) as holder, holder.stage(replace=replace) as new:
        yield new


def require_free(final: Path) -> None:
    """Raises UserError if `final` exists; not if unfinished state lies beside it, which `held` clears first."""
    if os.path.lexists(final) and not os.path.lexists(f"{final}.tmp"):
        raise _taken(final)


def _taken(final: Path) -> UserError:
    return UserError(f"{final} exists already", "Choose another folder, or remove this one first; nothing was written")


def _require_ours(folder: Path, lock: Path) -> None:
    """Raises UserError for a folder that is not ours: it is not empty and has no lock of ours."""
    if is_lock(lock) or not os.path.lexists(folder):
        return
    try:
        others = folder.is_symlink() or bool(set(os.listdir(folder)) - {lock.name, _KEPT})
    except OSError as error:
        others = not isinstance(error, FileNotFoundError)
    # Checked again: another process may have begun in between, and writes its lock before the rest.
    if others and not is_lock(lock):
        raise UserError(
            f"{folder} is in the way, and was not left by a command of ours", "Rename it; nothing was written"
        )


@contextmanager
def _full_disk(final: Path) -> Iterator[None]:
    """Turns a full disk into one line; DuckDB and Arrow report it only in their text."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _is_full_disk(error):
            raise
        raise UserError(
            f"no space left on the disk of {final}", "Free space there, or write to another disk; nothing was kept"
        ) from error


def _is_full_disk(error: Exception) -> bool:
    return getattr(error, "errno", None) == errno.EDQUOT or os.strerror(errno.ENOSPC) in str(error)


def share_file(source: Path | str, target: Path | str) -> None:
    """Puts a file that never changes into another folder: a second name of it where the disk has links, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _delete(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Syncs everything below a folder to disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def sync(path: Path) -> None:
    """Syncs a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
