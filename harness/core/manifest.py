"""manifest.json: size and checksum of every file of a folder, for checkpoints, artefacts and catalogues.

Checksums find damage. They do not authenticate a folder: who changes a file can change its manifest too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash
from tqdm import tqdm

from harness.core.errors import UserError
from harness.core.files import printable, read_record, write_whole

if TYPE_CHECKING:
    from harness.core.mesh import Mesh

T = TypeVar("T")

MANIFEST = "manifest.json"
ALGORITHMS: dict[str, Callable[[], Any]] = {"xxh3-64": xxhash.xxh3_64, "sha256": hashlib.sha256}
_UNLISTED = {1: {"towers/.metadata", "head/.metadata"}, 2: set()}  # by format: format 1 left hidden files out
_CHUNK = 1 << 20  # fits a core's cache


def write_manifest(
    folder: Path,
    mesh: Mesh | None = None,
    algorithm: str = "xxh3-64",
    known: Mapping[str, tuple[int, str]] | None = None,
) -> None:
    """Flushes every file under `folder` to disk and lists it in folder/manifest.json, hidden ones too.

    With `mesh` collective: each rank reads its share of the files, in its own time.

    Args:
        folder: holds files and folders, no links.
        mesh: the ranks that share the work.
        algorithm: xxh3-64, fast, for folders that stay here; sha256 for published ones, whose manifest can then be
            compared with its published checksum.
        known: (bytes, checksum) of files that this rank has written and flushed; no rank reads them again.

    Raises:
        OSError: a known file has another size on the disk.
    """

    def flushed(name: str) -> tuple[int, str]:
        with (folder / name).open("rb") as handle:
            os.fsync(handle.fileno())
        return (folder / name).stat().st_size, checksum(folder / name, algorithm)

    sizes = at_first(lambda: file_sizes(folder), mesh)
    sums = _joined(known or {}, mesh)
    for name, (size, _) in sums.items():
        if sizes.get(name) != size:
            raise OSError(errno.EIO, f"{name} has {sizes.get(name)} bytes, not the {size} that were written")
    sums |= shared({name: size for name, size in sizes.items() if name not in sums}, flushed, mesh)
    content = {"format": 2, "algorithm": algorithm, "files": {name: sums[name] for name in sizes}}
    at_first(lambda: write_whole(folder / MANIFEST, json.dumps(content, indent=1)), mesh, "writing the manifest")


def verify(
    folder: Path,
    mesh: Mesh | None = None,
    read: Callable[[str], bool] = lambda _: True,
    known: Mapping[str, str] | None = None,
) -> str:
    """The first problem of a folder with a manifest; empty if it holds exactly the listed files, each with its
    checksum.

    With `mesh` collective, as in `write_manifest`, and the same on every rank.

    Args:
        folder: the folder.
        mesh: the ranks that share the work.
        read: tells of a file's name whether its checksum is compared; names and sizes are in any case.
        known: xxh3-64 checksums of files that this rank has read for another purpose; no rank reads them again.
    """
    listed = at_first(lambda: _listed(folder), mesh)
    if isinstance(listed, str):
        return listed
    algorithm, files = listed
    sums = _joined(known or {}, mesh) if algorithm == "xxh3-64" else {}

    def problem(name: str) -> str:
        try:
            same = (sums.get(name) or checksum(folder / name, algorithm)) == files[name][1]
        except OSError as error:
            return f"{printable(name)} cannot be read ({error.strerror})"
        return "" if same else f"{printable(name)} has another checksum"

    found = shared({name: size for name, (size, _) in files.items() if read(name)}, problem, mesh)
    return next(filter(None, found.values()), "")


def fingerprint(folder: Path) -> str:
    """SHA-256 of the manifest, which covers the whole folder: an author publishes it, and `sha256sum
    FOLDER/manifest.json` prints it for comparison.
    """
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file under `folder` except its manifest, sorted by name; -1 for a link, a pipe and the like."""
    sizes, left = {}, [""]
    while left:
        prefix = left.pop()
        for entry in os.scandir(folder / prefix):
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                left.append(f"{name}/")
            elif name != MANIFEST:
                sizes[name] = entry.stat().st_size if entry.is_file(follow_symlinks=False) else -1
    return dict(sorted(sizes.items()))


def _listed(folder: Path) -> tuple[str, dict[str, tuple[int, str]]] | str:
    """(algorithm, (size, checksum) of each file), or the problem of the manifest or of the folder's files.

    Opens only files that a listing of the folder gave, whatever names the manifest holds.
    """
    try:
        record = read_record(folder / MANIFEST)
        version = record.number("format", max(_UNLISTED), 1)
        algorithm = record.get("algorithm", str) if version > 1 else "xxh3-64"
        files: dict[str, Any] = record.get("files", dict)
    except UserError:
        return f"{MANIFEST} is missing or damaged"
    if algorithm not in ALGORITHMS:
        return f"{MANIFEST} is missing or damaged (algorithm {printable(algorithm)!r})"
    for name, entry in files.items():
        if not isinstance(entry, list) or [type(value) for value in entry] != [int, str]:
            return f"{MANIFEST} is missing or damaged (files: {printable(name)})"
    try:
        sizes = file_sizes(folder)
    except OSError as error:
        return f"{printable(str(error.filename))} cannot be read ({error.strerror})"
    folders = {Path(file).parent for file in files}
    unlisted = {name for name in _UNLISTED[version] if Path(name).parent in folders}
    for name in [*files, *sorted(unlisted)]:
        if sizes.get(name) == -1:
            return f"{printable(name)} is not a regular file"
        if name not in sizes or (name in files and sizes[name] != files[name][0]):
            return f"{printable(name)} is missing or has another size"
    if more := sizes.keys() - files.keys() - unlisted:
        return f"{printable(min(more))} is not listed in {MANIFEST}"
    return algorithm, {name: (size, checksum) for name, (size, checksum) in files.items()}


def at_first(make: Callable[[], T], mesh: Mesh | None, what: str = "listing files") -> T:
    """make(); with `mesh` collective, that of rank 0 for every rank (`harness.core.waiting.on_first_rank`)."""
    if mesh is None:
        return make()
    from harness.core.waiting import on_first_rank  # here: it loads torch

    return on_first_rank(make, mesh, what)


def _joined(own: Mapping[str, T], mesh: Mesh | None) -> dict[str, T]:
    """Those of all ranks."""
    if mesh is None:
        return dict(own)
    from harness.core.waiting import gather_objects

    return {name: x for part in gather_objects(own) for name, x in part.items()}


def shared(sizes: Mapping[str, int], work: Callable[[str], T], mesh: Mesh | None) -> dict[str, T]:
    """work(name) of every name, shared out over the ranks."""

    def work_through(names: Iterable[str], first: bool = True) -> dict[str, T]:
        with tqdm(
            total=sum(map(sizes.__getitem__, names)),
            desc="checksums",
            unit="B",
            unit_scale=True,
            delay=5,
            disable=not first,
        ) as progress:
            done = {}
            for name in names:
                done[name] = work(name)
                progress.update(sizes[name])
            return done

    if mesh is None:
        return work_through(sizes)
    from harness.core.waiting import of_all_ranks

    own = shared_out(sizes, mesh.world_size)[mesh.rank]
    parts = of_all_ranks(lambda: work_through(own, mesh.rank == 0), mesh, "checksums of files")
    together = {name: result for part in parts for name, result in part.items()}
    return {name: together[name] for name in sizes}


def shared_out(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Names of files for each rank: those that it wrote itself, by the checkpoint libraries' naming; the others go to
    the rank with the fewest bytes.
    """
    shares: list[list[str]] = [[] for _ in range(ranks)]
    loads, others = [0] * ranks, []
    for name, size in sizes.items():
        writer = re.search(r"(?:^|/)__(\d+)_\d+\.distcp$", name)
        if writer and int(writer[1]) < ranks:
            shares[int(writer[1])].append(name)
            loads[int(writer[1])] += size
        else:
            others.append(name)
    for name in sorted(others, key=lambda name: -sizes[name]):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name]
    return shares


def checksum(file: Path, algorithm: str = "xxh3-64") -> str:
    """Hex digits of one of ALGORITHMS over a file."""
    digest, buffer = ALGORITHMS[algorithm](), memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as handle:
        while size := handle.readinto(buffer):
            digest.update(buffer[:size])
    return str(digest.hexdigest())
