"""A column of texts as numbers: four bytes a row however long the texts are, where a catalogue has millions of rows on
every rank.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Coded:
    """n texts: that of row i is values[codes[i]].

    codes: int32 [n], -1 where there is none (null); values: the distinct texts, ascending by code point as Python sorts
    them, so that codes sort as their texts do. After `take` some of them may have no row.
    """

    codes: np.ndarray
    values: pa.LargeStringArray

    @classmethod
    def of(cls, pieces: Sequence[pa.DictionaryArray]) -> Coded:
        """Of a column's `encoded` pieces, one after another."""
        if not pieces:
            return cls(np.empty(0, np.int32), pa.array([], pa.large_string()))
        column = pa.chunked_array(pieces).unify_dictionaries()
        values = column.chunk(0).dictionary
        order = pc.sort_indices(values)
        place = np.full(len(values) + 1, -1, np.int32)  # the last is that of null, at -1
        place[order.to_numpy()] = np.arange(len(values), dtype=np.int32)
        return cls(np.concatenate([place[piece.indices.fill_null(-1)] for piece in column.chunks]), values.take(order))

    @classmethod
    def of_list(cls, texts: Sequence[str | None]) -> Coded:
        """Of texts at hand."""
        return cls.of([encoded(pa.array(texts, pa.large_string()))])

    def take(self, rows: np.ndarray) -> Coded:
        """The rows [m], or those where bool [n] is true."""
        return Coded(self.codes[rows], self.values)

    def filled(self) -> np.ndarray:
        """bool [n]: whether there is a text, and not an empty one."""
        empty = int(len(self.values) > 0 and self.values[0].as_py() == "")
        return self.codes >= empty

    def used(self) -> list[str]:
        """The texts that some row has, ascending, without the empty one."""
        return [self.values[int(code)].as_py() for code in np.unique(self.codes[self.filled()])]

    def in_list(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [n]: the place of each row's text in `texts`, -1 where it is not among them."""
        place = {text: number for number, text in enumerate(texts)}
        return np.array([*(place.get(text, -1) for text in self.values.to_pylist()), -1])[self.codes]

    def with_null(self, text: str) -> Coded:
        """The same with `text` where there was none."""
        none, values = self.codes < 0, self.values.to_pylist()
        place = bisect_left(values, text)
        new = none.any() and values[place : place + 1] != [text]
        if new:
            values.insert(place, text)
        codes = np.where(none, place, self.codes + (new & (self.codes >= place))).astype(np.int32)
        return Coded(codes, pa.array(values, pa.large_string()))

    def tolist(self) -> list[str | None]:
        """The texts."""
        values = [*self.values.to_pylist(), None]
        return [values[code] for code in self.codes.tolist()]


def encoded(piece: pa.Array) -> pa.DictionaryArray:
    """A piece of a column of texts, each distinct one held once."""
    return piece.cast(pa.large_string()).dictionary_encode()
