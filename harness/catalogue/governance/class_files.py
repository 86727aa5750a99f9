"""The files of classes/ that training reads, whatever the classes were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from ibis import _

from harness.catalogue.classes import KINDS
from harness.catalogue.governance.config import GovernConfig
from harness.catalogue.governance.engine import Engine, row
from harness.catalogue.writers import NpyWriter
from harness.core.errors import UserError


def number_classes(kept: ibis.Table, mean: float, median: float, config: GovernConfig) -> ibis.Table:
    """The table of classes in the order of their first sample, with slots and tail.

    Args:
        kept: class_key, first_id, query_members, document_members of each class.
        mean: of query_members over `kept`.
        median: of query_members over `kept`; a class with fewer is tail.
        config: gives the exponent and the ratio of the slots.
    """
    scale = mean or 1.0
    query_slots = ibis.greatest(1, (scale * (_.query_members / scale) ** config.query_power).round().cast("int64"))
    document_slots = ibis.greatest(1, (_.query_slots * config.document_ratio).round().cast("int64"))
    # A class may lack one kind (--min-queries 0), which then gets no slots.
    return kept.mutate(
        class_id=ibis.row_number().over(order_by=[_.first_id, _.class_key]),  # classes may share a photo
        query_slots=ibis.ifelse(_.query_members == 0, 0, query_slots).cast("int64"),
        tail=_.query_members < median,
    ).mutate(document_slots=ibis.ifelse(_.document_members == 0, 0, document_slots).cast("int64"))[
        ["class_id", "class_key", "query_members", "document_members", "query_slots", "document_slots", "tail"]
    ]


def counted(members: ibis.Table, by: str) -> ibis.Table:
    """`by`, first_id (its lowest sample id), query_members, document_members of the classes of some members."""
    return members.group_by(by).agg(
        first_id=_.sample_id.min(),
        query_members=_.count(where=_.kind == "query"),
        document_members=_.count(where=_.kind == "document"),
    )


def too_small(config: GovernConfig) -> tuple[Any, Any]:
    """True for a class that is too small, and the reason in words."""
    few_queries = _.query_members < config.min_queries
    few_documents = _.document_members < config.min_documents
    queries = _.query_members.cast("string") + f" queries, --min-queries is {config.min_queries}"
    documents = _.document_members.cast("string") + f" documents, --min-documents is {config.min_documents}"
    between = ibis.ifelse(few_queries & few_documents, "; ", "")
    reason = ibis.ifelse(few_queries, queries, "") + between + ibis.ifelse(few_documents, documents, "")
    return few_queries | few_documents, reason


def hold_out(engine: Engine, keys: ibis.Table, config: GovernConfig) -> ibis.Table:
    """The rows of a table with the column class_key whose class is held out: a function of its key, so that it stays so
    while it persists.
    """
    bound = config.hold_out_classes * 2.0**64
    table = keys.to_pyarrow() if bound else keys.limit(0).to_pyarrow()
    chosen = [xxhash.xxh3_64_intdigest(key.as_py().encode()) < bound for key in table["class_key"]]
    pq.write_table(table.filter(pa.array(chosen, pa.bool_())), engine.spill / "held.parquet")
    return engine.read([engine.spill / "held.parquet"])


def nothing_left() -> UserError:
    """What --hold-out-classes can lead to."""
    return UserError("--hold-out-classes leaves no class to train on", "Lower it")


def write_arrays(engine: Engine, members: ibis.Table, stage: Path) -> None:
    """Writes the six arrays of the classes in stage/classes.parquet.

    Args:
        engine: DuckDB.
        members: class_id, sample_id, kind.
        stage: the folder that becomes classes/.
    """
    columns = [f"{kind}_{what}" for kind in KINDS for what in ("members", "slots")]
    sizes = pq.read_table(stage / "classes.parquet", columns=columns)
    for kind in KINDS:
        ordered = members.filter(_.kind == kind).order_by("class_id", "sample_id").select("sample_id")
        engine.keep(f"{kind}-members", ordered)
        with NpyWriter(stage / f"{kind}.members.npy", np.int64) as writer:
            for batch in engine.batches(f"{kind}-members", ["sample_id"], 1 << 16):
                writer.append(batch.column(0).to_numpy())
        for what, name in (("members", "member_offsets"), ("slots", "slot_offsets")):
            per_class = sizes[f"{kind}_{what}"].to_numpy()
            np.save(stage / f"{kind}.{name}.npy", np.concatenate([[0], np.cumsum(per_class)]).astype(np.int64))


def totals(classes: ibis.Table) -> dict[str, Any]:
    """num_classes, tail_classes, queries, documents, query_slots, document_slots and largest_class of the classes."""
    largest = classes.mutate(size=_.query_members + _.document_members).order_by(_.size.desc(), _.class_id).limit(1)
    sums = row(
        classes.agg(
            num_classes=_.count(),
            tail_classes=_.tail.sum(),
            queries=_.query_members.sum(),
            documents=_.document_members.sum(),
            query_slots=_.query_slots.sum(),
            document_slots=_.document_slots.sum(),
        )
    )
    return {
        **{name: int(value) for name, value in sums.items()},
        "largest_class": row(largest.select("class_id", "class_key", "query_members", "document_members")),
    }
