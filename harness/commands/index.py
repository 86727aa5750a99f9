"""`shelfmark index`: Make a catalogue of webdataset tars where they lie; no image is copied."""

from __future__ import annotations

import json
import os
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from harness.catalogue.cells import text_of
from harness.catalogue.images import MOST_BYTES, MOST_PIXELS, Rejected, check_image
from harness.catalogue.sample_writer import SampleWriter
from harness.catalogue.samples import attribute_names, commonest, sample_row
from harness.catalogue.store import PLACE_FILE
from harness.catalogue.tar_samples import TarSample, tar_samples
from harness.core.errors import UserError
from harness.core.files import write_json
from harness.core.staged_folder import staged_folder
from models.ranges import NonNegativeInt, PositiveInt

EXAMPLE = "shelfmark index /shared/tars --out catalogues/products --kind document"
MOST_FIELDS = 1 << 23  # bytes of a .json or .txt member
ADVICE = {
    "several images of one name": "A name ends at its first dot, as in webdataset; --last-dot true ends it at the last",
    "members apart": "Members of a sample must follow one another: write the tars with `tar --sort=name`",
    "unknown kind": "Say with --kind what the images are, or with --kind-field what tells it",
}


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Indexes a folder of webdataset tars in place, every image decoded once.

    What is known of a sample comes from the fields of its .json member; its title from .txt where that has none. The
    tars must stay where they are, as they are; a copy elsewhere is named with `shelfmark shards`.

    A sample is a run of members that share their name up to its first dot: 000123.jpg, 000123.json, 000123.txt. Members
    whose name begins with a dot are passed over.

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
        last_dot: a sample's name goes up to the last dot, for names such as 2024.05.01.jpg.
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
    last_dot: bool = False
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
    names = sorted(name for name in os.listdir(config.tars) if name.endswith(".tar")) if config.tars.is_dir() else []
    if not names:
        raise UserError(f"there is no .tar file in {config.tars}", "Name the folder that holds them")
    attributes = attribute_names(config.attribute_fields, "--attribute-fields")
    workers = config.workers or len(os.sched_getaffinity(0))
    unread: Counter[str] = Counter()
    number = 0
    with staged_folder(config.out) as stage:
        with (
            ThreadPoolExecutor(workers) as pool,
            SampleWriter(stage, attributes, config.rows_per_part) as writer,
        ):
            tars = pool.map(lambda name: _read_tar(config.tars / name, config, attributes), names)
            for shard, (found, left) in enumerate(tqdm(tars, total=len(names), desc="index", unit=" tars")):
                unread.update(left)
                for sample in found:
                    if sample.reason:
                        writer.reject(number, f"{names[shard]}/{sample.image}", sample.reason)
                    else:
                        writer.accept(sample.row, (shard, *sample.entry))
                    number += 1
        counts, reasons = writer.counts, writer.reasons
        seen = [advice for reason, advice in ADVICE.items() if reasons[reason]]
        if unread:
            seen.append(f"Members that were not read: {commonest(unread)}")
        samples = counts["query"] + counts["document"]
        if not samples:
            advice = ". ".join([*seen, "Check --kind and the field flags"])
            raise UserError(f"no sample of {config.tars} can be used ({commonest(reasons) or 'no samples'})", advice)
        write_json(stage / PLACE_FILE, {"url": config.tars.absolute().as_uri()})
        shards = {"num_shards": len(names), "shard_names": names}
        meta = writer.write_meta(config.out.name, shards, {"tars": str(config.tars), "kind": config.kind})
    seconds = round(time.perf_counter() - started, 3)
    print(
        f"{config.out}: {samples:,} samples ({counts['query']:,} queries, {counts['document']:,} documents) in "
        f"{len(names):,} tars of {config.tars}, {seconds:.1f} s"
    )
    if reasons:
        print(f"{sum(reasons.values()):,} samples in quarantine.parquet: {commonest(reasons)}")
    for remark in seen:
        print(f"{config.tars}: {remark}")
    return {
        "catalogue": str(config.out),
        "num_samples": samples,
        **meta["counts"],
        "num_shards": len(names),
        "reasons": dict(reasons.most_common()),
        "seconds": seconds,
    }


def _read_tar(path: Path, config: IndexConfig, attributes: list[str]) -> tuple[list[Found], Counter[str]]:
    """The samples of one tar, in its order, and how many members of each kind were not read.

    Raises:
        UserError: it is compressed, cut off or no tar.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            samples, unread = tar_samples(tar, config.last_dot)
            return [_checked(tar, sample, config, attributes) for sample in samples], unread
    except (
        tarfile.TarError,
        OSError,
        ValueError,
        OverflowError,
        MemoryError,
    ) as error:  # odd headers raise all of these
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as an uncompressed tar: {reason}", "Unpack or remove it") from error


def _checked(tar: tarfile.TarFile, sample: TarSample, config: IndexConfig, attributes: list[str]) -> Found:
    picture = sample.image
    if sample.reason:
        return Found(picture.name, reason=sample.reason)
    try:
        row = _row(_values(tar, sample, config), sample, config, attributes)
        image = check_image(_bytes(tar, picture, config.max_bytes), config.max_pixels, halve=False)
    except Rejected as rejected:
        return Found(picture.name, reason=str(rejected))
    except RecursionError:
        return Found(picture.name, reason="damaged text: nested too deep")
    return Found(picture.name, row, (picture.offset_data, picture.size, image.checksum, image.width, image.height))


def _row(
    values: dict[str, Any], sample: TarSample, config: IndexConfig, attributes: list[str]
) -> tuple[str | None, ...]:
    def texts(names: dict[str, str]) -> dict[str, str]:
        """Text of each field by the name given to it, of those that there are."""
        found: dict[str, str] = {}
        for name, key in names.items():
            try:
                if key in values:
                    found[name] = text_of(values[key])
            except Rejected as rejected:
                raise Rejected(f"{rejected} in {key!r}") from None
        return found

    fields = {name: getattr(config, f"{name}_field") for name in ("item", "class", "title", "description", "split")}
    kind = texts({"kind": config.kind_field}).get("kind", "") if config.kind is None else config.kind
    own = {"item": sample.name, **texts(fields), "kind": kind, "image": sample.image.name}
    return sample_row(own, {**dict.fromkeys(attributes, ""), **texts({name: name for name in attributes})})


def _values(tar: tarfile.TarFile, sample: TarSample, config: IndexConfig) -> dict[str, Any]:
    values: Any = {}
    try:
        if sample.fields:
            values = json.loads(_bytes(tar, sample.fields, MOST_FIELDS))
            if not isinstance(values, dict):
                raise ValueError("no object")
        if sample.text and values.get(config.title_field) is None:
            values[config.title_field] = _bytes(tar, sample.text, MOST_FIELDS).decode("utf-8-sig").strip()
    except ValueError as error:  # also what is no UTF-8
        raise Rejected(f"damaged text: {error}") from None
    return values


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
