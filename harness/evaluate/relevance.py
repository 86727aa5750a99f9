"""Right answers of queries that a catalogue's pairs name, with their grades."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.catalogue.pairs import Pairs

ID_BITS = 38  # of a document's id; the place of its query is above them, in one int64


@dataclass(frozen=True)
class Relevance:
    """Right answers of n queries, m in all; the same on every rank, 20 bytes each.

    Args:
        queries: int64 [n] ids, ascending; all others have the right answers that their labels give.
        keys: int64 [m], ascending: place of the query in `queries`, and id of the document.
        grades: float64 [m], above 0.
    """

    queries: Tensor
    keys: Tensor
    grades: Tensor

    @classmethod
    def of(cls, catalogue: Path, queries: np.ndarray) -> Relevance | None:
        """By a catalogue's pairs; None where they name none of `queries`, int64 [q] sample ids, ascending."""
        pairs = Pairs.open(catalogue)
        if pairs is None:
            return None
        places, rows = pairs.of(queries)
        named, places = np.unique(places, return_inverse=True)
        if not len(named):
            return None
        grades = pairs.grade[rows].astype(np.float64)
        right = grades > 0
        keys = (places << ID_BITS) + pairs.document[rows]
        return cls(*(torch.from_numpy(array) for array in (queries[named], keys[right], grades[right])))

    def to(self, device: torch.device) -> Relevance:
        """The same on a device."""
        return Relevance(self.queries.to(device), self.keys.to(device), self.grades.to(device))

    def names(self, ids: Tensor) -> Tensor:
        """bool, the shape of `ids` (of queries)."""
        return self.queries[self._places(ids)] == ids

    def counts(self, ids: Tensor) -> Tensor:
        """Right answers of each query [b], 0 for those that are not named."""
        return self._range(ids)[1]

    def answers(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The right answers of the queries `ids` [b]: places in `ids`, ascending, and ids of documents, both [k]."""
        first, count = self._range(ids)
        slots = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), count)
        within = torch.arange(len(slots), device=ids.device) - (count.cumsum(0) - count)[slots]
        return slots, self.keys[first[slots] + within] & (2**ID_BITS - 1)

    def grades_of(self, ids: Tensor, documents: Tensor) -> Tensor:
        """Grade of each document for its query, float64, the shape of `documents`; 0 for what is no right answer.

        Args:
            ids: queries that are named.
            documents: ids, of a shape to which `ids` broadcasts.
        """
        keys = (self._places(ids) << ID_BITS) + documents
        if not len(self.keys):
            return torch.zeros_like(keys, dtype=torch.float64)
        place = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        return torch.where(self.keys[place] == keys, self.grades[place], 0.0)

    def _places(self, ids: Tensor) -> Tensor:
        return torch.searchsorted(self.queries, ids).clamp_max(len(self.queries) - 1)

    def _range(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """First key of each query and their number, 0 for those that are not named."""
        start = self._places(ids) << ID_BITS
        first, end = (torch.searchsorted(self.keys, bound) for bound in (start, start + 2**ID_BITS))
        return first, (end - first).where(self.names(ids), 0)
