"""Keys of classes that persist: a class takes the key of the previous class that it shares most samples with.

Rows of the class head follow the keys (harness/train/class_rows.py), so that a class that persists keeps its row, and
history.parquet records what became of the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _

from harness.catalogue.catalogue import open_array
from harness.catalogue.classes import KINDS
from harness.catalogue.governance.engine import Engine
from harness.core.files import read_record

PREFIX = "click-"
AT_ONCE = 1 << 22  # members in memory
_SCHEMA = pa.schema([("sample_id", pa.int64()), ("previous_key", pa.string())])


def previous_classes(catalogue: Path) -> Path | None:
    """The classes to compare with: classes/, or those that the last append has put aside; None without any."""
    aside = [
        path for path in catalogue.glob("classes-*") if path.name.removeprefix("classes-").isdigit() and path.is_dir()
    ]
    aside.sort(key=lambda path: int(path.name.removeprefix("classes-")))
    found = [path for path in (*aside, catalogue / "classes") if (path / "governance.json").is_file()]
    return found[-1] if found else None


def previous_members(folder: Path | None, file: Path) -> int:
    """Writes sample_id and previous_key of the members of the classes in `folder`, held-out ones too, into `file`.

    Returns:
        The number of the next new class: no key is given twice.

    Raises:
        UserError: the arrays are damaged.
    """
    with pq.ParquetWriter(file, _SCHEMA) as writer:
        if folder is None:
            return 0
        keys = pq.read_table(folder / "classes.parquet", columns=["class_key"])["class_key"].combine_chunks()
        for kind in KINDS:
            members, offsets = (
                open_array(folder / f"{kind}.{name}.npy", np.int64, "Remove this folder, or govern again")
                for name in ("members", "member_offsets")
            )
            for start in range(0, len(members), AT_ONCE):
                some = np.asarray(members[start : start + AT_ONCE])
                classes = np.searchsorted(offsets, np.arange(start, start + len(some)), side="right") - 1
                writer.write_table(pa.table([pa.array(some), keys.take(pa.array(classes))], schema=_SCHEMA))
        if (folder / "held_out.parquet").is_file():
            held = pq.read_table(folder / "held_out.parquet", columns=["sample_id", "class_key"]).drop_null()
            writer.write_table(held.rename_columns(_SCHEMA.names).cast(_SCHEMA))
    return int(read_record(folder / "governance.json").values.get("next_class", 0))


def shared(members: ibis.Table, previous: ibis.Table) -> ibis.Table:
    """component, previous_key, samples that they share, and whether each is the other's best: best_previous, best_now.

    Args:
        members: component, sample_id.
        previous: from `previous_members`.
    """
    counts = members.inner_join(previous, "sample_id").group_by("component", "previous_key").agg(samples=_.count())

    def first(of: str, other: str) -> Any:
        window = ibis.window(group_by=of, order_by=[_.samples.desc(), _[other]])
        return ibis.row_number().over(window) == 0

    return counts.mutate(best_previous=first("component", "previous_key"), best_now=first("previous_key", "component"))


def keyed(kept: ibis.Table, shared: ibis.Table, first_number: int) -> ibis.Table:
    """component, class_key, number of the classes `kept` (component, first_id): the key of the previous class where
    each is the other's best; new keys have a number, from `first_number` on in the order of the first samples.
    """
    matched = shared.filter(_.best_previous & _.best_now).select(matched=_.component, previous_key=_.previous_key)
    found = kept.select("component", "first_id").left_join(matched, [("component", "matched")])
    order = ibis.window(group_by=found.previous_key.isnull(), order_by=[found.first_id, found.component])
    number = ibis.row_number().over(order).cast("int64") + first_number
    found = found.mutate(number=ibis.ifelse(_.previous_key.isnull(), number, ibis.null("int64")))
    return found.select(
        "component", "number", class_key=ibis.coalesce(_.previous_key, PREFIX + _.number.cast("string"))
    )


def history(keys: ibis.Table, shared: ibis.Table, previous: ibis.Table) -> ibis.Table:
    """previous_key, class_key, event, samples of every previous and every present class.

    kept: the key persists; merged: the previous class went up in another; split: the class left a previous one;
    moved: some samples changed over; new: none of its samples had a class; ended: none of its samples has one.
    """
    event = ibis.cases(
        (_.best_previous & _.best_now, "kept"), (_.best_now, "merged"), (_.best_previous, "split"), else_="moved"
    )
    both = shared.inner_join(keys.select("component", "class_key"), "component")
    both = both.select("previous_key", "class_key", event=event, samples=_.samples)
    none = ibis.null("string")
    zero = ibis.literal(0, "int64")
    new = keys.anti_join(shared, "component")
    new = new.select(previous_key=none, class_key=_.class_key, event=ibis.literal("new"), samples=zero)
    old = previous.select("previous_key").distinct().anti_join(shared, "previous_key")
    old = old.select(previous_key=_.previous_key, class_key=none, event=ibis.literal("ended"), samples=zero)
    return both.union(new).union(old)


def record(engine: Engine, kept: ibis.Table, members: ibis.Table, folder: Path | None) -> tuple[ibis.Table, int]:
    """Keys of the classes `kept` (component, first_id) with their `members` (component, sample_id), and the number of
    the next new class. Leaves the result `history` in the engine.
    """
    next_number = previous_members(folder, engine.spill / "previous.parquet")
    previous = engine.read([engine.spill / "previous.parquet"])
    own = members.semi_join(kept, "component").select("component", "sample_id")
    overlap = engine.keep("shared", shared(own, previous))
    keys = engine.keep("keys", keyed(kept, overlap, next_number))
    engine.keep("history", history(keys, overlap, previous))
    numbers = keys.agg(most=_.number.max()).to_pyarrow().to_pylist()[0]["most"]
    return keys.select("component", "class_key"), next_number if numbers is None else int(numbers) + 1
