"""Class rows of a checkpoint: loaded at any number of ranks; their files are compared with the manifest on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from harness.core.errors import UserError
from harness.core.manifest import verify
from harness.core.mesh import Mesh
from harness.train import checkpoint_tensors as tensors
from harness.train.checkpoint_reader import RowReader
from harness.train.class_rows import ClassMap, move_rows
from models.heads.class_parallel import ClassParallelHead, class_range
from models.heads.row_optimizer import RowAdamW


class DamagedRows(UserError):
    """A file of class rows has another checksum than the manifest lists."""


def require_rows(checkpoint: Path, mesh: Mesh, sums: Mapping[str, str] | None = None) -> None:
    """Compares the files of the class rows with the manifest; collective. Each rank reads its share of those that are
    in no rank's `sums` (`RowReader.sums`).

    Raises:
        DamagedRows: one differs.
    """
    if wrong := verify(checkpoint, mesh, lambda name: name.startswith("head/__"), sums):
        raise DamagedRows(f"{checkpoint}: {wrong}", "Name another checkpoint")


def load_rows(
    checkpoint: Path, head: ClassParallelHead, optimizer: RowAdamW | None, mesh: Mesh, classes: ClassMap | None
) -> None:
    """Loads rows and their optimizer state; collective. With `classes` they follow the class keys, and the files are
    not compared: `require_rows` does.

    Raises:
        DamagedRows: a file differs from the manifest; the rows have changed.
        CheckpointException: the tensors do not fit.
    """
    folder, state = checkpoint / "head", tensors.head_state(head, optimizer, mesh)
    if classes is None:
        _load_and_compare(state, checkpoint, mesh)
    else:
        # One tensor at a time in its previous ranges, so that no more than one shard lies in memory twice.
        first, last = class_range(classes.num_before, mesh.row_group.rank(), mesh.row_group.size())
        for name, into in tensors.row_tensors(head, optimizer).items():
            before = into.new_empty(last - first, *into.shape[1:])
            dcp.load({name: tensors.logical(before, classes.num_before, mesh)}, storage_reader=RowReader(folder))
            move_rows(before, into, classes, mesh.row_group)
            del state[name], before
        if state:
            dcp.load(state, storage_reader=RowReader(folder))
    if optimizer is not None:
        optimizer.log_decay = float(state["log_decay"])


def _load_and_compare(state: dict[str, Any], checkpoint: Path, mesh: Mesh) -> None:
    reader, failed = RowReader(checkpoint / "head"), None
    try:
        dcp.load(state, storage_reader=reader)
    except CheckpointException as error:  # on every rank; damage may be the reason, and has the clearer words
        failed = error
    require_rows(checkpoint, mesh, reader.sums)
    if failed is not None:
        raise failed
