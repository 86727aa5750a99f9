"""`shelfmark shards`: says where a catalogue's shards lie, after a look that they do."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.catalogue import Catalogue, CorruptSample
from harness.data.store import PLACE_FILE
from harness.errors import UserError
from harness.files import write_whole

EXAMPLE = (
    "shelfmark shards catalogues/products --at s3://bucket/products/shards --cache /scratch/shelfmark --cache-gib 200"
)


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Moves a catalogue's images out of its folder, for every command that reads them from then on.

    Copy the folder's shards/ there first; index, texts, classes and tokenizer stay. One sample of each shard is read and its checksum
    compared. shards.json holds the place; without that file the catalogue's own shards/ counts.

    Args:
        catalogue: the catalogue folder.
        at: URL of the folder with the shards in any protocol that fsspec has a package for: s3, gcs, http, file …; 'here' for the
            catalogue's own shards/.
        cache: local folder that keeps what was read; processes of a node share it. None by default.
        cache_gib: bound of that folder in GiB.
    """

    catalogue: Path
    at: str
    cache: Path | None = None
    cache_gib: float = 50.0


def run(config: ShardsConfig) -> dict[str, Any]:
    """Checks, writes shards.json, prints a line; returns shards, url and seconds.

    Raises:
        UserError: a shard is missing there, holds something else, or cannot be read.
    """
    started = time.perf_counter()
    if config.cache_gib <= 0:
        raise UserError(f"--cache-gib is {config.cache_gib}", "It must be above 0")
    file = config.catalogue / PLACE_FILE
    before = file.read_text(encoding="utf-8") if file.exists() else None
    cache = None if config.cache is None else str(config.cache.absolute())
    try:
        if config.at == "here":
            file.unlink(missing_ok=True)
        else:
            place = {"url": config.at, "cache": cache, "cache_bytes": int(config.cache_gib * 2**30)}
            write_whole(file, json.dumps(place, indent=1))
        catalogue = Catalogue(config.catalogue)
        # The last sample of each shard: a copy that was cut off lacks it.
        _, last = np.unique(catalogue.index["shard"][::-1], return_index=True)
        for sample in (catalogue.num_samples - 1 - last).tolist():
            catalogue.read_bytes(sample)
        catalogue.close()
    except BaseException as error:
        if before is None:
            file.unlink(missing_ok=True)
        else:
            write_whole(file, before)
        if isinstance(error, CorruptSample):
            raise UserError(
                f"{config.at} does not hold this catalogue's shards: {error}", "Copy shards/ there again"
            ) from error
        raise
    shards = catalogue.meta["num_shards"]
    print(f"{config.catalogue}: {shards} shards at {config.at}, one sample of each read and found right")
    return {"shards": shards, "url": config.at, "seconds": round(time.perf_counter() - started, 3)}
