"""The last embeddings of earlier steps, kept as negatives (cross-batch memory: Wang et al., arXiv 1912.06798)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from models.comm import gather_shards, shard_sizes


class MemoryBank(nn.Module):
    """A ring of the last `size` unit embeddings over all ranks, with their labels and without gradients; every rank holds the same.

    Its content is a function of what was pushed in global order, not of the number of ranks. state_dict() is all of it: the same on every rank,
    fit for any number of ranks.

    Args:
        size: embeddings kept.
        embedding_dim: width of the embeddings.
        label_shape: shape of one label; () is a product or class id.
        device: where it lives.
        dtype: type of the embeddings.
    """

    embeddings: Tensor  # [size, embedding_dim]
    labels: Tensor  # int64 [size, *label_shape]
    pushed: Tensor  # int64 [], embeddings ever pushed; the next one's place is this modulo size

    def __init__(
        self,
        size: int,
        embedding_dim: int,
        label_shape: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(size, embedding_dim, device=device, dtype=dtype))
        self.register_buffer("labels", torch.full((size, *label_shape), -1, device=device))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64, device=device))

    def filled(self) -> tuple[Tensor, Tensor]:
        """(unit embeddings [m, embedding_dim], labels [m, *label_shape]), m <= size; views, in the ring's order."""
        m = min(int(self.pushed), len(self.labels))
        return self.embeddings[:m], self.labels[:m]

    @torch.no_grad()
    def push(self, embeddings: Tensor, labels: Tensor, group: ProcessGroup, weights: Tensor | None = None) -> None:
        """Takes in the samples of all ranks in rank order; collective.

        Where a step has several micro-batches, push one after the other: rank order within a micro-batch is the order of the step's positions.

        Args:
            embeddings: [n, embedding_dim], any length, any n per rank.
            labels: int64 [n, *label_shape].
            group: ranks that bring different samples.
            weights: [n], default 1; samples of weight 0 are left out.
        """
        sizes = shard_sizes(len(labels), group, labels.device)
        unit = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)
        unit, known = gather_shards(unit, group, sizes), gather_shards(labels, group, sizes)
        if weights is not None:
            counts = gather_shards(weights, group, sizes) > 0
            unit, known = unit[counts], known[counts]
        self.pushed += len(unit)
        newest = min(len(unit), len(self.labels))
        places = (self.pushed - newest + torch.arange(newest, device=labels.device)) % len(self.labels)
        self.embeddings[places] = unit[len(unit) - newest :].to(self.embeddings.dtype)
        self.labels[places] = known[len(known) - newest :]
