"""manifest.json: size and xxh3-64 of every file of a folder, by which a checkpoint and an artefact prove that they are whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import xxhash

from harness.files import write_whole

if TYPE_CHECKING:
    from harness.mesh import Mesh

T = TypeVar("T")

_CHUNK = 1 << 24


def write_manifest(folder: Path, mesh: Mesh | None = None) -> None:
    """Flushes every file under `folder` to disk and lists it in folder/manifest.json; hidden files do not belong to it.

    With `mesh` collective: each rank reads its share of the files, in its own time.
    """

    def flushed(name: str) -> tuple[int, str]:
        with (folder / name).open("rb") as handle:
            os.fsync(handle.fileno())
        return (folder / name).stat().st_size, _checksum(folder / name)

    files = _shared(_at_first(lambda: _sizes(folder), mesh), flushed, mesh)
    if mesh is None or mesh.rank == 0:
        write_whole(folder / "manifest.json", json.dumps({"format": 1, "files": files}, indent=1))


def verify(folder: Path, mesh: Mesh | None = None) -> str:
    """What is wrong with a folder that has a manifest; empty if every file is there with its checksum.

    With `mesh` collective, as in `write_manifest`, and the same on every rank.
    """
    listed = _at_first(lambda: _listed(folder), mesh)
    if listed is None:
        return "manifest.json is missing or damaged"

    def problem(name: str) -> str:
        file, (size, checksum) = folder / name, listed[name]
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or has another size"
        return f"{name} has another checksum" if _checksum(file) != checksum else ""

    found = _shared({name: size for name, (size, _) in listed.items()}, problem, mesh)
    return next(filter(None, found.values()), "")


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def _listed(folder: Path) -> dict[str, tuple[int, str]] | None:
    try:
        return json.loads((folder / "manifest.json").read_text())["files"]
    except (OSError, ValueError):
        return None


def _at_first(make: Callable[[], T], mesh: Mesh | None) -> T:
    if mesh is None:
        return make()
    from harness.waiting import on_first_rank  # here: it loads torch

    return on_first_rank(make, mesh, "listing files")


def _shared(sizes: Mapping[str, int], work: Callable[[str], T], mesh: Mesh | None) -> dict[str, T]:
    """work(name) of every name, shared out over the ranks."""
    if mesh is None:
        return {name: work(name) for name in sizes}
    from harness.waiting import of_all_ranks

    own = shared_out(sizes, mesh.world_size)[mesh.rank]
    parts = of_all_ranks(lambda: {name: work(name) for name in own}, mesh, "checksums of files")
    together = {name: result for part in parts for name, result in part.items()}
    return {name: together[name] for name in sizes}


def shared_out(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Names for each rank: the files that it wrote itself, as both checkpoint libraries name them; the rest goes where the fewest bytes are."""
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


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_64()
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
