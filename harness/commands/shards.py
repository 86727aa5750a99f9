"""`shelfmark shards`: Say where a catalogue's images lie: s3, http, …"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness.catalogue.catalogue import Catalogue, CorruptSample
from harness.catalogue.store import HERE, PLACE_FILE, open_store
from harness.core.errors import UserError
from harness.core.files import write_json

EXAMPLE = "shelfmark shards catalogues/products --at s3://bucket/products/shards"


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Sets the place from which all commands read a catalogue's images.

    Copy the folder's shards/ there first; index, texts, classes and tokenizer stay. One sample of each shard is read
    and its checksum compared. shards.json holds the place; without that file the catalogue's own shards/ is used. If
    SHELFMARK_CACHE names a folder, every command caches there what it reads, at most SHELFMARK_CACHE_GIB GiB (50);
    processes of a node share the cache.

    Args:
        catalogue: the catalogue folder.
        at: URL of the folder with the shards in any protocol that fsspec has a package for: s3, gcs, http, file …;
            'here' for the catalogue's own shards/. Never with a password: fsspec reads that from its own configuration.
    """

    catalogue: Path = field(kw_only=False)
    at: str


def run(config: ShardsConfig) -> dict[str, Any]:
    """Checks, writes shards.json, prints a line; returns shards, url and seconds.

    Raises:
        UserError: a shard is missing there, holds something else, or cannot be read.
    """
    started = time.perf_counter()
    file = config.catalogue / PLACE_FILE
    catalogue = Catalogue(config.catalogue, open_store(config.catalogue, config.at))
    try:
        # The last sample of each shard: a copy that was cut off lacks it.
        _, last = np.unique(catalogue.index["shard"][::-1], return_index=True)
        for sample in (catalogue.num_samples - 1 - last).tolist():
            catalogue.read_bytes(sample)
    except CorruptSample as error:
        raise UserError(
            f"{config.at} does not hold this catalogue's shards: {error}", "Copy shards/ there again"
        ) from error
    finally:
        catalogue.close()
    if config.at == HERE:
        file.unlink(missing_ok=True)
    else:
        write_json(file, {"url": config.at})
    shards = catalogue.meta["num_shards"]
    print(f"{config.catalogue}: {shards} shards at {config.at}, one sample of each read and correct")
    return {"shards": shards, "url": config.at, "seconds": round(time.perf_counter() - started, 3)}
