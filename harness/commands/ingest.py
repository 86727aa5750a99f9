"""`shelfmark ingest`: Make a catalogue of a manifest and an image folder."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import xxhash
from tqdm import tqdm

from harness.catalogue.append import grow, growing, part_folder, quarantine_name
from harness.catalogue.images import (
    MOST_BYTES,
    MOST_PIXELS,
    LoadedImage,
    Rejected,
    check_image,
    load_image,
)
from harness.catalogue.paths import find_image
from harness.catalogue.sample_writer import SampleWriter
from harness.catalogue.samples import ShardWriter, attribute_names, commonest, sample_row
from harness.catalogue.table import Manifest
from harness.catalogue.text_table import Row
from harness.core.errors import UserError
from harness.core.files import printable
from harness.core.staged_folder import staged_folder
from models.ranges import PositiveInt

EXAMPLE = "shelfmark ingest --manifest products.tsv --images photos/ --out catalogues/products"
OPTIONAL_COLUMNS = {"class": "class_id", "title": "title", "description": "description", "split": "split"}


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Reads a manifest, checks every image by decoding it once, and writes a catalogue folder.

    A row is one image of a query or of a document (a product of the catalogue). Several rows may share an item id. Rows
    that cannot be used are listed with their reason in the catalogue's quarantine.parquet.

    Args:
        manifest: TSV, CSV or Parquet file with a header, or a folder of such files, which are its parts in the order of
            their names. Parquet may hold the images too, as structs of bytes and path.
        images: folder that the manifest's image paths are relative to; a path out of it is quarantined.
        out: catalogue folder to create; it appears only when it is complete.
        append: add the rows to the catalogue `out` instead. Its samples keep their ids and the new ones follow. Every
            row is added as given: one that is in the catalogue already is then there twice. Only the very append that
            was the last one adds nothing when it is run again: the same manifest, byte by byte, with the same options.
        part: 'i/n' ingests the i-th (from 1) of n contiguous parts of the manifest's rows into
            OUT.parts/part-i-of-n; `shelfmark merge OUT` joins them when all n are there.
        image_column: column of the image path.
        item_column: column of the item id (the product or the photo that the image shows).
        kind_column: column that says 'query' or 'document' (or 'doc').
        kind: the kind of every row, for a manifest without such a column; the kind column is then not read.
        class_column: column of the class, that is of the product shown (default: class_id; the item id where that is
            absent). An empty cell means no class.
        title_column: column of the title (default: title, empty where that is absent).
        description_column: column of the description (default: description, empty where that is absent).
        split_column: column of the split (default: split). An empty cell or 'all' puts the row into every split.
        attribute_columns: further columns to keep, comma-separated.
        delimiter: character between the cells of a CSV or TSV (default: recognised by the header).
        encoding: encoding of a CSV or TSV, such as cp1252 (default: UTF-8, or UTF-16 where the file begins so).
        quoting: 'csv' where cells may stand in quotes, 'none' where quotes are text (default: csv for .csv; none for
            .tsv unless its header is quoted).
        max_pixels: a JPEG of up to four times as many is kept at half its width and height; other images of more are
            quarantined.
        max_bytes: image files of more bytes are quarantined.
        shard_size: bytes of image data after which a new tar shard begins.
        rows_per_part: rows of one Parquet file of samples/.
        workers: decoding threads (default: the CPU cores this process may use).
    """

    manifest: Path
    images: Path
    out: Path
    append: bool = False
    part: str | None = None
    image_column: str = "image"
    item_column: str = "id"
    kind_column: str = "kind"
    kind: Literal["query", "document"] | None = None
    class_column: str | None = None
    title_column: str | None = None
    description_column: str | None = None
    split_column: str | None = None
    attribute_columns: str = ""
    delimiter: str | None = None
    encoding: str | None = None
    quoting: Literal["csv", "none"] | None = None
    max_pixels: PositiveInt = MOST_PIXELS
    max_bytes: PositiveInt = MOST_BYTES
    shard_size: PositiveInt = 2**30
    rows_per_part: PositiveInt = 262_144
    workers: PositiveInt | None = None


class Columns:
    """Columns of a manifest and the fields that they fill, after checking that the manifest has the columns asked for.

    Raises:
        UserError: a column that was asked for or is needed is absent or ambiguous.
    """

    def __init__(self, manifest: Manifest, config: IngestConfig) -> None:
        self._fields = {"image": config.image_column, "item": config.item_column}
        if config.kind is None:
            self._fields["kind"] = config.kind_column
        given = {field: getattr(config, f"{field}_column") for field in OPTIONAL_COLUMNS}
        for field, default in OPTIONAL_COLUMNS.items():
            if given[field] is not None or default in manifest.columns:
                self._fields[field] = given[field] or default
        for field, column in self._fields.items():
            manifest.require(column, f"--{field}-column")
        self.attributes = attribute_names(config.attribute_columns, "--attribute-columns")
        for name in self.attributes:
            manifest.require(name, "--attribute-columns")
        self.names = [*self._fields.values(), *self.attributes]
        self._kind = {} if config.kind is None else {"kind": config.kind}

    @property
    def mapping(self) -> dict[str, str]:
        """Manifest column of each field that is read."""
        return dict(self._fields)

    def sample(self, row: Row) -> tuple[str | None, ...]:
        """The row's values of SAMPLE_SCHEMA after sample_id, then its attributes.

        Raises:
            Rejected: the row is malformed or a needed field is empty or unknown.
        """
        if row.problem:
            raise Rejected(row.problem)
        cells = dict(zip(self._fields, row.cells, strict=False))
        attributes = row.cells[len(self._fields) :]
        return sample_row({**cells, **self._kind}, dict(zip(self.attributes, attributes, strict=True)))

    def image(self, row: Row) -> str:
        """The row's image path as it stands in the manifest."""
        return row.cells[0]


def run(config: IngestConfig) -> dict[str, Any]:
    """Ingests and prints a summary.

    Returns:
        catalogue (the folder written), num_samples, query, document, quarantined, splits and num_shards of the whole
        catalogue, added (samples of this call), reasons (category: rows of this call), seconds.

    Raises:
        UserError: the manifest or a column is not there, `out` exists (or does not, or differs, with `append`), the
            disk is full, or no row can be used.
    """
    start = time.perf_counter()
    if config.append and config.part is not None:
        raise UserError("--append and --part exclude each other", "Merge the parts into a catalogue of its own")
    manifest = Manifest(config.manifest, config.delimiter, config.encoding, config.quoting)
    for note in manifest.said:
        print(f"{config.manifest}: {note}")
    columns = Columns(manifest, config)
    if not config.images.is_dir():
        raise UserError(f"no image folder {config.images} (--images)")
    if not os.access(config.images, os.X_OK):
        raise UserError(f"--images {config.images}: Permission denied", "Files in it cannot be opened")
    if config.append:
        out, request = config.out, _request(config, manifest)
        with growing(out, columns.attributes) as (old, holder):
            before = (old.get("appended") or [{}])[-1]
            if before.get("request") == request:
                print(f"{out}: these rows are there already, by an append of the same manifest with the same options")
                return _figures(out, old, 0, Counter(), start)
            folder = holder.new()
            added, reasons = _ingest(folder, manifest, columns, config, old)
            added["source"]["request"] = request
            meta = grow(out, old, added, folder, holder)
    else:
        out = config.out if config.part is None else part_folder(config.out, *parse_part(config.part))
        with staged_folder(out) as folder:
            meta, reasons = _ingest(folder, manifest, columns, config)
        added = meta
    figures = _figures(out, meta, added["num_samples"], reasons, start)
    counts = added["counts"]
    print(
        f"{out}: {'+' * config.append}{added['num_samples']:,} samples ({counts['query']:,} queries, "
        f"{counts['document']:,} documents) in {added['num_shards']:,} shard{'s' * (added['num_shards'] != 1)}, "
        f"{figures['seconds']:.1f} s"
    )
    if reasons:
        print(f"{counts['quarantined']:,} rows in {quarantine_name(meta)}: {commonest(reasons)}")
    if config.append:
        print(
            f"now {meta['num_samples']:,} samples; the previous classes/ and tokenizer/ do not fit them. "
            f"Next: shelfmark govern {out}; shelfmark tokenizer {out}"
        )
        if (out / "pairs").exists():
            print(f"{out}/pairs names none of the new rows; if your table does, first: shelfmark pairs {out} --table …")
    return figures


def _figures(out: Path, meta: dict[str, Any], added: int, reasons: Counter[str], start: float) -> dict[str, Any]:
    return {
        "catalogue": str(out),
        "num_samples": meta["num_samples"],
        **meta["counts"],
        "num_shards": meta["num_shards"],
        "added": added,
        "reasons": dict(reasons.most_common()),
        "seconds": round(time.perf_counter() - start, 3),
    }


def _request(config: IngestConfig, manifest: Manifest) -> str:
    """Fingerprint of the manifest's bytes and of all that decides what is made of them: a rerun of one append has the
    same.
    """
    options = {
        **asdict(config),
        "images": os.path.abspath(config.images),
        "out": None,
        "workers": None,
        "manifest": None,
    }
    for name in ("delimiter", "encoding", "quoting"):  # catalogues of versions without them grow too
        if options[name] is None:
            del options[name]
    digest = xxhash.xxh3_64(json.dumps(options).encode())
    for part in manifest.files:
        with part.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def parse_part(text: str) -> tuple[int, int]:
    """i and n of 'i/n', i from 1 to n."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not match or int(match[1]) > int(match[2]):
        raise UserError(f"--part is {text!r}", "It must be i/n with i from 1 to n, such as 3/8")
    return int(match[1]), int(match[2])


def _part_rows(manifest: Manifest, part: str | None) -> tuple[int, int | None]:
    """First row and end of a part; the last part has no end, since the manifest's number of rows is an estimate."""
    number, parts = (1, 1) if part is None else parse_part(part)
    end = manifest.num_rows * number // parts if number < parts else None
    return manifest.num_rows * (number - 1) // parts, end


def _ingest(
    stage: Path, manifest: Manifest, columns: Columns, config: IngestConfig, old: dict[str, Any] | None = None
) -> tuple[dict[str, Any], Counter[str]]:
    """Fills the folder `stage` from the rows that `config` asks for, its numbers going on after those of `old`.

    Returns:
        What stands in its catalogue.json, and quarantined rows by category.
    """
    rows = _part_rows(manifest, config.part)
    (stage / "shards").mkdir()
    root = Path(os.path.abspath(config.images))
    missing: list[str] = []
    halved = 0
    with ExitStack() as stack:
        first = (old["num_samples"], old["num_shards"]) if old else (0, 0)
        shards = stack.enter_context(ShardWriter(stage / "shards", config.shard_size, first[1]))
        writer = stack.enter_context(SampleWriter(stage, columns.attributes, config.rows_per_part, first[0]))
        for number, row, found in _examine(manifest, columns, config, root, rows):
            if isinstance(found, Rejected):
                writer.reject(number, columns.image(row), str(found))
                if str(found) == "missing file" and len(missing) < 3:
                    missing.append(printable(str(root / columns.image(row))))
                continue
            sample, image = found
            halved += image.halved
            shard, offset = shards.add(f"{writer.next_id:012d}.{image.extension}", image.data)
            writer.accept(sample, (shard, offset, len(image.data), image.checksum, image.width, image.height))
    reasons = writer.reasons
    seen = manifest.remarks()
    if halved:
        seen.append(
            f"{halved:,} JPEGs of more than {config.max_pixels:,} pixels are kept at half their width and height"
        )
    if reasons["not UTF-8"] and manifest.is_text:
        seen.append("Rows that are not UTF-8 may be text of another encoding, such as cp1252 (--encoding)")
    if reasons["image URL"]:
        seen.append(
            "Image URLs are not fetched: download them into a folder, or with img2dataset into tars for "
            "`shelfmark index`"
        )
    if missing:
        seen.append(f"The first files that are missing: {', '.join(missing)}")
    if not writer.counts and config.part is None:
        raise UserError(
            f"{config.manifest}: none of its {sum(reasons.values()):,} rows can be used "
            f"({commonest(reasons) or 'no rows'})",
            ". ".join([*seen, "Check --images and the column flags"]),
        )
    for remark in seen:
        print(f"{config.manifest}: {remark}")
    source = {
        "manifest": str(config.manifest),
        "images": str(config.images),
        "columns": columns.mapping,
        "kind": config.kind,
        **({} if config.part is None else {"rows": rows}),
    }
    return writer.write_meta(config.out.name, {"num_shards": len(os.listdir(stage / "shards"))}, source), reasons


def _examine(
    manifest: Manifest, columns: Columns, config: IngestConfig, root: Path, rows: tuple[int, int | None]
) -> Iterator[tuple[int, Row, tuple[tuple[str | None, ...], LoadedImage] | Rejected]]:
    """The rows in order, examined by threads: reading waits and Pillow's decoders run without the interpreter lock."""
    workers = config.workers or len(os.sched_getaffinity(0))

    def examine(row: Row) -> tuple[tuple[str | None, ...], LoadedImage] | Rejected:
        try:
            sample = columns.sample(row)
            if row.data is None:
                image = find_image(root, columns.image(row))
                return sample, load_image(root, image, config.max_bytes, config.max_pixels)
            if len(row.data) > config.max_bytes:
                raise Rejected(f"too many bytes: {len(row.data):,}")
            return sample, check_image(row.data, config.max_pixels)
        except Rejected as rejected:
            return rejected

    window: deque[tuple[Row, Future[Any]]] = deque()
    progress = tqdm(total=(rows[1] or manifest.num_rows) - rows[0], desc="ingest", unit=" rows", mininterval=0.5)
    with ThreadPoolExecutor(workers) as pool, progress:
        done = rows[0]
        for row in islice(manifest.rows(columns.names), *rows):
            window.append((row, pool.submit(examine, row)))
            # The window bounds what is held in memory while one slow image keeps its place in the order.
            if len(window) == 4 * workers:
                yield done, window[0][0], window.popleft()[1].result()
                done += 1
                progress.update()
        while window:
            yield done, window[0][0], window.popleft()[1].result()
            done += 1
            progress.update()
        progress.total = done - rows[0]
