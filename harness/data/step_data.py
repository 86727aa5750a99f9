"""One rank's part of a training step, as the loader hands it over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from models.batch import Batch


class TextTokens(NamedTuple):
    """Sums over documents' texts and over text queries: tokens, and squares of lengths (cost of attention)."""

    documents: int = 0
    documents_squared: int = 0
    queries: int = 0
    queries_squared: int = 0

    @classmethod
    def of(cls, documents: torch.Tensor, queries: torch.Tensor) -> TextTokens:
        """Sums over texts of these lengths, int64 [n]."""
        return cls(*(int((length**power).sum()) for length in (documents, queries) for power in (1, 2)))

    def plus(self, other: TextTokens) -> TextTokens:
        """Sums over both."""
        return TextTokens(*map(sum, zip(self, other, strict=True)))


@dataclass(frozen=True)
class StepData:
    """One rank's part of a step.

    Args:
        batches: its micro-batches.
        ledger: ledger of its (position, id) pairs.
        bad_ids: samples that this rank read and could not decode; tensor-parallel ranks share the reading.
        images: number of images that this rank read.
        read_seconds: time spent on waiting for their bytes and on decoding.
        texts: tokens of its texts without padding.
        ready: share of the read-ahead that was ready when this step was asked for.
    """

    batches: list[Batch]
    ledger: int
    bad_ids: list[int]
    images: int
    read_seconds: float
    texts: TextTokens = field(default_factory=TextTokens)
    ready: float = 0.0
