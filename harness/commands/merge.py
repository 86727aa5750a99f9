"""`shelfmark merge`: Join the parts of an ingest in parts."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harness.catalogue.append import RECORDS_AT_ONCE, add_up, part_folder, part_name, write_meta
from harness.catalogue.catalogue import INDEX_DTYPE, Catalogue, shard_name
from harness.catalogue.wholeness import require_whole
from harness.catalogue.writers import ROW_GROUP, NpyWriter
from harness.core.errors import UserError
from harness.core.staged_folder import held

EXAMPLE = "shelfmark merge catalogues/products"


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Joins the parts in CATALOGUE.parts (`shelfmark ingest --part i/n`) into CATALOGUE and removes them.

    Ids follow the manifest: they are those of one ingest of the whole. Shards are taken over as they are, so the names
    inside them count from each part's start. After a merge that was killed the same command finishes it.

    Args:
        catalogue: catalogue folder to create; it appears only when it is complete.
    """

    catalogue: Path = field(kw_only=False)


def find_parts(catalogue: Path) -> list[Catalogue]:
    """The parts of `catalogue` in the order of the manifest.

    Raises:
        UserError: some are missing, there are parts of several divisions, or they are not of one manifest and one
            request.
    """
    folder, found = part_folder(catalogue, 1, 1).parent, _numbers(catalogue)
    if not found:
        raise UserError(f"there are no parts in {folder}", "Make them with `shelfmark ingest --part i/n`")
    divisions = sorted({parts for _, parts in found})
    if len(divisions) > 1:
        several = ", ".join(f"part-{number}-of-{parts}" for number, parts in found)
        raise UserError(f"{folder} holds the rows twice: {several}", "Remove the parts of all divisions but one")
    missing = sorted(set(range(1, divisions[0] + 1)) - {number for number, _ in found})
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(f'part-{number}-of-{divisions[0]}' for number in missing)}",
            "Ingest the missing parts first (--part)",
        )
    parts = [Catalogue(part_folder(catalogue, *part)) for part in found]
    first = _request(parts[0])
    end = 0
    for part in parts:
        if _request(part) != first or part.meta["source"]["rows"][0] != end:
            raise UserError(
                f"{part.path} and the parts before it are not of one manifest and one request "
                "(see their catalogue.json)",
                "Ingest the odd ones again",
            )
        end = part.meta["source"]["rows"][1]
    return parts


def _numbers(catalogue: Path) -> list[tuple[int, int]]:
    """i and n of each part-i-of-n that there is, in order."""
    folder = part_folder(catalogue, 1, 1).parent
    names = os.listdir(folder) if folder.is_dir() else []
    matches = map(re.compile(r"part-(\d+)-of-(\d+)").fullmatch, names)
    return sorted((int(match[1]), int(match[2])) for match in matches if match)


def _request(part: Catalogue) -> dict[str, Any]:
    """Request of a part, equal for all parts of one catalogue."""
    return {**part.meta["source"], "rows": None, "parts": None, "attributes": part.attributes}


def _is_made_of(catalogue: Path, found: list[tuple[int, int]]) -> bool:
    """True where a merge made `catalogue` of these parts: of one request with it, and each of their shards is a file of
    the catalogue too.
    """
    made = Catalogue(catalogue)
    number = made.meta["source"].get("parts")
    parts = [Catalogue(part_folder(catalogue, *part)) for part in found if part[1] == number]
    shards = [part.path / "shards" / shard_name(shard) for part in parts for shard in range(part.meta["num_shards"])]
    own = {_inode(catalogue / "shards" / shard_name(shard)) for shard in range(made.meta["num_shards"])}
    of_one_request = all(_request(part) == _request(made) for part in parts)
    return number is not None and len(parts) == len(found) and of_one_request and own.issuperset(map(_inode, shards))


def _inode(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino


def run(config: MergeConfig) -> dict[str, Any]:
    """Merges and prints a summary.

    Returns:
        catalogue, num_samples, query, document, quarantined, splits, num_shards, parts (those merged).

    Raises:
        UserError: from `find_parts`; `catalogue` exists and was not made of these parts; its disk has no hard links; or
            no part has a sample.
    """
    catalogue = config.catalogue
    if not catalogue.exists():
        find_parts(catalogue)  # before anything is written
    with held(catalogue) as holder:
        found = _numbers(catalogue)
        # Made of these parts already, or of parts that are gone: what is left to do is to remove them.
        if not (catalogue / "catalogue.json").is_file() or not _is_made_of(catalogue, found):
            parts = find_parts(catalogue)
            with holder.stage() as stage:
                _join(stage, parts)
        for part in found:
            holder.discard(part_folder(catalogue, *part))
        with suppress(OSError):  # there is none, or somebody has more in it
            part_folder(catalogue, 1, 1).parent.rmdir()
    meta = Catalogue(catalogue).meta
    counts, number = meta["counts"], meta["source"]["parts"]
    print(
        f"{catalogue}: {meta['num_samples']:,} samples ({counts['query']:,} queries, {counts['document']:,} "
        f"documents) in {meta['num_shards']:,} shard{'s' * (meta['num_shards'] != 1)} of {number:,} parts"
    )
    return {
        "catalogue": str(catalogue),
        "num_samples": meta["num_samples"],
        **counts,
        "num_shards": meta["num_shards"],
        "parts": number,
    }


def _join(stage: Path, parts: list[Catalogue]) -> None:
    """Writes the whole into `stage`."""
    for part in parts:
        require_whole(part)
    totals = add_up([part.meta for part in parts])
    if totals["num_samples"] == 0:
        raise UserError(f"no part in {parts[0].path.parent} has a sample", "Their quarantine.parquet lists the reasons")
    source = {name: value for name, value in parts[0].meta["source"].items() if name != "rows"}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    meta = {**parts[0].meta, "created": created, **totals, "source": {**source, "parts": len(parts)}}
    meta["files"] = {}  # none of the parts' checksums holds here
    (stage / "shards").mkdir()
    (stage / "samples").mkdir()
    _link_shards(stage, parts)
    _join_index(stage, parts)
    _join_samples(stage, parts)
    quarantines = [pq.read_table(part.path / "quarantine.parquet") for part in parts]
    pq.write_table(pa.concat_tables(quarantines), stage / "quarantine.parquet")
    write_meta(stage, meta)


def _link_shards(stage: Path, parts: list[Catalogue]) -> None:
    """A second name for every shard: nothing is copied, and a killed merge leaves the parts whole."""
    shards = [part.path / "shards" / shard_name(shard) for part in parts for shard in range(part.meta["num_shards"])]
    for number, shard in enumerate(shards):
        try:
            os.link(shard, stage / "shards" / shard_name(number))
        except OSError as error:
            raise UserError(
                f"cannot link {shard} into {stage}: {error.strerror}", "A disk with hard links is needed"
            ) from error


def _join_index(stage: Path, parts: list[Catalogue]) -> None:
    first_shard = 0
    with NpyWriter(stage / "index.npy", INDEX_DTYPE) as index:
        for part in parts:
            for start in range(0, part.num_samples, RECORDS_AT_ONCE):
                records = np.array(part.index[start : start + RECORDS_AT_ONCE])
                records["shard"] += first_shard
                index.append(records)
            first_shard += part.meta["num_shards"]


def _join_samples(stage: Path, parts: list[Catalogue]) -> None:
    """The parts' Parquet files, one by one, with the ids of the whole."""
    first_sample = number = 0
    for part in parts:
        for local in range(part.meta["num_parts"]):
            with (
                pq.ParquetFile(part.path / "samples" / part_name(local)) as file,
                pq.ParquetWriter(stage / "samples" / part_name(number), file.schema_arrow) as writer,
            ):
                for batch in file.iter_batches(ROW_GROUP):
                    ids = pa.array(batch.column(0).to_numpy() + first_sample)
                    writer.write_batch(batch.set_column(0, "sample_id", ids))
            number += 1
        first_sample += part.num_samples
