"""BM25 over titles by the bm25s library: baseline of the tasks `text` (as search) and `category` (as neighbours)."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.bench.report import bench_main, finish
from harness.catalogue.catalogue import Catalogue
from harness.core.errors import UserError
from harness.evaluate.attribute_queries import GRADED, AttributeQueries, without_words
from harness.evaluate.embed import Side, side_of
from harness.evaluate.metrics import summarise
from harness.evaluate.tasks.category import NEIGHBOURS, scores
from harness.evaluate.tasks.task import require_attributes
from harness.evaluate.title_words import title_scorer, titles
from harness.text.tokenizer import FIELDS

MODULE = "harness.bench.bm25"
EXAMPLE = f"python -m {MODULE} --catalogue catalogues/fashion --query-attributes gender,base_colour,sub_category"


@dataclass(frozen=True, kw_only=True)
class Bm25Config:
    """Ranks titles by BM25 (k1 1.5, b 0.75) for the queries of the task `text`, or for other titles.

    Words are in lower case and without plural s.

    Args:
        catalogue: the catalogue folder.
        split: split of the documents.
        query_attributes: as evaluation.query_attributes; empty: no text queries.
        bare_titles: as evaluation.bare_titles.
        category: attribute to predict from the titles nearest to a document's; empty: none.
        learn_split: split of the documents with a known category.
    """

    catalogue: Path
    split: str = "test"
    query_attributes: tuple[str, ...] = ()
    bare_titles: tuple[str, ...] = ()
    category: str = ""
    learn_split: str = "train"


def run(config: Bm25Config) -> dict[str, Any]:
    """Ranks, prints and returns the report (see `harness/bench/report.py`).

    Headline: metrics of the task `text`; bare_…, those with titles without the words of `bare_titles`; knn_…, those of
    the category.

    Raises:
        UserError: neither queries nor a category, or an unknown attribute.
    """
    catalogue = Catalogue(config.catalogue)
    attributes = [*config.query_attributes, *config.bare_titles, *([config.category] if config.category else [])]
    if not (config.query_attributes or config.category):
        raise UserError("nothing to rank for", "Name --query-attributes or --category")
    require_attributes(catalogue, attributes, "--query-attributes, --bare-titles or --category")
    columns = [*dict.fromkeys([*FIELDS, *attributes])]
    documents = side_of(catalogue, "document", config.split, columns, None, 0)
    found: dict[str, dict[str, float]] = {}
    if config.query_attributes:
        queries = AttributeQueries(documents, config.query_attributes)
        found[""] = ranked(documents, queries)
        if config.bare_titles:
            found["bare_"] = ranked(without_words(documents, config.bare_titles), queries)
    headline = {prefix + name: value for prefix, figures in found.items() for name, value in figures.items()}
    rows: list[dict[str, Any]] = [
        {"titles": "bare" if prefix else "whole", **figures} for prefix, figures in found.items()
    ]
    if config.category:
        figures = nearest(
            side_of(catalogue, "document", config.learn_split, columns, None, 0), documents, config.category
        )
        headline, rows = headline | figures, rows or [figures]
    return finish(MODULE, config, headline, rows)


def ranked(documents: Side, queries: AttributeQueries) -> dict[str, float]:
    """Metrics of ranking the titles of `documents` by BM25; ties by ascending id."""
    score = title_scorer(documents)
    labels, ranks, offsets, graded = queries.labels_of(documents.ids), [], [0], []
    for query, text in enumerate(queries.texts):
        order = np.argsort(-score(text), kind="stable")
        ranks.append(np.flatnonzero(labels[order] == query))
        offsets.append(offsets[-1] + len(ranks[-1]))
        graded.append(queries.graded_ndcg(np.array([query]), documents.ids[order][None])[0])
    return {**summarise(np.concatenate(ranks), np.array(offsets)), GRADED: float(np.mean(graded))}


def nearest(learned: Side, asked: Side, category: str) -> dict[str, float]:
    """Scores of predicting the category by the nearest titles of `learned`, each weighted by its BM25; documents of
    `asked` are left out of them.
    """
    known = learned.select(~np.isin(learned.ids, asked.ids) & learned.columns[category].filled())
    values = known.columns[category].tolist()
    said, truth, score = [], [], title_scorer(known)
    for title, value in zip(titles(asked), asked.columns[category].tolist(), strict=True):
        if value:
            found, votes = score(title), Counter[str]()
            for row in np.argsort(-found, kind="stable")[:NEIGHBOURS]:
                votes[values[row]] += found[row]
            said.append(votes.most_common(1)[0][0])
            truth.append(value)
    return {"asked": float(len(truth)), **scores(np.array(truth), np.array(said), "knn_")}


def main() -> int:
    """Entry point of `python -m harness.bench.bm25`."""
    return bench_main(MODULE, Bm25Config, run, "Search and categories by BM25 on titles.", EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
