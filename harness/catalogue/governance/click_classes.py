"""Classes from a click log: the rules in their order, then the files of classes/."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import ibis
from ibis import _

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.governance import clicks, rules
from harness.catalogue.governance.click_files import write_files
from harness.catalogue.governance.components import components
from harness.catalogue.governance.config import GovernConfig
from harness.catalogue.governance.engine import Engine, SparkEngine, row
from harness.catalogue.governance.relations import related
from harness.catalogue.governance.similarity import Similarities
from harness.catalogue.governance.split import bounded
from harness.core.errors import UserError


def write(catalogue: Catalogue, config: GovernConfig, stage: Path, spill: Path) -> dict[str, Any]:
    """Writes the files of classes/ but governance.json and the manifest; returns the summary.

    Raises:
        UserError: a table cannot be used, or nothing is left.
    """
    engine = _engine(config, spill)
    try:
        figures = apply_rules(engine, catalogue, config)
        if not isinstance(engine, SparkEngine):
            return {"source": "clicks", **write_files(engine, engine, catalogue, config, stage), **figures}
        (spill / "files").mkdir()
        local = Engine(spill / "files", config.memory)
        try:  # the arrays are files of this machine
            return {"source": "clicks", **write_files(engine, local, catalogue, config, stage), **figures}
        finally:
            local.close()
    finally:
        engine.close()


def _engine(config: GovernConfig, spill: Path) -> Engine:
    if config.engine == "spark":
        return SparkEngine(spill, config.memory, config.master)
    return Engine(spill, config.memory)


def apply_rules(engine: Engine, catalogue: Catalogue, config: GovernConfig) -> dict[str, Any]:
    """Leaves the results nodes, rejected, late, dropped, facts, placements and lost in the engine.

    Returns:
        rows and edges by result, components, relations and embeddings where they are given.

    Raises:
        UserError: a table cannot be used, or no edge is left.
    """
    assert config.clicks is not None
    until = clicks.seconds_of(config.until) if config.until else None
    if config.until and until is None:
        raise UserError(f"--until is {config.until!r}", "Write a date, as 2026-11-28, or seconds since 1970")
    log = clicks.open_log(config.clicks, engine.spill / "log.parquet")
    if until is not None and "time" not in log.columns:
        raise UserError(f"{config.clicks} has no column time, which --until compares", "Leave out --until")
    samples = engine.read(catalogue.sample_files).select("sample_id", "kind", "item", "split")
    engine.keep("nodes", clicks.nodes(samples, log, config.split))
    rows = engine.keep("checked", clicks.checked(engine.read(log.files), samples, log, config.split, until))
    engine.keep("rejected", clicks.rejected(rows))
    by_result = clicks.by_result(rows)
    _require_rows(config, by_result)
    used = rows.filter(_.reason == "").select("query").distinct()
    late = rows.filter(_.reason == "after --until").select("query").distinct()
    engine.keep("late", late.anti_join(used, "query"))
    pairs = engine.keep("pairs", rules.pairs(rows))
    figures: dict[str, Any] = {"rows": _rows(by_result, pairs), "rows_backwards": clicks.rows_backwards(log)}
    edges = engine.keep("edges", rules.edges(pairs, config))
    if not isinstance(engine, SparkEngine):  # where it would take as long as all rules
        figures["before"] = _before(engine, edges, catalogue.num_samples)
    hot = engine.keep("hot", rules.hot(edges, config))
    judged = engine.keep("judged", rules.judged(edges, hot, config))
    passing = judged.filter(_.rule == 0).drop("rule")
    if config.embeddings:
        engine.keep("passing", passing)
        vectors = Similarities(config.embeddings, catalogue.num_samples, engine.spill / "vectors.npy")
        passing = engine.read(vectors.add(engine, "passing", "similar"))
        figures["embeddings"] = {"samples": vectors.known}
    else:
        passing = passing.mutate(similarity=ibis.null("int64"))
    passing = rules.alike(passing, config)
    found = engine.keep("candidates", rules.candidates(passing, config))
    links = engine.keep("links", rules.links(found, config))
    joined, figures["relations"] = related(engine, config, samples)
    strong = engine.keep("strong", rules.strong(links, joined, config))
    labels, figures["components"] = bounded(
        engine, strong, catalogue.num_samples, config.max_documents, config.min_overlap, config.split_step
    )
    placed = engine.keep("placed", rules.placed(found, labels))
    votes = engine.keep("votes", rules.votes(placed, config))
    outside = rules.outside(placed, votes, links, config)
    dropped = engine.keep("dropped", rules.dropped(judged, passing, outside))
    facts = engine.keep("facts", rules.facts(judged, placed, votes, labels))
    engine.keep("placements", rules.placements(placed, votes, labels))
    engine.keep("lost", rules.lost(dropped))
    figures["components"]["links"] = row(strong.agg(n=_.count()))["n"]
    figures["edges"] = _edges(facts, dropped, config)
    return figures


def _before(engine: Engine, edges: ibis.Table, num_nodes: int) -> dict[str, Any]:
    """Samples connected by all clicks, before the rules: components, largest, and sizes, which count components by
    their queries and documents.
    """
    label = components(engine, "connected", edges.select(a="query", b="document"), num_nodes)
    sizes = label.group_by("component").agg(n=_.count()).group_by("n").agg(times=_.count()).to_pyarrow().to_pylist()
    found: Counter[str] = Counter()
    for entry in sorted(sizes, key=lambda entry: entry["n"]):
        bound = 1 << (entry["n"] - 1).bit_length()
        found[f"{bound // 2 + 1}-{bound}" if bound > 2 else str(entry["n"])] += entry["times"]
    return {
        "components": found.total(),
        "largest": max((entry["n"] for entry in sizes), default=0),
        "sizes": dict(found),
    }


def _require_rows(config: GovernConfig, by_result: dict[str, int]) -> None:
    """Raises UserError where no row can be used."""
    if not by_result:
        raise UserError(f"{config.clicks} has no rows", "Name a click log that has some (--clicks)")
    if "" not in by_result:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in list(by_result.items())[:5])
        raise UserError(
            f"none of the {sum(by_result.values()):,} rows of {config.clicks} can be used ({reasons})",
            "query and document are the ids of the manifest's id column",
        )


def _rows(by_result: dict[str, int], pairs: ibis.Table) -> dict[str, int]:
    used = row(pairs.agg(used=rules.total(_.rows)))["used"]
    return {"used": used, "repeated": by_result[""] - used, **{name: n for name, n in by_result.items() if name}}


def _edges(facts: ibis.Table, dropped: ibis.Table, config: GovernConfig) -> dict[str, int]:
    """Edges by result.

    Raises:
        UserError: none is kept.
    """
    kept = row(facts.agg(n=rules.total(_.edges)))["n"] or 0
    counts = {entry["rule"]: entry["n"] for entry in dropped.group_by("rule").agg(n=_.count()).to_pyarrow().to_pylist()}
    found = {rules.RULES[rule]: counts[rule] for rule in sorted(counts)}
    if not kept:
        said = ", ".join(f"{name} {count:,}" for name, count in found.items()) or "no row has a click"
        raise UserError(
            f"no edge of {config.clicks} is left ({said})", "Lower the thresholds of these rules (docs/governance.md)"
        )
    return {"kept": int(kept), **found}
