"""How well the words of titles alone answer text queries: BM25 by the bm25s library on the queries of the evaluation task `text`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.attribute_queries import GRADED, AttributeQueries, without_words
from harness.bench.report import bench_main, command_line, make_report, print_report
from harness.data.catalogue import Catalogue
from harness.data.product_queries import words_of
from harness.data.tokenizer import FIELDS
from harness.embed import Side, side_of
from harness.metrics import summarise
from harness.tasks import require_attributes

MODULE = "harness.bench.bm25"
EXAMPLE = f"python -m {MODULE} --catalogue catalogues/fashion --query-attributes gender,base_colour,sub_category"


@dataclass(frozen=True, kw_only=True)
class Bm25Config:
    """Ranks the titles of a split by BM25 (k1 1.5, b 0.75, lower-case words without plural s) for the queries of the task `text`.

    Args:
        catalogue: the catalogue folder.
        split: split of the documents.
        query_attributes: as evaluation.query_attributes.
        bare_titles: as evaluation.bare_titles.
    """

    catalogue: Path
    split: str = "test"
    query_attributes: tuple[str, ...]
    bare_titles: tuple[str, ...] = ()


def run(config: Bm25Config) -> dict[str, Any]:
    """Ranks, prints and returns the report (see `harness/bench/report.py`): the metrics of the task, and bare_… of titles without those words."""
    catalogue = Catalogue(config.catalogue)
    attributes = [*config.query_attributes, *config.bare_titles]
    require_attributes(catalogue, attributes, "--query-attributes or --bare-titles")
    documents = side_of(catalogue, "document", config.split, [*dict.fromkeys([*FIELDS, *attributes])], None, 0)
    queries = AttributeQueries(documents, config.query_attributes)
    found = {"": ranked(documents, queries)}
    if config.bare_titles:
        found["bare_"] = ranked(without_words(documents, config.bare_titles), queries)
    headline = {prefix + name: value for prefix, figures in found.items() for name, value in figures.items()}
    rows = [{"titles": "bare" if prefix else "whole", **figures} for prefix, figures in found.items()]
    report = make_report("bm25", command_line(MODULE, config), headline, rows)
    print_report(report)
    return report


def ranked(documents: Side, queries: AttributeQueries) -> dict[str, float]:
    """The metrics of the titles of `documents` under BM25; ties by ascending id, as everywhere."""
    import bm25s  # here: it is no dependency of a run

    engine = bm25s.BM25()
    engine.index([words_of(title or "") for title in documents.columns["title"]], show_progress=False)
    labels, ranks, offsets, graded = queries.labels_of(documents.ids), [], [0], []
    for query, text in enumerate(queries.texts):
        words = words_of(text)
        scores = engine.get_scores(words) if words else np.zeros(len(documents.ids))
        order = np.argsort(-scores, kind="stable")
        ranks.append(np.flatnonzero(labels[order] == query))
        offsets.append(offsets[-1] + len(ranks[-1]))
        graded.append(queries.graded_ndcg(query, documents.ids[order].tolist()))
    return {**summarise(np.concatenate(ranks), np.array(offsets)), GRADED: float(np.mean(graded))}


def main() -> int:
    """Entry point of `python -m harness.bench.bm25`."""
    return bench_main(MODULE, Bm25Config, run, "Text search by BM25 on titles.", EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
