"""`shelfmark index`: Make a catalogue of webdataset tars where they lie; no image is copied.

A webdataset sample is a run of members that share their name up to its first dot: 000123.jpg, 000123.json, 000123.txt.
"""

from __future__ import annotations

import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from harness.catalogue.append import part_name, write_meta
from harness.catalogue.catalogue import ALL_SPLITS, CATALOGUE_FORMAT, INDEX_DTYPE, SAMPLE_SCHEMA
from harness.catalogue.images import MOST_BYTES, MOST_PIXELS, Rejected, check_image, own_pixel_limit
from harness.catalogue.samples import KINDS, QUARANTINE_SCHEMA, check_texts, commonest, stored
from harness.catalogue.store import PLACE_FILE
from harness.catalogue.writers import NpyWriter, ParquetWriter
from harness.core.errors import UserError
from harness.core.files import write_json
from harness.core.staged_folder import staged_folder
from models.ranges import NonNegativeInt, PositiveInt

EXAMPLE = "shelfmark index /shared/tars --out catalogues/products --kind document"
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")  # extensions of the member that is the sample's image
MOST_FIELDS = 1 << 23  # bytes of a .json or .txt member


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Indexes a folder of webdataset tars in place, every image decoded once.

    What is known of a sample comes from the fields of its .json member; its title from .txt where that has none. The
    tars must stay where they are, as they are; a copy elsewhere is named with `shelfmark shards`.

    Args:
        tars: folder with the uncompressed .tar files.
        out: catalogue folder to create; it appears only when it is complete.
        kind: 'query' or 'document' for every sample; by default the field that kind_field names.
        kind_field: field that says 'query' or 'document'.
        item_field: field of the item id; the sample's name where that is absent.
        class_field: field of the class, that is of the product shown; the item id where that is absent.
        title_field: field of the title.
        description_field: field of the description.
        split_field: field of the split; absent, empty or 'all' puts the sample into every split.
        attribute_fields: further fields to keep, comma-separated.
        max_pixels: images of more pixels are quarantined.
        max_bytes: images of more bytes are quarantined.
        rows_per_part: rows of one Parquet file of samples/.
        workers: tars read at once; the CPU cores this process may use by default.
    """

    tars: Path = field(kw_only=False)
    out: Path
    kind: Literal["query", "document"] | None = None
    kind_field: str = "kind"
    item_field: str = "id"
    class_field: str = "class_id"
    title_field: str = "title"
    description_field: str = "description"
    split_field: str = "split"
    attribute_fields: str = ""
    max_pixels: PositiveInt = MOST_PIXELS
    max_bytes: PositiveInt = MOST_BYTES
    rows_per_part: PositiveInt = 262_144
    workers: NonNegativeInt | None = None


class Found(NamedTuple):
    """A sample of a tar: its row after sample_id and its index entry after the shard, or why it is quarantined."""

    image: str
    row: tuple[str | None, ...] = ()
    entry: tuple[int, ...] = ()
    reason: str = ""


def run(config: IndexConfig) -> dict[str, Any]:
    """Indexes and prints a summary.

    Returns:
        catalogue, num_samples, query, document, quarantined, splits, num_shards, reasons (category: samples), seconds.

    Raises:
        UserError: no tar there, one that is compressed or damaged, `out` exists, the disk is full, or no sample can be
            used.
    """
    started = time.perf_counter()
    names = sorted(path.name for path in config.tars.glob("*.tar")) if config.tars.is_dir() else []
    if not names:
        raise UserError(f"there is no .tar file in {config.tars}", "Name the folder that holds them")
    attributes = [name for name in config.attribute_fields.split(",") if name]
    workers = config.workers or len(os.sched_getaffinity(0))
    with staged_folder(config.out) as stage, own_pixel_limit(), ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda name: _read_tar(config.tars / name, config, attributes), names)
        counts, reasons = _write(stage, found, names, attributes, config.rows_per_part)
        samples = counts["query"] + counts["document"]
        if not samples:
            raise UserError(f"no sample of {config.tars} can be used ({commonest(reasons)})", "Check the field flags")
        meta = {
            "format": CATALOGUE_FORMAT,
            "name": config.out.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "num_samples": samples,
            "num_shards": len(names),
            "shard_names": names,
            "num_parts": len(os.listdir(stage / "samples")),
            "attributes": attributes,
            "counts": {
                "query": counts["query"],
                "document": counts["document"],
                "quarantined": sum(reasons.values()),
                "splits": {key[6:]: counts[key] for key in sorted(counts) if key.startswith("split ")},
            },
            "source": {"tars": str(config.tars), "kind": config.kind},
        }
        write_json(stage / PLACE_FILE, {"url": config.tars.absolute().as_uri()})
        write_meta(stage, meta)
    seconds = round(time.perf_counter() - started, 3)
    print(
        f"{config.out}: {samples:,} samples ({counts['query']:,} queries, {counts['document']:,} documents) in "
        f"{len(names):,} tars of {config.tars}, {seconds:.1f} s"
    )
    if reasons:
        print(f"{sum(reasons.values()):,} samples in quarantine.parquet: {commonest(reasons)}")
    return {
        "catalogue": str(config.out),
        "num_samples": samples,
        **meta["counts"],  # type: ignore[dict-item]
        "num_shards": len(names),
        "reasons": dict(reasons.most_common()),
        "seconds": seconds,
    }


def _write(
    stage: Path, tars: Iterator[list[Found]], names: list[str], attributes: list[str], rows_per_part: int
) -> tuple[Counter[str], Counter[str]]:
    """Writes index, samples and quarantine; returns counts by kind and split, and quarantined samples by category."""
    schema = SAMPLE_SCHEMA
    for name in attributes:
        schema = schema.append(pa.field(name, pa.string()))
    (stage / "samples").mkdir()
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with ExitStack() as stack:
        index = stack.enter_context(NpyWriter(stage / "index.npy", INDEX_DTYPE))
        samples = stack.enter_context(
            ParquetWriter(lambda part: stage / "samples" / part_name(part), schema, rows_per_part)
        )
        quarantine = stack.enter_context(ParquetWriter(lambda _: stage / "quarantine.parquet", QUARANTINE_SCHEMA, None))
        number = 0
        for shard, found in enumerate(tqdm(tars, total=len(names), desc="index", unit=" tars")):
            good = [sample for sample in found if not sample.reason]
            index.append(np.array([(shard, *sample.entry) for sample in good], INDEX_DTYPE))
            for sample in found:
                if sample.reason:
                    quarantine.append((number, stored(f"{names[shard]}/{sample.image}"), stored(sample.reason)))
                    reasons[sample.reason.partition(": ")[0]] += 1
                else:
                    samples.append((samples.num_rows, *sample.row))
                    counts.update([sample.row[1] or "", f"split {sample.row[3]}"])
                number += 1
    return counts, reasons


def _read_tar(path: Path, config: IndexConfig, attributes: list[str]) -> list[Found]:
    """The samples of one tar, in its order.

    Raises:
        UserError: it is compressed, cut off or no tar.
    """
    found = []
    try:
        with tarfile.open(path, "r:") as tar:
            key = ""
            members: dict[str, tarfile.TarInfo] = {}
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                name, _, extension = file.partition(".")
                if f"{folder}/{name}" != key and members:
                    found.append(_sample(tar, members, config, attributes))
                    members = {}
                key = f"{folder}/{name}"
                members[extension.lower()] = member
            if members:
                found.append(_sample(tar, members, config, attributes))
    except (
        tarfile.TarError,
        OSError,
        ValueError,
        OverflowError,
        MemoryError,
    ) as error:  # odd headers raise all of these
        raise UserError(f"{path} cannot be read as an uncompressed tar: {error}", "Unpack or remove it") from error
    return found


def _sample(
    tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], config: IndexConfig, attributes: list[str]
) -> Found:
    picture = next((members[extension] for extension in IMAGES if extension in members), None)
    if picture is None:
        return Found(
            next(iter(members.values())).name, reason=f"no image: its members are {', '.join(sorted(members))}"
        )
    try:
        row = _row(_fields(tar, members), picture.name, config, attributes)
        image = check_image(_bytes(tar, picture, config.max_bytes), config.max_pixels)
    except Rejected as rejected:
        return Found(picture.name, reason=str(rejected))
    except RecursionError:
        return Found(picture.name, reason="damaged text: nested too deep")
    return Found(picture.name, row, (picture.offset_data, picture.size, image.checksum, image.width, image.height))


def _row(fields: dict[str, Any], image: str, config: IndexConfig, attributes: list[str]) -> tuple[str | None, ...]:
    kind = KINDS.get(config.kind or str(fields.get(config.kind_field, "")).lower())
    if kind is None:
        raise Rejected(f"unknown kind: {str(fields.get(config.kind_field))[:40]!r}")

    def text(field: str, default: str = "") -> str:
        value = fields.get(field)
        return default if value is None else str(value)

    item = text(config.item_field, image.rpartition("/")[2].partition(".")[0])
    row = (
        item,
        kind,
        text(config.class_field, item) or None,
        text(config.split_field) or ALL_SPLITS,
        text(config.title_field),
        text(config.description_field),
        image,
        *(text(name) for name in attributes),
    )
    check_texts(row, attributes)
    return row


def _fields(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    fields: Any = {}
    try:
        if "json" in members:
            fields = json.loads(_bytes(tar, members["json"], MOST_FIELDS))
            if not isinstance(fields, dict):
                raise ValueError("no object")
        if "txt" in members:
            fields = {"title": _bytes(tar, members["txt"], MOST_FIELDS).decode().strip(), **fields}
    except ValueError as error:  # also what is no UTF-8
        raise Rejected(f"damaged text: {error}") from None
    return fields


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    if member.issparse():  # where it has holes, its bytes do not lie in the tar as they are
        raise Rejected("sparse tar member")
    if member.size > most:
        raise Rejected(f"too many bytes: {member.size:,}")
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise tarfile.ReadError(f"it ends within {member.name}")
    return data
