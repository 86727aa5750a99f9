"""Text queries made of attributes, and which documents are relevant to them: exact by construction. Ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from harness.data.product_queries import words_of
from harness.embed import Side
from harness.errors import UserError

DEPTH = 10
GRADED = f"graded_ndcg_at_{DEPTH}"
# 2 ** grade - 1 (Burges et al. 2005) of a document with all of a query's attributes, and of one with all but one.
GAINS = (3.0, 1.0)

Values = tuple[str, ...]


class AttributeQueries:
    """Every combination of values that a document has is a query, as 'men navy blue shirts'.

    Relevant are the documents that have all of its values; graded nDCG also counts those that have all but one.

    Args:
        documents: the catalogue's own documents, with the columns of `attributes`.
        attributes: columns that a query is made of, in the order of its words.

    Attributes:
        texts: the queries, sorted by their values.

    Raises:
        UserError: no document has a value in each of the columns.
    """

    def __init__(self, documents: Side, attributes: Sequence[str]) -> None:
        self.documents = documents
        values = list(zip(*(documents.columns[name] for name in attributes), strict=True))
        counts = Counter(row for row in values if all(row))
        self._wanted = sorted(counts)
        if not self._wanted:
            raise UserError(
                f"no document of {documents.catalogue.path} has a value in each of evaluation.query_attributes",
                f"Its attributes are {', '.join(documents.catalogue.attributes) or 'none'}",
            )
        self.texts = [" ".join(row).lower() for row in self._wanted]
        place = {row: number for number, row in enumerate(self._wanted)}
        self._labels = np.array([place.get(row, -1) for row in values])
        self._values = dict(zip(documents.ids.tolist(), values, strict=True))
        self._ideal = self._ideal_gains(counts, values)

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        """The query that each document [n] answers, -1 for none, int64 [n]; ids of other catalogues answer none."""
        place = np.searchsorted(self.documents.ids, ids)
        own = place < len(self._labels)
        return np.where(own, self._labels[np.minimum(place, len(self._labels) - 1)], -1)

    def grade(self, query: int, document: int) -> int:
        """How many of the query's attributes the document lacks; all of them for one of another catalogue."""
        wanted = self._wanted[query]
        values = self._values.get(document, ())
        return sum(a != b for a, b in zip(wanted, values, strict=True)) if values else len(wanted)

    def graded_ndcg(self, query: int, best: Sequence[int]) -> float:
        """nDCG of the first DEPTH documents, `best` first."""
        grades = [self.grade(query, document) for document in best[:DEPTH]]
        most = min(len(GAINS), len(self._wanted[query]))  # with one attribute, all but one is none
        return _discounted([GAINS[grade] if grade < most else 0.0 for grade in grades]) / self._ideal[query]

    def _ideal_gains(self, counts: Counter[Values], values: Sequence[Values]) -> list[float]:
        """The discounted gain of each query's ideal list."""
        width = len(self._wanted[0])
        # Documents with all of a query's values but that at `left_out`: those that agree elsewhere, less those that agree there too.
        near = Counter((left_out, _without(row, left_out)) for row in values for left_out in range(width))
        ideal = []
        for wanted in self._wanted:
            exact = counts[wanted]
            close = sum(near[left_out, _without(wanted, left_out)] - exact for left_out in range(width))
            gains = [GAINS[0]] * min(exact, DEPTH) + [GAINS[1]] * (min(close, DEPTH) if width > 1 else 0)
            ideal.append(_discounted(gains[:DEPTH]))
        return ideal


def without_words(side: Side, attributes: Sequence[str]) -> Side:
    """`side` with the words of all values of these attributes removed from its titles."""
    words = {word for name in attributes for value in set(side.columns[name]) if value for word in words_of(value)}
    titles = [" ".join(w for w in (t or "").split() if not set(words_of(w)) & words) for t in side.columns["title"]]
    return replace(side, columns={**side.columns, "title": titles})


def _without(row: Values, place: int) -> Values:
    return (*row[:place], *row[place + 1 :])


def _discounted(gains: Sequence[float]) -> float:
    return float(sum(gain / np.log2(place + 2) for place, gain in enumerate(gains)))
