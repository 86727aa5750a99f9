"""Configuration of `shelfmark govern`: a field for each parameter of a rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from models.ranges import (
    ClosedUnitInterval,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitIntervalAbove0,
    UnitIntervalBelow1,
)

# Fields that both sources of classes read.
COMMON = ("split", "min_queries", "min_documents", "query_power", "document_ratio", "hold_out_classes")


@dataclass(frozen=True, kw_only=True)
class GovernConfig:
    """Groups the samples of one split into classes and gives each class its slots per epoch; writes classes/.

    A class that is too small, and a sample without class, is listed with its reason in classes/quarantine.parquet. A
    query photo is also a member of the classes of the documents that answer it (`shelfmark pairs`).

    With --clicks the classes come from a click log, by the rules of docs/governance.md; class column and pairs are not
    read. Options from --relations on belong to it.

    Args:
        catalogue: the catalogue folder; an existing classes/ in it is replaced.
        split: the split to train on; samples of split 'all' belong to it.
        min_queries: fewest query samples a class needs.
        min_documents: fewest document samples a class needs.
        query_power: exponent of the class sizes in an epoch: 1 shows every query once, 0 shows all classes equally
            often.
        document_ratio: document samples shown per query sample of a class.
        clicks: click log, a Parquet, TSV, CSV or JSONL file or a folder of such files, with the columns query (item id;
            or query_sample_id), document (item id), clicks, impressions, and time and position if they exist.
        relations: table of documents that belong together, with the columns item_a, item_b and kind.
        relation_kinds: kinds of relations that join documents, comma-separated; all by default.
        embeddings: Parquet files or folders of them with the columns sample_id and embedding.
        until: only clicks before this time count, a date or seconds since 1970; a query photo with later clicks only is
            held out.
        confidence: standard deviations of the Wilson lower bound of clicks / impressions, the support of an edge.
        min_support: lowest support of an edge between a query and a document.
        max_documents_per_query: a query that clicks more documents is a bot, and its edges are dropped.
        hot_documents: a hot document has at least so many rivals, in effect: best other documents of its queries that
            are clicked as strongly. More than a product's documents.
        hot_share: and more than this share of its queries have a rival.
        min_similarity: lowest cosine of the embeddings of an edge, in steps of 1e-6.
        min_share: lowest weight of an edge that links documents, as a share of the weight of its query's best edge.
        min_common: fewest queries that link two documents.
        min_overlap: fewest of them as a share of the geometric mean of the two documents' queries.
        max_documents: a component of more documents is split: --min-overlap rises inside it.
        split_step: by this step.
        min_vote: lowest share of a query's weight that falls into its class.
        min_purity: lowest share of the clicks of a class's queries that fall into the class.
        hold_out_classes: share of the classes that is held out from training.
        engine: duckdb, embedded, or spark, for clusters.
        master: master of Spark, as local[2] or spark://host:7077.
        memory: memory limit, as 8GB: of DuckDB, which then spills to disk; of each process of Spark.
    """

    catalogue: Path = field(kw_only=False)
    split: str = "train"
    min_queries: NonNegativeInt = 1
    min_documents: NonNegativeInt = 1
    query_power: ClosedUnitInterval = 0.5
    document_ratio: PositiveFloat = 1.0
    clicks: Path | None = None
    relations: Path | None = None
    relation_kinds: tuple[str, ...] = ()
    embeddings: tuple[Path, ...] = ()
    until: str = ""
    confidence: PositiveFloat = 1.0
    min_support: ClosedUnitInterval = 0.05
    max_documents_per_query: PositiveInt = 50
    hot_documents: PositiveInt = 20
    hot_share: ClosedUnitInterval = 0.5
    min_similarity: ClosedUnitInterval = 0.3
    min_share: ClosedUnitInterval = 0.5
    min_common: PositiveInt = 2
    min_overlap: ClosedUnitInterval = 0.2
    max_documents: PositiveInt = 64
    split_step: UnitIntervalAbove0 = 0.05
    min_vote: ClosedUnitInterval = 0.5
    min_purity: ClosedUnitInterval = 0.5
    hold_out_classes: UnitIntervalBelow1 = 0.0
    engine: Literal["duckdb", "spark"] = "duckdb"
    master: str = "local[*]"
    memory: str = ""
