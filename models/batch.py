"""What a method is fed: one rank's part of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Query photos and documents, both of any number. Rows are samples; ids are global sample ids.

    query_images [q, 3, S, S], query_labels int64 [q] (class ids, -1 = none), query_weights [q], query_ids int64 [q];
    document_images [d, 3, S, S], document_tokens int64 [d, L], document_labels [d], document_weights [d], document_ids [d].
    """

    query_images: Tensor
    query_labels: Tensor
    query_weights: Tensor
    query_ids: Tensor
    document_images: Tensor
    document_tokens: Tensor
    document_labels: Tensor
    document_weights: Tensor
    document_ids: Tensor

    @property
    def labels(self) -> Tensor:
        """Class ids of the queries, then the documents: int64 [q + d]."""
        return torch.cat([self.query_labels, self.document_labels])

    @property
    def weights(self) -> Tensor:
        """Weights of the queries, then the documents: [q + d]."""
        return torch.cat([self.query_weights, self.document_weights])

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """On `device`, images in `dtype`."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        for name in ("query_images", "document_images"):
            moved[name] = moved[name].to(dtype)
        return replace(self, **moved)
