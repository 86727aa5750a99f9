"""Checksums of a catalogue's own files, compared once at the start of every command that reads them.

catalogue.json has those of the files that grow in place: samples/, the quarantines, and index.npy in pieces, so that an
append adds pieces and a killed one takes none away. classes/, tokenizer/, queries/ and pairs/, which are replaced as a
whole, have a manifest.json each. The index has the checksum of each image, which every read compares.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from harness.catalogue.catalogue import INDEX_DTYPE, Catalogue, part_name, quarantine_names
from harness.catalogue.classes import order_id
from harness.core.errors import UserError
from harness.core.files import Record, read_record, sealed
from harness.core.manifest import MANIFEST, at_first, checksum, shared, verify

if TYPE_CHECKING:
    from harness.core.mesh import Mesh

FOLDERS = {
    "classes": "govern",
    "tokenizer": "tokenizer",
    "queries": "queries",
    "pairs": "pairs",
}  # and the command that makes each
PIECE = 1 << 20  # records of index.npy under one checksum


class Finding(NamedTuple):
    """Result for a part of a catalogue: its problem ('' = none), the remedy, and the reason why it was not checked (''
    = it was).
    """

    what: str
    problem: str
    remedy: str
    unchecked: str = ""


def with_checksums(folder: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The catalogue.json `meta` with checksums of the files in `folder` that it counts, and of itself; existing ones
    are kept.
    """
    known = meta.get("files", {})
    index = np.load(folder / "index.npy", mmap_mode="r")
    pieces = list(known.get("index.npy", ()))
    first = sum(count for count, _ in pieces)
    for start in range(first, meta["num_samples"], PIECE):
        piece = index[start : min(start + PIECE, meta["num_samples"])]
        pieces.append([len(piece), _checksum(piece)])
    files = {
        name: known.get(name) or [(folder / name).stat().st_size, checksum(folder / name)]
        for name in _counted(meta)
        if (folder / name).exists()
    }
    return sealed({**meta, "files": {"index.npy": pieces, **files}})


def require_whole(catalogue: Catalogue, mesh: Mesh | None = None, folders: Sequence[str] = ()) -> None:
    """Compares a catalogue's files with their checksums, and prints the parts that have none; with `mesh` collective,
    the files shared out over the ranks.

    Args:
        catalogue: its index, samples and quarantines are always compared.
        mesh: the ranks.
        folders: those of FOLDERS to compare too, if they exist.

    Raises:
        UserError: a file differs, or is missing.
    """
    for what, problem, remedy, unchecked in inspect(catalogue, mesh, folders):
        if problem:
            raise UserError(f"{what}: {problem}", remedy)
        if unchecked and os.environ.get("RANK", "0") == "0":
            print(f"{what}: {unchecked}")


def inspect(catalogue: Catalogue, mesh: Mesh | None = None, folders: Sequence[str] = ()) -> Iterator[Finding]:
    """Compares the files of each part in turn; see `require_whole`."""
    path = catalogue.path
    listed = at_first(lambda: _listed(catalogue), mesh)
    old = "of an earlier version, which wrote no checksums; "
    if listed is None:
        yield Finding(f"catalogue {path}", "", "", f"{old}append to it, or ingest again, and it has them")
    else:
        problem = listed if isinstance(listed, str) else _compare(catalogue, listed, mesh)
        yield Finding(f"catalogue {path}", problem, catalogue.remedy)
    there = at_first(lambda: [name for name in folders if (path / name).exists()], mesh)
    listing = at_first(lambda: [name for name in there if (path / name / MANIFEST).exists()], mesh)
    for name in there:
        folder, command = path / name, f"`shelfmark {FOLDERS[name]} {path}`"
        if name in listing or listed is not None:  # what has checksums was made by a version that writes manifests
            yield Finding(str(folder), verify(folder, mesh), f"Run {command} again")
        else:
            problem = at_first(partial(_other_order, folder), mesh) if name == "classes" else ""
            yield Finding(str(folder), problem, f"Run {command} again", f"{old}run {command} again, and it has them")


class _Listed(NamedTuple):
    """Bytes and checksum of a file, or of the records of index.npy from `first` on."""

    size: int
    checksum: str
    first: int | None = None


def _listed(catalogue: Catalogue) -> dict[str, _Listed] | str | None:
    """Checksums by the covered part in words; an error for a damaged list; None without one."""
    if "files" not in catalogue.meta:
        return None
    files = Record(catalogue.path / "catalogue.json", catalogue.meta).get("files", dict)
    pieces: Any = files.get("index.npy")
    rest = {name: files[name] for name in _counted(catalogue.meta) if name in files}
    for entry in [*(pieces if isinstance(pieces, list) else [None]), *rest.values()]:
        if not isinstance(entry, list) or [type(value) for value in entry] != [int, str]:
            return "catalogue.json is damaged (files)"
    listed, first = {name: _Listed(*entry) for name, entry in rest.items()}, 0
    for count, digest in pieces:
        name = f"index.npy, records {first:,} to {first + count - 1:,}"
        listed[name] = _Listed(count * INDEX_DTYPE.itemsize, digest, first)
        first += count
    parts = [f"samples/{file.name}" for file in catalogue.sample_files]
    if first != catalogue.num_samples or not all(part in listed for part in parts):
        return "catalogue.json is damaged (files does not list all of index.npy and samples/)"
    return listed


def _counted(meta: Mapping[str, Any]) -> list[str]:
    """The files besides index.npy that a catalogue.json counts."""
    return [*(f"samples/{part_name(part)}" for part in range(meta.get("num_parts", 0))), *quarantine_names(meta)]


def _compare(catalogue: Catalogue, listed: Mapping[str, _Listed], mesh: Mesh | None) -> str:
    """Problem of the first file that differs; '' for none."""

    def problem(name: str) -> str:
        size, expected, first = listed[name]
        try:
            if first is not None:
                found = _checksum(catalogue.index[first : first + size // INDEX_DTYPE.itemsize])
            elif (catalogue.path / name).stat().st_size != size:
                return f"{name} has another size"
            else:
                found = checksum(catalogue.path / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return "" if found == expected else f"{name} differs from its checksum"

    found = shared({name: entry.size for name, entry in listed.items()}, problem, mesh)
    return next(filter(None, found.values()), "")


def _checksum(records: np.ndarray) -> str:
    return str(xxhash.xxh3_64_hexdigest(records.tobytes()))


def _other_order(folder: Path) -> str:
    """Checks classes of an earlier version; the error, or ''."""
    said = read_record(folder / "governance.json").get("order_id", str)
    return "" if order_id(folder) == said else "its arrays differ from the order_id in governance.json"
