"""Format of a catalogue's classes/ folder, which `shelfmark govern` writes and the order of the samples reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

from harness.catalogue.catalogue import open_array

GOVERNANCE_FORMAT = 1
KINDS = {"query": 1, "document": 2}
ARRAYS = ("members", "member_offsets", "slot_offsets")


def order_id(folder: Path) -> str:
    """16 hex digits over the values of the six arrays in a classes/ folder, on which the order of samples depends."""
    digest = xxhash.xxh3_64()
    for kind in KINDS:
        for name in ARRAYS:
            array = open_array(folder / f"{kind}.{name}.npy", np.int64, f"Run: shelfmark govern {folder.parent}")
            for start in range(0, len(array), 1 << 20):
                digest.update(array[start : start + (1 << 20)].tobytes())
    return digest.hexdigest()
