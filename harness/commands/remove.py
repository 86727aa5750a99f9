"""`shelfmark remove`: Take documents out of an artefact, whose index is not built again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from harness.artefact.artefact import Artefact
from harness.artefact.removed import FILE, write_removed
from harness.core.errors import UserError
from harness.core.files import printable, write_json
from harness.core.manifest import MANIFEST, fingerprint, write_manifest
from harness.core.staged_folder import share_file, staged_folder

EXAMPLE = "shelfmark remove artefacts/grocery --items 4711,4712"
NAMED = 5  # ids in a message


@dataclass(frozen=True, kw_only=True)
class RemoveConfig:
    """Marks documents as removed: no search finds them from then on. Their rows stay until the next whole export.

    The folder is replaced by a complete new one, which shares the files that stay as they are.

    Args:
        artefact: the folder that `shelfmark export` wrote.
        items: ids of the documents.
        table: text file with one id a line, besides `items`.
    """

    artefact: Path = field(kw_only=False)
    items: tuple[str, ...] = ()
    table: Path | None = None


def run(config: RemoveConfig) -> dict[str, Any]:
    """Removes and prints a line; returns removed (now) and documents (that are left).

    Raises:
        UserError: no id given, ids that no document of the artefact has, none would be left, or the artefact cannot be
            read.
    """
    lines = [] if config.table is None else config.table.read_text(encoding="utf-8").splitlines()
    wanted = [*config.items, *filter(None, lines)]
    if not wanted:
        raise UserError("no document to remove", f"Name ids, as in   {EXAMPLE}")
    artefact = Artefact(config.artefact)
    kept = np.ones(len(artefact.documents), bool) if artefact.kept is None else artefact.kept
    items = artefact.documents.column("item")
    rows = pc.is_in(items, value_set=pa.array(wanted, pa.string())).to_numpy() & kept
    known = set(items.filter(pa.array(rows)).to_pylist())
    if unknown := [item for item in wanted if item not in known]:
        named = ", ".join(printable(item, 40) for item in unknown[:NAMED])
        more = f" and {len(unknown) - NAMED:,} more" if len(unknown) > NAMED else ""
        raise UserError(f"{config.artefact} has no document with the id {named}{more}", "Nothing was removed")
    left = kept & ~rows
    if not left.any():
        raise UserError(f"{config.artefact} would have no document left", "Nothing was removed")
    with staged_folder(config.artefact, replace=True) as stage:
        written = shutil.ignore_patterns(FILE, MANIFEST, "artefact.json")
        shutil.copytree(config.artefact, stage, copy_function=share_file, ignore=written, dirs_exist_ok=True)
        write_removed(stage, np.flatnonzero(~left))
        write_json(stage / "artefact.json", {**artefact.meta, "removed": int((~left).sum())})
        write_manifest(stage, algorithm="sha256")
    figures = {"removed": int(rows.sum()), "documents": int(left.sum())}
    print(f"{config.artefact}: {figures['removed']:,} documents removed, {figures['documents']:,} left")
    print(f"{config.artefact}/{MANIFEST}: SHA-256 {fingerprint(config.artefact)}")
    return figures
