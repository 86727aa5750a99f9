"""Files of classes/ from the results of the rules on clicks: classes, members, audit, history, held-out samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.governance import rules, stable_ids
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
from harness.core.errors import UserError

GROUP = 1 << 17  # rows of a row group


def write_files(
    engine: Engine, local: Engine, catalogue: Catalogue, config: GovernConfig, stage: Path
) -> dict[str, Any]:
    """Writes all files but governance.json and the manifest; returns the summary.

    Args:
        engine: holds the results of `harness.catalogue.governance.click_classes.apply_rules`.
        local: DuckDB, which assembles them.
        catalogue, config: as for govern.
        stage: the folder that becomes classes/.

    Raises:
        UserError: no class is left.
    """
    names = ("nodes", "rejected", "late", "dropped", "facts", "placements", "lost")
    found = {name: local.read(engine.parts(name)) for name in names}
    members = found["nodes"].inner_join(found["placements"], ["kind", "node"])
    members = local.keep("members", members.select("component", "sample_id", "kind", "node", "weight"))
    counts = local.keep("counts", _counts(members, found["facts"]))
    bad, reason = _unfit(config)
    large = counts.filter(~bad)
    sizes = row(counts.agg(n=_.count(where=~bad), all=_.count(), queries=_.query_members.max()))
    if not sizes["n"]:
        raise UserError(
            f"none of {sizes['all']:,} components of {config.clicks} is a class: none has {config.min_queries} queries "
            f"(--min-queries), {config.min_documents} documents (--min-documents) and a purity of {config.min_purity} "
            "(--min-purity)",
            f"The most queries are {sizes['queries']}",
        )
    folder = stable_ids.previous_classes(catalogue.path)
    keys, next_class = stable_ids.record(local, large.select("component", "first_id"), members, folder)
    held = hold_out(local, keys, config).select("component")
    kept = large.inner_join(keys, "component").anti_join(held, "component")
    figures = row(kept.agg(classes=_.count(), mean=_.query_members.mean(), median=_.query_members.median()))
    if not figures["classes"]:
        raise nothing_left()
    numbered = local.keep("numbered", number_classes(kept, figures["mean"], figures["median"], config))
    ids = kept.select("component", "class_key").inner_join(numbered.select("class_key", "class_id"), "class_key")
    trained = local.keep("trained", members.inner_join(ids, "component"))
    samples = local.read(catalogue.sample_files).select("sample_id", catalogue_key=_.class_key)
    _export(local, _with_catalogue_keys(numbered, trained, samples), stage / "classes.parquet", ["class_id"])
    write_arrays(local, trained, stage)
    _export(local, _members(trained), stage / "members.parquet", ["class_id", "kind", "sample_id"])
    _export(local, _facts(counts, ids), stage / "facts.parquet", ["class_id"])
    _export(local, _dropped(found["dropped"]), stage / "dropped_edges.parquet", ["query", "document"])
    everything = ["query", "document", "reason", "clicks", "impressions", "time"]
    _export(local, found["rejected"], stage / "rejected_clicks.parquet", everything)
    history = local.read(local.parts("history"))
    _export(local, history, stage / "history.parquet", ["previous_key", "class_key"])
    out = local.keep("held-out", _held_out(members, held.inner_join(keys, "component"), found))
    _export(local, out, stage / "held_out.parquet", ["sample_id"])
    unfit = counts.filter(bad).select("component", unfit=reason)
    left = local.keep("left", found["nodes"].anti_join(trained, "sample_id").anti_join(out, "sample_id"))
    why = local.keep("why", _why(left, members, unfit))  # one join of everything at a time is in memory
    _export(local, _quarantine(why, found["lost"]), stage / "quarantine.parquet", ["sample_id"])
    summary = totals(local.read([stage / "classes.parquet"]))
    largest = summary.pop("largest_class")
    inside = row(counts.inner_join(ids, "component").agg(clicks=rules.total(_.clicks), asked=rules.total(_.asked)))
    return {
        **summary,
        "quarantined_classes": row(counts.agg(n=_.count(where=bad)))["n"],
        "quarantined_samples": pq.read_metadata(stage / "quarantine.parquet").num_rows,
        "largest_class": largest,
        "purity": round((inside["clicks"] or 0) / max(inside["asked"] or 0, 1), 6),
        "next_class": next_class,
        "history": _by(history, "event"),
        "held_out": {
            "classes": row(held.agg(n=_.count()))["n"],
            "samples": pq.read_metadata(stage / "held_out.parquet").num_rows,
        },
    }


def _counts(members: ibis.Table, facts: ibis.Table) -> ibis.Table:
    """component, first_id, query_members, document_members, items (document ids), edges, clicks, asked, similarity,
    purity (millionths) of every component.
    """
    sizes = counted(members, "component")
    items = members.filter(_.kind == "document").group_by("component").agg(items=_.node.nunique())
    found = sizes.left_join(items, "component").drop("component_right")
    found = found.left_join(facts, "component").drop("component_right")
    zero = {name: _[name].fill_null(0) for name in ("items", "edges", "clicks", "asked")}
    found = found.mutate(**zero)
    return found.mutate(purity=(_.clicks * rules.MILLION // ibis.greatest(_.asked, 1)).cast("int64"))


def _unfit(config: GovernConfig) -> tuple[Any, Any]:
    """True for a component that is not a class, and the reason."""
    small, small_reason = too_small(config)
    large = _["items"] > config.max_documents
    impure = _.purity < rules.ppm(config.min_purity)
    percent = (_.purity // 10_000).cast("int64").cast("string")
    reason = ibis.cases(
        (small, small_reason),
        (large, _["items"].cast("string") + f" document ids, --max-documents is {config.max_documents}"),
        else_=percent + f" % of its queries' clicks fall into it, --min-purity is {config.min_purity}",
    )
    return small | large | impure, reason


def _with_catalogue_keys(numbered: ibis.Table, trained: ibis.Table, samples: ibis.Table) -> ibis.Table:
    """The classes with the class column's values of their documents: what was trained on, in the catalogue's terms."""
    own = trained.filter(_.kind == "document").inner_join(samples, "sample_id")
    own = own.filter(_.catalogue_key.notnull()).select("class_id", "catalogue_key").distinct()
    own = own.group_by("class_id").agg(catalogue_keys=_.catalogue_key.collect(order_by=_.catalogue_key))
    return numbered.left_join(own, "class_id").drop("class_id_right")


def _members(trained: ibis.Table) -> ibis.Table:
    return trained.select("class_id", "class_key", "sample_id", "kind", weight=_share(_.weight))


def _facts(counts: ibis.Table, ids: ibis.Table) -> ibis.Table:
    found = counts.inner_join(ids, "component")
    return found.select(
        "class_id", "class_key", "edges", "clicks", purity=_share(_.purity), similarity=_share(_.similarity)
    )


def _dropped(dropped: ibis.Table) -> ibis.Table:
    reason = ibis.cases(*((_.rule == place, name) for place, name in enumerate(rules.RULES) if name))
    return dropped.select(
        "query", "document", "clicks", "impressions",
        support=_share(_.support), similarity=_share(_.similarity), reason=reason,
    )  # fmt: skip


def _share(millionths: Any) -> Any:
    return millionths.cast("float64") / float(rules.MILLION)


def _held_out(members: ibis.Table, held: ibis.Table, found: dict[str, ibis.Table]) -> ibis.Table:
    """sample_id, kind, class_key, reason of the samples that are held out: by class, or by time."""
    by_class = members.inner_join(held, "component").select("sample_id", "kind", "class_key")
    late = found["nodes"].filter(_.kind == "query").semi_join(found["late"], [("node", "query")])
    by_time = late.select("sample_id", "kind", class_key=ibis.null("string"), reason=ibis.literal("time"))
    return by_class.mutate(reason=ibis.literal("class")).union(by_time)


def _why(left: ibis.Table, members: ibis.Table, unfit: ibis.Table) -> ibis.Table:
    """The samples `left`, which are in no class, with `unfit`: why their component is not one, or null."""
    why = members.inner_join(unfit, "component").select(unfit_sample=_.sample_id, unfit=_.unfit)
    return left.left_join(why, [("sample_id", "unfit_sample")]).drop("unfit_sample")


def _quarantine(why: ibis.Table, lost: ibis.Table) -> ibis.Table:
    """sample_id, class_key (null), reason of the samples in no class."""
    found = why.left_join(
        lost.select(lost_kind=_.kind, lost=_.node, rule=_.rule), [("kind", "lost_kind"), ("node", "lost")]
    )
    dropped = [(_.rule == place, f"its edges were dropped: {name}") for place, name in enumerate(rules.RULES) if name]
    reason = ibis.cases((_.unfit.notnull(), _.unfit), *dropped, else_="no clicks")
    return found.select("sample_id", class_key=ibis.null("string"), reason=reason)


def _by(table: ibis.Table, column: str) -> dict[str, int]:
    counts = table.group_by(column).agg(n=_.count()).to_pyarrow().to_pylist()
    return {entry[column]: entry["n"] for entry in sorted(counts, key=lambda entry: entry[column])}


def _export(local: Engine, table: ibis.Table, file: Path, order: list[str]) -> None:
    """Writes `table` in that order, in row groups of one size: the same rows give the same bytes on every engine."""
    name = file.stem + "-ordered"
    local.keep(name, table.order_by(order))
    schema = pa.schema([pa.field(field.name, field.type) for field in pq.read_schema(local.parts(name)[0])])
    with pq.ParquetWriter(file, schema) as writer:
        pending = schema.empty_table()
        for batch in local.batches(name, None, GROUP):
            pending = pa.concat_tables([pending, pa.Table.from_batches([batch]).cast(schema)])
            while len(pending) >= GROUP:
                writer.write_table(pending.slice(0, GROUP), GROUP)
                pending = pending.slice(GROUP)
        if len(pending):
            writer.write_table(pending, GROUP)
