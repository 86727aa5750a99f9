"""`shelfmark embed`: Embed photos with an artefact's encoder into a numpy file, their paths beside it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from harness.artefact import Artefact, Photo
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
        photos: files, and folders whose files are all taken, in the order of their names.
        out: file NAME.npy for the unit embeddings, float32 [n, d]; row i is the photo in line i of NAME.txt.
        batch_size: photos embedded at once.
    """

    artefact: Path = field(kw_only=False)
    photos: tuple[Path, ...] = field(kw_only=False)
    out: Path
    batch_size: PositiveInt = 64


def run(config: EmbedConfig) -> dict[str, Any]:
    """Embeds, writes both files, and returns photos, left_out and embedding_dim.

    Raises:
        UserError: no photo that can be read, an artefact that takes texts or cannot be used, files that cannot be
            written.
    """
    if config.out.suffix != ".npy":
        raise UserError(f"--out {config.out} is not a .npy", "Name a file with this suffix")
    names = config.out.with_suffix(".txt")
    if not os.access(config.out.absolute().parent, os.W_OK):  # before the work
        raise UserError(f"--out {config.out} cannot be written", "Name a file in a folder that exists")
    artefact = Artefact(config.artefact)
    if artefact.meta["query"] != "image":
        raise UserError(f"{config.artefact} takes texts, not photos")
    paths = files(config.photos)
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


def files(given: Iterable[Path]) -> list[Path]:
    """Files that are named, and all in folders that are, but hidden ones; in order."""
    found = []
    for path in given:
        inside = (file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        found += sorted(inside) if path.is_dir() else [path]
    return found
