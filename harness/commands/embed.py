"""`shelfmark embed`: Embed photos with an artefact's encoder into a numpy file, their paths beside it.

The query photos of a catalogue become Parquet with their sample ids, which `shelfmark govern --embeddings` takes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from harness.artefact import Artefact, Photo
from harness.catalogue.catalogue import Catalogue, CorruptSample
from harness.core.errors import UserError
from harness.core.files import files_in, printable, require_writable, write_whole
from models.ranges import PositiveInt

EXAMPLE = "shelfmark embed artefacts/grocery photos/ --out photos.npy"

AT_ONCE = 256  # photos whose bytes are in memory


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Embeds photos as search does; photos that cannot be read are named and left out.

    A catalogue folder stands for its query photos of one split; their embeddings become a Parquet file.

    Args:
        artefact: the folder that `shelfmark export` wrote.
        photos: files, and folders whose files are all taken, in the order of their names; or one catalogue.
        out: file NAME.npy for the unit embeddings, float32 [n, d]; row i is the photo in line i of NAME.txt. Of a
            catalogue, file NAME.parquet with the columns sample_id and embedding.
        split: of the catalogue's query photos.
        batch_size: photos embedded at once.
    """

    artefact: Path = field(kw_only=False)
    photos: tuple[Path, ...] = field(kw_only=False)
    out: Path
    split: str = "train"
    batch_size: PositiveInt = 64


def run(config: EmbedConfig) -> dict[str, Any]:
    """Embeds, writes both files, and returns photos, left_out and embedding_dim.

    Raises:
        UserError: no photo that can be read, an artefact that takes texts or cannot be used, files that cannot be
            written.
    """
    whole = len(config.photos) == 1 and (config.photos[0] / "catalogue.json").is_file()
    suffix = ".parquet" if whole else ".npy"
    if config.out.suffix != suffix:
        raise UserError(f"--out {config.out} is not a {suffix}", "Name a file with this suffix")
    names = config.out.with_suffix(".txt")
    require_writable(config.out, "--out")
    artefact = Artefact(config.artefact)
    if artefact.meta["query"] != "image":
        raise UserError(f"{config.artefact} takes texts, not photos")
    if whole:
        return _embed_catalogue(artefact, Catalogue(config.photos[0]), config)
    paths = files_in(config.photos)
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


def _embed_catalogue(artefact: Artefact, catalogue: Catalogue, config: EmbedConfig) -> dict[str, Any]:
    """Embeds the catalogue's query photos of the split."""
    width, done, total = artefact.model.embedding_dim, 0, 0
    schema = pa.schema([("sample_id", pa.int64()), ("embedding", pa.list_(pa.float32(), width))])
    temporary = config.out.with_name(f"{config.out.name}.tmp")
    ids = catalogue.table(["kind"], kind="query", split=config.split)["sample_id"].to_pylist()
    with pq.ParquetWriter(temporary, schema) as writer:
        for first in tqdm(range(0, len(ids), AT_ONCE), "embedding", unit=f" x {AT_ONCE}", leave=False, delay=5):
            photos = []
            kept = []
            for sample in ids[first : first + AT_ONCE]:
                total += 1
                try:
                    data = catalogue.read_bytes(sample)
                except CorruptSample as error:
                    print(printable(f"left out: {error}"), file=sys.stderr)
                    continue
                entry = catalogue.index[sample]
                photos.append(Photo(data, (0, 0, int(entry["width"]), int(entry["height"]))))
                kept.append(sample)
            if photos:
                vectors = artefact.embed(photos, config.batch_size).numpy()
                flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
                writer.write_table(pa.table([pa.array(kept, pa.int64()), flat], schema=schema))
                done += len(kept)
    if not done:
        temporary.unlink()
        raise UserError(f"{catalogue.path} has no query photo in split {config.split!r} that can be read (--split)")
    temporary.replace(config.out)
    print(f"{config.out}: {done:,} embeddings of {width} numbers, of the query photos of {catalogue.path}")
    return {"photos": done, "left_out": total - done, "embedding_dim": width}
