"""Map of current class ids to a checkpoint's, by class key: head rows follow their classes when a catalogue has grown.

Class ids are positions in an order, and change with it; keys are the user's and do not.
"""

from __future__ import annotations

import filecmp
import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ibis
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from ibis import _
from torch import Tensor
from torch.distributed import ProcessGroup

from harness.core.errors import UserError
from harness.core.mesh import Mesh
from harness.core.waiting import on_first_rank
from models.heads.class_parallel import rows_per_rank

NEW = -1
AT_ONCE = 1 << 28  # bytes of rows that a rank sends at most in one round of `move_rows`


@dataclass(frozen=True)
class ClassMap:
    """This rank's part of the map from the classes of before to those of now.

    source: int64 [n], for each class of this rank's range the class id that it had, NEW where it had none;
    num_before, kept, new, dropped: classes over all ranks.
    """

    source: Tensor
    num_before: int
    kept: int
    new: int
    dropped: int


def class_map(before: Path, now: Path, mesh: Mesh) -> ClassMap | None:
    """Compares two classes.parquet by key; collective. None where every class has kept its id and there is no other.

    The first rank joins them and every rank gets its own range: no rank but the first ever holds a number for every
    class.
    """
    ids: np.ndarray = np.empty(0, dtype=np.int64)

    def compare() -> list[int]:
        nonlocal ids
        if filecmp.cmp(before, now, shallow=False):
            return [0, 0, 0]
        ids = _ids_before(before, now)
        facts = [pq.read_metadata(before).num_rows, len(ids), int((ids != NEW).sum())]
        same = facts == [len(ids)] * 3 and (ids == np.arange(len(ids))).all()
        return [0, 0, 0] if same else facts

    num_before, num_now, kept = on_first_rank(compare, mesh, "comparing the classes")
    if not num_now:
        return None
    per_rank = rows_per_rank(num_now, mesh.row_group.size())
    source = torch.full((per_rank,), NEW, dtype=torch.int64, device=mesh.device)
    parts = None
    if mesh.rank == 0:
        padded = np.full(per_rank * mesh.row_group.size(), NEW)
        padded[:num_now] = ids
        parts = list(torch.from_numpy(padded).to(mesh.device).split(per_rank))
    dist.scatter(source, parts, group=mesh.row_group)
    start = mesh.row_group.rank() * per_rank
    own = source[: max(0, min(per_rank, num_now - start))]
    return ClassMap(own, num_before, kept, num_now - kept, num_before - kept)


def move_rows(before: Tensor, into: Tensor, classes: ClassMap, group: ProcessGroup) -> None:
    """Sets into[i] to the row of class `classes.source[i]`, and leaves rows of new classes as they are; collective.

    In rounds, each rank asking the owners for a bounded number of rows, so that no rank ever holds more than its own
    and AT_ONCE bytes.

    Args:
        before: this rank's shard, in torch.chunk's ranges, of a tensor with a row for each of the classes of before.
        into: this rank's shard of the same with a row for each class of now; contiguous.
        classes: the map between them.
        group: the ranks that share the rows.
    """
    size = group.size()
    per_rank = rows_per_rank(classes.num_before, size)
    own_first = group.rank() * per_rank
    width = math.prod(into.shape[1:])
    served, filled = (t.view(len(t), width).view(torch.uint8) for t in (before.contiguous(), into))
    places = (classes.source != NEW).nonzero()[:, 0]
    at_once = max(1, AT_ONCE // (max(1, filled.shape[1]) * size))  # all ranks may ask the same one
    rounds = torch.tensor(-(-len(places) // at_once), device=into.device)
    dist.all_reduce(rounds, dist.ReduceOp.MAX, group=group)
    for number in range(int(rounds)):
        place = places[number * at_once : (number + 1) * at_once]
        owner = classes.source[place] // per_rank
        order = owner.argsort()
        place = place[order]
        wanted, asked = classes.source[place], torch.bincount(owner, minlength=size)
        asking = torch.empty_like(asked)
        dist.all_to_all_single(asking, asked, group=group)
        out, back = asked.tolist(), asking.tolist()
        ids = wanted.new_empty(sum(back))
        dist.all_to_all_single(ids, wanted, back, out, group=group)
        rows = served.new_empty(len(place), served.shape[1])
        dist.all_to_all_single(rows, served[ids - own_first], out, back, group=group)
        filled[place] = rows


def keep_classes(catalogue: Path, order_id: str, run: Path) -> Path:
    """Copies the catalogue's classes.parquet into the run folder: checkpoints must name the classes that the run trains
    on, also when the catalogue is governed anew meanwhile. Returns the copy.

    Raises:
        UserError: the catalogue was governed anew since its order was opened, or the run folder cannot be written.
    """
    classes, kept = catalogue / "classes", run / "classes.parquet"
    try:
        run.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(classes / "classes.parquet", kept.with_suffix(".tmp"))
        if json.loads((classes / "governance.json").read_text())["order_id"] != order_id:
            raise UserError(f"{catalogue} was governed anew just now", "Start again")
        kept.with_suffix(".tmp").replace(kept)
    except OSError as error:
        raise UserError(f"run folder {run}: {error}", "Choose another --run-dir") from error
    return kept


def _ids_before(before: Path, now: Path) -> np.ndarray:
    """For each class of `now` its class id in `before`, NEW where it has none: int64 [classes of now]. Spills to disk."""
    ids = np.full(pq.read_metadata(now).num_rows, NEW, dtype=np.int64)
    with tempfile.TemporaryDirectory() as spill:
        engine = ibis.duckdb.connect(temp_directory=spill)
        try:
            was = engine.read_parquet(before).select("class_key", was=_.class_id)
            both = engine.read_parquet(now).select("class_key", "class_id").inner_join(was, "class_key")
            engine.to_parquet(both.select("class_id", "was"), Path(spill) / "both.parquet")
        finally:
            engine.disconnect()
        with pq.ParquetFile(Path(spill) / "both.parquet") as file:
            for batch in file.iter_batches():
                ids[batch["class_id"].to_numpy()] = batch["was"].to_numpy()
    if len(ids) and not NEW <= ids.min() <= ids.max() < pq.read_metadata(before).num_rows:
        raise UserError(f"{before} is damaged (class ids)", "Name another checkpoint")
    return ids
