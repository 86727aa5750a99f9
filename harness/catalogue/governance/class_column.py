"""Classes by the class column, and by the pairs of queries and the documents that answer them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
from ibis import _

from harness.catalogue.catalogue import ALL_SPLITS, Catalogue
from harness.catalogue.governance.class_files import (
    counted,
    hold_out,
    nothing_left,
    number_classes,
    too_small,
    totals,
    write_arrays,
)
from harness.catalogue.governance.config import GovernConfig
from harness.catalogue.governance.engine import Engine, row
from harness.catalogue.pairs import Pairs
from harness.core.errors import UserError


def with_answers(samples: ibis.Table, pairs: Pairs) -> ibis.Table:
    """sample_id, kind, class_key of the samples, and of their queries with the classes of their right answers."""
    right = ibis.memtable(pa.table({name: pa.array(column) for name, column in vars(pairs).items()})).filter(
        _.grade > 0
    )
    queries = samples.filter(_.kind == "query").select("sample_id", "kind", query=_.sample_id)
    documents = samples.filter(_.kind == "document").select("class_key", document=_.sample_id)
    more = right.inner_join(queries, "query").inner_join(documents, "document").select(*samples.columns)
    return samples.filter(_.class_key.notnull()).union(more.filter(_.class_key.notnull()), distinct=True)


def quarantine(samples: ibis.Table, members: ibis.Table, counts: ibis.Table, config: GovernConfig) -> ibis.Table:
    """sample_id, class_key, reason of each class that is too small (sample_id -1) and of each sample that is a member
    of none.
    """
    small, reason = too_small(config)
    classes = counts.filter(small).select(sample_id=ibis.literal(-1, "int64"), class_key=_.class_key, reason=reason)
    classless = samples.filter(_.class_key.isnull())
    if members is not samples:
        classless = classless.anti_join(members, "sample_id")
    classless = classless.select(sample_id=_.sample_id, class_key=_.class_key, reason=ibis.literal("no class"))
    return classes.union(classless)


def write(catalogue: Catalogue, config: GovernConfig, stage: Path, spill: Path) -> dict[str, Any]:
    """Writes classes.parquet, the arrays, quarantine.parquet and, with --hold-out-classes, held_out.parquet;
    returns the summary.

    Raises:
        UserError: no class is large enough, or all are held out.
    """
    engine = Engine(spill, config.memory)
    try:
        return _write(engine, catalogue, config, stage)
    finally:
        engine.close()


def _write(engine: Engine, catalogue: Catalogue, config: GovernConfig, stage: Path) -> dict[str, Any]:
    samples = engine.read(catalogue.sample_files)
    samples = samples.filter(_.split.isin([config.split, ALL_SPLITS])).select("sample_id", "kind", "class_key")
    pairs, all_members = Pairs.open(catalogue.path), samples
    if pairs is not None:
        all_members = engine.keep("with-answers", with_answers(samples, pairs))
    found: dict[str, Any] = {}
    if config.hold_out_classes:
        held, found["held_out"] = _hold_out(engine, all_members, config, stage / "held_out.parquet")
        # A query photo of a held-out class is in no other class either.
        samples, all_members = (table.anti_join(held, "sample_id") for table in (samples, all_members))
    counts = engine.keep("counts", counted(all_members.filter(_.class_key.notnull()), "class_key"))
    small, _reason = too_small(config)
    kept = counts.filter(~small)
    figures = row(kept.agg(classes=_.count(), mean=_.query_members.mean(), median=_.query_members.median()))
    if figures["classes"] == 0:
        if found.get("held_out", {}).get("samples") and not row(counts.agg(classes=_.count()))["classes"]:
            raise nothing_left()
        _refuse_empty(catalogue, counts, config)
    numbered = number_classes(kept, figures["mean"], figures["median"], config)
    engine.write(numbered.order_by("class_id"), stage / "classes.parquet")
    rejected = quarantine(samples, all_members, counts, config).order_by("sample_id", "class_key")
    engine.write(rejected, stage / "quarantine.parquet")
    classes = engine.read([stage / "classes.parquet"])
    members = all_members.inner_join(classes.select("class_key", "class_id"), "class_key")
    write_arrays(engine, members, stage)
    rejects = row(
        engine.read([stage / "quarantine.parquet"]).agg(
            quarantined_classes=_.count(where=_.sample_id < 0), quarantined_samples=_.count(where=_.sample_id >= 0)
        )
    )
    found |= totals(classes)
    largest = found.pop("largest_class")
    return {**found, **{name: int(value) for name, value in rejects.items()}, "largest_class": largest}


def _hold_out(
    engine: Engine, members: ibis.Table, config: GovernConfig, file: Path
) -> tuple[ibis.Table, dict[str, int]]:
    """The samples of classes that are held out, which `file` lists, and their number."""
    keys = hold_out(engine, members.filter(_.class_key.notnull()).select("class_key").distinct(), config)
    held = engine.keep("held-out", members.semi_join(keys, "class_key"))
    engine.write(held.mutate(reason=ibis.literal("class")).order_by("sample_id", "class_key"), file)
    figures = row(held.agg(classes=_.class_key.nunique(), samples=_.count()))
    return held, {name: int(value) for name, value in figures.items()}


def _refuse_empty(catalogue: Catalogue, counts: ibis.Table, config: GovernConfig) -> None:
    found = row(counts.agg(classes=_.count(), queries=_.query_members.max(), documents=_.document_members.max()))
    splits = ", ".join(f"{name} ({count:,})" for name, count in catalogue.meta["counts"]["splits"].items())
    largest = f"; the most are {found['queries']} and {found['documents']}" if found["classes"] else ""
    raise UserError(
        f"none of {found['classes']:,} classes in split {config.split!r} of {catalogue.path} has at least "
        f"{config.min_queries} queries (--min-queries) and {config.min_documents} documents (--min-documents){largest}",
        f"The splits are {splits}",
    )
