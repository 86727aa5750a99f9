"""Text queries made of attributes, and which documents are relevant to them: exact by construction. Ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from harness.core.errors import UserError
from harness.evaluate.embed import Side
from harness.text.product_queries import words_of

DEPTH = 10
GRADED = f"graded_ndcg_at_{DEPTH}"
# 2 ** grade - 1 (Burges et al. 2005) of a document with all of a query's attributes, and of one with all but one.
GAINS = (3.0, 1.0)


class AttributeQueries:
    """Every combination of values that a document has is a query, as 'men navy blue shirts'.

    Relevant are the documents that have all of its values; graded nDCG also counts those that have all but one. Values
    are held as numbers, four bytes for each document and attribute.

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
        columns = [documents.columns[name] for name in attributes]
        # [n, attributes], -1 for none; numbers sort as their texts do.
        self._codes = np.stack([np.where(column.filled(), column.codes, -1) for column in columns], 1)
        whole = np.flatnonzero((self._codes >= 0).all(1))
        if not len(whole):
            raise UserError(
                f"no document of {documents.catalogue.path} has a value in each of evaluation.query_attributes",
                f"Its attributes are {', '.join(documents.catalogue.attributes) or 'none'}",
            )
        _, first, place, exact = np.unique(
            _as_one(self._codes[whole]), return_index=True, return_inverse=True, return_counts=True
        )
        self._wanted = self._codes[whole[first]]
        values = [
            [column.values[int(code)].as_py() for code in codes]
            for column, codes in zip(columns, self._wanted.T, strict=True)
        ]
        self.texts = [" ".join(row).lower() for row in zip(*values, strict=True)]
        self._labels = np.full(len(self._codes), -1, np.int64)
        self._labels[whole] = place
        self._ideal = self._ideal_gains(exact)

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        """The query that each document [n] answers, -1 for none, int64 [n]; ids of other catalogues answer none."""
        rows = self.documents.rows_of(ids)
        return np.where(rows >= 0, self._labels[rows], -1)

    def grades(self, queries: np.ndarray, best: np.ndarray) -> np.ndarray:
        """Number of its query's attributes that each document lacks, int64 [n, k]; all of them where it is of another
        catalogue.

        Args:
            queries: [n] places in `texts`.
            best: [n, k] ids of documents.
        """
        rows = self.documents.rows_of(best)
        lacks = (self._codes[rows] != self._wanted[queries][:, None]).sum(2)
        return np.where(rows >= 0, lacks, self._codes.shape[1])

    def graded_ndcg(self, queries: np.ndarray, best: np.ndarray) -> np.ndarray:
        """nDCG of the first DEPTH documents of each query, the best first, float64 [n]; arguments as in `grades`."""
        gains = np.zeros(self._codes.shape[1] + 1)
        most = min(len(GAINS), self._codes.shape[1])  # with one attribute, all but one is none
        gains[:most] = GAINS[:most]
        return _discounted(gains[self.grades(queries, best[:, :DEPTH])]) / self._ideal[queries]

    def _ideal_gains(self, exact: np.ndarray) -> np.ndarray:
        """The discounted gain of each query's ideal list; `exact` documents have all of its values."""
        width = self._codes.shape[1]
        close = np.zeros_like(exact)
        for left_out in range(width if width > 1 else 0):
            # Documents with all of a query's values but that at `left_out`: those that agree elsewhere, less those that
            # agree there too.
            rest = np.delete(self._codes, left_out, 1)
            numbers = _as_one(np.concatenate([np.delete(self._wanted, left_out, 1), rest[(rest >= 0).all(1)]]))
            wanted, others = np.split(numbers, [len(exact)])
            distinct, counts = np.unique(others, return_counts=True)
            close += counts[np.searchsorted(distinct, wanted)] - exact
        place = np.arange(DEPTH)
        exact, close = exact[:, None], close[:, None]
        return _discounted(np.where(place < exact, GAINS[0], np.where(place < exact + close, GAINS[1], 0.0)))


def without_words(side: Side, attributes: Sequence[str]) -> Side:
    """`side` with the words of all values of these attributes removed from its titles."""
    words = {word for name in attributes for value in side.columns[name].used() for word in words_of(value)}

    def bare(title: str | None) -> str:
        return " ".join(w for w in (title or "").split() if not set(words_of(w)) & words)

    return replace(side, retitle=bare)


def _as_one(rows: np.ndarray) -> np.ndarray:
    """One int64 [n] for each row of int [n, k] >= 0: equal where the rows are, and sorted as they are."""
    number = np.zeros(len(rows), np.int64)
    for column in rows.T:
        size = int(column.max(initial=0)) + 1
        if int(number.max(initial=0)) >= 2**62 // size:
            number = np.unique(number, return_inverse=True)[1].astype(np.int64)
        number = number * size + column
    return number


def _discounted(gains: np.ndarray) -> np.ndarray:
    """Sum [n] of gains [n, k], each divided by log2 of its place + 2; added up from the left."""
    total = np.zeros(len(gains))
    for place in range(gains.shape[1]):
        total += gains[:, place] / np.log2(place + 2)
    return total
