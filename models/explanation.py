"""Explanation of a document's vector: the parts that it is made of, and the patches that its text looked at. Ours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Explanation(NamedTuple):
    """Explanation of n documents.

    vectors: unit embeddings float32 [n, d]; parts [n, k, c]: their sum is the vector that a document's embedding is
    computed from; weights [n, k] of the parts before they were added; attention [n, P] over the image's patches, row
    by row, each document's adds up to 1; None where nothing looks at patches.
    """

    vectors: Tensor
    parts: Tensor
    weights: Tensor
    attention: Tensor | None = None

    @property
    def shares(self) -> Tensor:
        """Share of each part in the vector, [n, k]: the parts' projections on their sum, relative to its length. They
        add up to 1; one below 0 belongs to a part that points away from the others.
        """
        parts = self.parts.to(torch.promote_types(self.parts.dtype, torch.float32))
        whole = parts.sum(1)
        length = whole.square().sum(-1, keepdim=True).clamp_min(torch.finfo(parts.dtype).tiny)
        return (parts @ whole[:, :, None])[:, :, 0] / length
