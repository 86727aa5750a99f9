"""`shelfmark govern`: Turn a catalogue's samples into training classes.

The rules are relational queries, written once as Ibis expressions; DuckDB runs them here, embedded, spilling to disk.
Every result leaves the engine as a Parquet file, so that memory does not grow with the catalogue.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _

from harness.catalogue.catalogue import ALL_SPLITS, Catalogue, nearest_first
from harness.catalogue.classes import GOVERNANCE_FORMAT, KINDS, order_id
from harness.catalogue.pairs import Pairs
from harness.catalogue.wholeness import require_whole
from harness.catalogue.writers import NpyWriter
from harness.core.errors import UserError
from harness.core.files import write_json
from harness.core.manifest import write_manifest
from harness.core.staged_folder import staged_folder
from models.ranges import ClosedUnitInterval, NonNegativeInt, PositiveFloat

EXAMPLE = "shelfmark govern catalogues/products --split train --min-queries 2"


@dataclass(frozen=True, kw_only=True)
class GovernConfig:
    """Groups the samples of one split into classes and gives each class its slots per epoch; writes classes/.

    A class that is too small, and a sample without class, is listed with its reason in classes/quarantine.parquet. A
    query photo is also a member of the classes of the documents that answer it (`shelfmark pairs`).

    Args:
        catalogue: the catalogue folder; an existing classes/ in it is replaced.
        split: the split to train on; samples of split 'all' belong to it.
        min_queries: fewest query samples a class needs.
        min_documents: fewest document samples a class needs.
        query_power: exponent of the class sizes in an epoch: 1 shows every query once, 0 shows all classes equally
            often.
        document_ratio: document samples shown per query sample of a class.
    """

    catalogue: Path = field(kw_only=False)
    split: str = "train"
    min_queries: NonNegativeInt = 1
    min_documents: NonNegativeInt = 1
    query_power: ClosedUnitInterval = 0.5
    document_ratio: PositiveFloat = 1.0


def with_answers(samples: ibis.Table, pairs: Pairs) -> ibis.Table:
    """sample_id, kind, class_key of the samples, and of their queries with the classes of their right answers."""
    right = ibis.memtable(pa.table({name: pa.array(column) for name, column in vars(pairs).items()})).filter(
        _.grade > 0
    )
    queries = samples.filter(_.kind == "query").select("sample_id", "kind", query=_.sample_id)
    documents = samples.filter(_.kind == "document").select("class_key", document=_.sample_id)
    more = right.inner_join(queries, "query").inner_join(documents, "document").select(*samples.columns)
    return samples.filter(_.class_key.notnull()).union(more.filter(_.class_key.notnull()), distinct=True)


def count_members(samples: ibis.Table) -> ibis.Table:
    """class_key, first_id (its lowest sample id), query_members, document_members of the samples that have a class."""
    return (
        samples.filter(_.class_key.notnull())
        .group_by("class_key")
        .agg(
            first_id=_.sample_id.min(),
            query_members=_.count(where=_.kind == "query"),
            document_members=_.count(where=_.kind == "document"),
        )
    )


def large_enough(counts: ibis.Table, config: GovernConfig) -> ibis.Table:
    """The rows of `count_members` that become classes."""
    return counts.filter(_.query_members >= config.min_queries, _.document_members >= config.min_documents)


def number_classes(kept: ibis.Table, mean: float, median: float, config: GovernConfig) -> ibis.Table:
    """The table of classes in the order of their first sample, with slots and tail.

    Args:
        kept: from `large_enough`.
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


def quarantine(samples: ibis.Table, members: ibis.Table, counts: ibis.Table, config: GovernConfig) -> ibis.Table:
    """sample_id, class_key, reason of each class that is too small (sample_id -1) and of each sample that is a member
    of none.
    """
    few_queries = _.query_members < config.min_queries
    few_documents = _.document_members < config.min_documents
    queries = _.query_members.cast("string") + f" queries, --min-queries is {config.min_queries}"
    documents = _.document_members.cast("string") + f" documents, --min-documents is {config.min_documents}"
    between = ibis.ifelse(few_queries & few_documents, "; ", "")
    reason = ibis.ifelse(few_queries, queries, "") + between + ibis.ifelse(few_documents, documents, "")
    classes = counts.filter(few_queries | few_documents).select(
        sample_id=ibis.literal(-1, "int64"), class_key=_.class_key, reason=reason
    )
    classless = samples.filter(_.class_key.isnull())
    if members is not samples:
        classless = classless.anti_join(members, "sample_id")
    classless = classless.select(sample_id=_.sample_id, class_key=_.class_key, reason=ibis.literal("no class"))
    return classes.union(classless)


def run(config: GovernConfig) -> dict[str, Any]:
    """Governs the catalogue and prints a summary.

    Returns:
        num_classes, tail_classes, queries, documents, query_slots, document_slots, quarantined_classes,
        quarantined_samples (those without class), largest_class, order_id.

    Raises:
        UserError: an option out of range, an unknown or empty split, or no class large enough.
    """
    catalogue = Catalogue(config.catalogue)
    require_whole(catalogue, folders=("pairs",))
    _check_split(catalogue, config.split)
    try:
        with staged_folder(catalogue.path / "classes", replace=True) as stage:
            summary = _govern(catalogue, config, stage)
    except duckdb.Error as error:  # a file that it cannot read or write, or too little memory
        reason = str(error).partition("\n")[0]
        raise UserError(f"{catalogue.path} cannot be governed: {reason}", "Its previous classes are kept") from error
    largest = summary["largest_class"]
    print(
        f"{config.catalogue}/classes: {summary['num_classes']:,} classes of {summary['queries']:,} queries and "
        f"{summary['documents']:,} documents; {summary['tail_classes']:,} (tail) have fewer queries than the median\n"
        f"an epoch shows {summary['query_slots']:,} queries and {summary['document_slots']:,} documents; the largest "
        f"class is {largest['class_key']!r} with {largest['query_members']:,} and {largest['document_members']:,}\n"
        f"not trained: {summary['quarantined_classes']:,} classes with too few queries or documents, "
        f"{summary['quarantined_samples']:,} samples without a class (classes/quarantine.parquet has them)"
    )
    if summary["num_classes"] == 1:
        print("There is one class only: training has nothing to tell apart. Check ingest's --class-column")
    return summary


def _govern(catalogue: Catalogue, config: GovernConfig, stage: Path) -> dict[str, Any]:
    """Writes the files of classes/ into `stage`; returns the summary."""
    spill = stage / "spill"
    spill.mkdir()
    engine = ibis.duckdb.connect(temp_directory=str(spill))
    try:
        summary = _write_classes(engine, catalogue, config, stage, spill)
    finally:
        engine.disconnect()
    shutil.rmtree(spill)
    summary["order_id"] = order_id(stage)
    options = {name: value for name, value in asdict(config).items() if name != "catalogue"}
    governance = {"format": GOVERNANCE_FORMAT, **summary, "options": options}
    write_json(stage / "governance.json", governance)
    write_manifest(stage)
    return summary


def _check_split(catalogue: Catalogue, split: str) -> None:
    splits: dict[str, int] = catalogue.meta["counts"]["splits"]
    # A catalogue without splits belongs to every split; in others an unknown name is a mistake.
    if split not in splits and set(splits) != {ALL_SPLITS}:
        there = ", ".join(f"{name} ({splits[name]:,})" for name in nearest_first(split, splits))
        raise UserError(f"no sample of {catalogue.path} is in split {split!r} (--split)", f"The splits are {there}")


def _write_classes(engine: Any, catalogue: Catalogue, config: GovernConfig, stage: Path, spill: Path) -> dict[str, Any]:
    samples = engine.read_parquet([str(file) for file in catalogue.sample_files])
    samples = samples.filter(_.split.isin([config.split, ALL_SPLITS])).select("sample_id", "kind", "class_key")
    pairs, all_members = Pairs.open(catalogue.path), samples
    if pairs is not None:
        engine.to_parquet(with_answers(samples, pairs), spill / "with-answers.parquet")
        all_members = engine.read_parquet(spill / "with-answers.parquet")
    engine.to_parquet(count_members(all_members), spill / "counts.parquet")
    counts = engine.read_parquet(spill / "counts.parquet")
    kept = large_enough(counts, config)
    figures = _row(kept.agg(classes=_.count(), mean=_.query_members.mean(), median=_.query_members.median()))
    if figures["classes"] == 0:
        _refuse_empty(catalogue, counts, config)
    numbered = number_classes(kept, figures["mean"], figures["median"], config)
    engine.to_parquet(numbered.order_by("class_id"), stage / "classes.parquet")
    rejected = quarantine(samples, all_members, counts, config).order_by("sample_id", "class_key")
    engine.to_parquet(rejected, stage / "quarantine.parquet")

    classes = engine.read_parquet(stage / "classes.parquet")
    members = all_members.inner_join(classes.select("class_key", "class_id"), "class_key")
    columns = [f"{kind}_{what}" for kind in KINDS for what in ("members", "slots")]
    sizes = pq.read_table(stage / "classes.parquet", columns=columns)
    for kind in KINDS:
        ordered = members.filter(_.kind == kind).order_by("class_id", "sample_id").select("sample_id")
        engine.to_parquet(ordered, spill / "members.parquet")
        with (
            pq.ParquetFile(spill / "members.parquet") as file,
            NpyWriter(stage / f"{kind}.members.npy", np.int64) as writer,
        ):
            for batch in file.iter_batches():
                writer.append(batch.column(0).to_numpy())
        for what, name in (("members", "member_offsets"), ("slots", "slot_offsets")):
            per_class = sizes[f"{kind}_{what}"].to_numpy()
            np.save(stage / f"{kind}.{name}.npy", np.concatenate([[0], np.cumsum(per_class)]).astype(np.int64))

    largest = classes.mutate(size=_.query_members + _.document_members).order_by(_.size.desc(), _.class_id).limit(1)
    totals = _row(
        classes.agg(
            num_classes=_.count(),
            tail_classes=_.tail.sum(),
            queries=_.query_members.sum(),
            documents=_.document_members.sum(),
            query_slots=_.query_slots.sum(),
            document_slots=_.document_slots.sum(),
        )
    )
    rejects = _row(
        engine.read_parquet(stage / "quarantine.parquet").agg(
            quarantined_classes=_.count(where=_.sample_id < 0), quarantined_samples=_.count(where=_.sample_id >= 0)
        )
    )
    return {
        **{name: int(value) for name, value in {**totals, **rejects}.items()},
        "largest_class": _row(largest.select("class_id", "class_key", "query_members", "document_members")),
    }


def _row(table: ibis.Table) -> dict[str, Any]:
    (row,) = table.to_pyarrow().to_pylist()
    return row


def _refuse_empty(catalogue: Catalogue, counts: ibis.Table, config: GovernConfig) -> None:
    found = _row(counts.agg(classes=_.count(), queries=_.query_members.max(), documents=_.document_members.max()))
    splits = ", ".join(f"{name} ({count:,})" for name, count in catalogue.meta["counts"]["splits"].items())
    largest = f"; the most are {found['queries']} and {found['documents']}" if found["classes"] else ""
    raise UserError(
        f"none of {found['classes']:,} classes in split {config.split!r} of {catalogue.path} has at least "
        f"{config.min_queries} queries (--min-queries) and {config.min_documents} documents (--min-documents){largest}",
        f"The splits are {splits}",
    )
