"""A catalogue that grows: what is added comes after what is there, and catalogue.json, replaced last, makes it count.

A reader takes from index.npy, shards/ and samples/ only as much as catalogue.json counts. So whatever a killed append
left beyond that is nobody's, and the next append removes or overwrites it: files under the names that it gives, and no
others.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from harness.catalogue.catalogue import INDEX_DTYPE, Catalogue, part_name, quarantine_names, shard_name
from harness.catalogue.store import PLACE_FILE
from harness.catalogue.wholeness import with_checksums
from harness.core.errors import UserError
from harness.core.files import write_json
from harness.core.staged_folder import Holder, held, sync, sync_tree

RECORDS_AT_ONCE = 1 << 20
SHARD, PART = re.compile(r"shard-(\d{6,})\.tar"), re.compile(r"part-(\d{5,})\.parquet")


def part_folder(catalogue: Path, number: int, parts: int) -> Path:
    """Folder of part `number` of `parts` of `catalogue`, which `shelfmark ingest --part` writes."""
    return catalogue.with_name(f"{catalogue.name}.parts") / f"part-{number}-of-{parts}"


def quarantine_name(meta: dict[str, Any]) -> str:
    """File name of the quarantine of the newest ingest into a catalogue."""
    return quarantine_names(meta)[-1]


def add_up(metas: list[dict[str, Any]]) -> dict[str, Any]:
    """num_samples, num_shards, num_parts and counts of catalogues laid one after another."""
    splits: Counter[str] = Counter()
    for meta in metas:
        splits.update(meta["counts"]["splits"])
    counts = {name: sum(meta["counts"][name] for meta in metas) for name in metas[0]["counts"] if name != "splits"}
    totals = {name: sum(meta[name] for meta in metas) for name in ("num_samples", "num_shards", "num_parts")}
    return {**totals, "counts": {**counts, "splits": dict(sorted(splits.items()))}}


def write_meta(catalogue: Path, meta: dict[str, Any]) -> None:
    """Writes the catalogue.json of a folder that is still staged; checksums of what `meta` counts are added where it
    has none.
    """
    write_json(catalogue / "catalogue.json", with_checksums(catalogue, meta))


def _replace_meta(catalogue: Path, meta: dict[str, Any]) -> None:
    write_meta(catalogue, meta)
    sync(catalogue)


@contextmanager
def growing(path: Path, attributes: list[str]) -> Iterator[tuple[dict[str, Any], Holder]]:
    """Holds a catalogue for one append, and removes what a killed one left.

    Yields:
        Its catalogue.json, and the holder of the addition, for `grow`.

    Raises:
        UserError: no catalogue there, one of other attributes or with its shards elsewhere, or another append is under
            way.
    """
    if (path / PLACE_FILE).exists():
        raise UserError(
            f"the shards of {path} are read from where its {PLACE_FILE} says",
            f"Append where shards/ is and without {PLACE_FILE}, then copy the new shards there",
        )
    catalogue = Catalogue(path)
    if catalogue.attributes != attributes:
        raise UserError(
            f"catalogue {path} has the attributes {', '.join(catalogue.attributes) or '(none)'}, "
            f"not {', '.join(attributes) or '(none)'}",
            f"Give --attribute-columns '{','.join(catalogue.attributes)}'",
        )
    with held(path / "append") as holder:
        meta = Catalogue(path).meta  # read while it is held: an append may have ended since
        parts = _numbered(path / "samples", PART)
        if "num_parts" not in meta:  # made before catalogues grew: without it, a reader takes every file there
            meta["num_parts"] = len(parts)
            _replace_meta(path, meta)
        for folder, pattern, counted in (("samples", PART, "num_parts"), ("shards", SHARD, "num_shards")):
            for number, name in _numbered(path / folder, pattern):
                if number >= meta[counted]:
                    (path / folder / name).unlink()
        yield meta, holder


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, str]]:
    """Number and name of the files there that are named as ours are."""
    return [(int(match[1]), name) for name in sorted(os.listdir(folder)) if (match := pattern.fullmatch(name))]


def grow(path: Path, old: dict[str, Any], added: dict[str, Any], folder: Path, holder: Holder) -> dict[str, Any]:
    """Adds what `folder` holds, its ids and shards numbered after those there.

    classes/ is renamed to classes-<samples of before>, for nothing in it would tell that it is old. (tokenizer/ tells.)

    Args:
        path: the catalogue.
        old: its catalogue.json.
        added: that of the folder.
        folder: a catalogue whose sample ids and shards go on after those of `path`.
        holder: from `growing`.

    Returns:
        The new catalogue.json.
    """
    meta = {**old, **add_up([old, added]), "appended": [*old.get("appended", ()), added["source"]]}
    sync_tree(folder)
    for number in range(old["num_shards"], meta["num_shards"]):
        os.replace(folder / "shards" / shard_name(number), path / "shards" / shard_name(number))
    for number in range(added["num_parts"]):
        os.replace(folder / "samples" / part_name(number), path / "samples" / part_name(old["num_parts"] + number))
    os.replace(folder / "quarantine.parquet", path / quarantine_name(meta))
    # Before catalogue.json: a kill in between costs a run of govern, the other order would keep classes that lack
    # samples.
    if (path / "classes").exists():
        kept = path / f"classes-{old['num_samples']}"
        holder.discard(kept)
        (path / "classes").rename(kept)
    for name in ("shards", "samples"):
        sync(path / name)
    _grow_index(path / "index.npy", old["num_samples"], np.load(folder / "index.npy", mmap_mode="r"))
    _replace_meta(path, meta)
    return meta


def _grow_index(path: Path, length: int, records: np.ndarray) -> None:
    """Writes `records` after the first `length`; in place, since a mapped file may not be replaced on every network
    disk.
    """
    with path.open("r+b") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        start = file.tell()
        file.seek(start + length * INDEX_DTYPE.itemsize)
        for first in range(0, len(records), RECORDS_AT_ONCE):
            file.write(records[first : first + RECORDS_AT_ONCE].tobytes())
        end = file.tell()
        file.flush()
        os.fsync(file.fileno())  # the header may not count what a crash of the machine would lose
        file.seek(0)
        descr = np.lib.format.dtype_to_descr(INDEX_DTYPE)
        header = {"descr": descr, "fortran_order": False, "shape": (length + len(records),)}
        np.lib.format.write_array_header_1_0(file, header)
        if file.tell() != start:
            raise RuntimeError(f"numpy's header changed its size at {length + len(records)} elements")
        file.flush()
        file.truncate(end)  # a killed append may have written further; shortened only now that the header allows it
        os.fsync(file.fileno())
