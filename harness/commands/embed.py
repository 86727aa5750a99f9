"""`shelfmark embed`: Embed photos with an artefact's encoder: files into numpy, a catalogue's into Parquet."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from harness.artefact import Artefact, Photo
from harness.catalogue.catalogue import Catalogue, CorruptSample
from harness.commands.ingest import parse_part
from harness.core.errors import UserError
from harness.core.files import printable, write_whole
from models.ranges import PositiveInt

EXAMPLE = "shelfmark embed artefacts/grocery photos/ --out photos.npy"

AT_ONCE = 256  # photos whose bytes are in memory


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Embeds photos as search does; photos that cannot be read are named and left out.

    Args:
        artefact: the folder that `shelfmark export` wrote.
        photos: files, and folders whose files are all taken, in the order of their names; or one catalogue, whose query
            photos are taken.
        out: file NAME.npy for the unit embeddings, float32 [n, d]; row i is the photo in line i of NAME.txt. Of a
            catalogue NAME.parquet, with the columns sample_id and embedding, as `shelfmark govern` reads them.
        batch_size: photos embedded at once.
        part: 'i/n' takes the i-th (from 1) of n parts of a catalogue's photos; all of them by default.
    """

    artefact: Path = field(kw_only=False)
    photos: tuple[Path, ...] = field(kw_only=False)
    out: Path
    batch_size: PositiveInt = 64
    part: str | None = None


def run(config: EmbedConfig) -> dict[str, Any]:
    """Embeds, writes both files, and returns photos, left_out and embedding_dim.

    Raises:
        UserError: no photo that can be read, an artefact that takes texts or cannot be used, files that cannot be
            written.
    """
    stored = (config.photos[0] / "catalogue.json").exists() if len(config.photos) == 1 else False
    suffix = ".parquet" if stored else ".npy"
    if config.out.suffix != suffix:
        raise UserError(f"--out {config.out} is not a {suffix}", "Name a file with this suffix")
    if config.part is not None and not stored:
        raise UserError("--part is for the photos of a catalogue")
    names = config.out.with_suffix(".txt")
    if not os.access(config.out.absolute().parent, os.W_OK):  # before the work
        raise UserError(f"--out {config.out} cannot be written", "Name a file in a folder that exists")
    artefact = Artefact(config.artefact)
    if artefact.meta["query"] != "image":
        raise UserError(f"{config.artefact} takes texts, not photos")
    if stored:
        return _embed_catalogue(config, artefact, Catalogue(config.photos[0]))
    paths = _files(config.photos)
    embedded: list[str] = []
    vectors = [np.empty((0, artefact.model.embedding_dim), np.float32)]
    for first in tqdm(range(0, len(paths), AT_ONCE), "embedding", unit=f" x {AT_ONCE}", leave=False, delay=5):
        photos = []
        for path in paths[first : first + AT_ONCE]:
            try:
                photos.append(Photo.open(path))
                embedded.append(str(path))
            except UserError as error:
                print(printable(f"left out: {error}"), file=sys.stderr)
        if photos:
            vectors.append(artefact.embed(photos, config.batch_size).numpy())
    if not embedded:
        raise UserError(f"none of {len(paths):,} photos can be read", "Name photos, or folders that hold some")
    temporary = config.out.with_name(f"{config.out.name}.tmp")
    with temporary.open("wb") as file:
        np.save(file, np.concatenate(vectors))
    temporary.replace(config.out)
    write_whole(names, "".join(f"{printable(name)}\n" for name in embedded))
    width = artefact.model.embedding_dim
    print(f"{config.out}: float32 [{len(embedded):,}, {width}], in the order of {names}")
    return {"photos": len(embedded), "left_out": len(paths) - len(embedded), "embedding_dim": width}


def _embed_catalogue(config: EmbedConfig, artefact: Artefact, catalogue: Catalogue) -> dict[str, Any]:
    """Embeds the query photos of a catalogue; memory does not grow with it."""
    number, parts = (1, 1) if config.part is None else parse_part(config.part)
    width, left_out, embedded = artefact.model.embedding_dim, 0, 0
    schema = pa.schema([("sample_id", pa.int64()), ("embedding", pa.list_(pa.float32()))])
    temporary = config.out.with_name(f"{config.out.name}.tmp")
    start, end = (catalogue.num_samples * i // parts for i in (number - 1, number))
    with (
        pq.ParquetWriter(temporary, schema) as writer,
        tqdm(total=end - start, desc="embedding", unit=" samples", leave=False, delay=5) as progress,
    ):
        for rows in catalogue.batches([], kind="query", between=(start, end - 1)):
            samples = rows.column("sample_id").to_numpy()
            for first in range(0, len(samples), AT_ONCE):
                ids, photos = [], []
                for sample in samples[first : first + AT_ONCE].tolist():
                    size = catalogue.index[sample]
                    try:
                        data = catalogue.read_bytes(sample)
                    except CorruptSample as error:
                        print(printable(f"left out: {error}"), file=sys.stderr)
                        left_out += 1
                        continue
                    photos.append(Photo(data, (0, 0, int(size["width"]), int(size["height"]))))
                    ids.append(sample)
                if ids:
                    vectors = artefact.embed(photos, config.batch_size).numpy()
                    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)
                    writer.write_table(pa.table([pa.array(ids), column.cast(schema.field(1).type)], schema=schema))
                embedded += len(ids)
                progress.n = ids[-1] - start if ids else progress.n
                progress.refresh()
    if not embedded:
        temporary.unlink()
        raise UserError(f"{catalogue.path} has no query photo there", "Name another catalogue or --part")
    temporary.replace(config.out)
    print(f"{config.out}: embeddings of {embedded:,} query photos, {width} wide")
    return {"photos": embedded, "left_out": left_out, "embedding_dim": width}


def _files(given: Iterable[Path]) -> list[Path]:
    """Files that are named, and all in folders that are, but hidden ones; in order."""
    found = []
    for path in given:
        inside = (file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        found += sorted(inside) if path.is_dir() else [path]
    return found
