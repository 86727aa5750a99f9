"""Memory bank: embeddings of earlier steps as negatives (cross-batch memory: Wang et al., arXiv 1912.06798)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from models.comm import gather_shards, shard_sizes


class MemoryBank(nn.Module):
    """A ring of the last `size` unit embeddings over all ranks, with their labels and without gradients; every rank
    holds the same.

    Its content depends on the samples pushed, in global order, not on the number of ranks. state_dict() is the whole
    bank: the same on every rank, and loadable at any number of ranks.

    Args:
        size: embeddings kept.
        embedding_dim: width of the embeddings.
        label_shape: shape of one label; () is a product or class id.
        device: where it lives.
        dtype: type of the embeddings.
        after: embeddings that are pushed before any of them counts.
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
        after: int = 0,
    ) -> None:
        super().__init__()
        self.after = after
        # An upper bound of `pushed` that is known on the host; None: to be read from the device.
        self._most: int | None = None
        self.register_load_state_dict_post_hook(MemoryBank._forget)
        self.register_buffer("embeddings", torch.zeros(size, embedding_dim, device=device, dtype=dtype))
        self.register_buffer("labels", torch.full((size, *label_shape), -1, device=device))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64, device=device))

    def filled(self) -> tuple[Tensor, Tensor, Tensor]:
        """(unit embeddings [m, embedding_dim], labels [m, *label_shape], which of them count bool [m]), m <= size; in
        the ring's order.
        """
        most = self._pushed_at_most()
        m = 0 if most < self.after else min(most, len(self.labels))
        counts = (torch.arange(m, device=self.pushed.device) < self.pushed) & (self.pushed >= self.after)
        return self.embeddings[:m], self.labels[:m], counts

    @torch.no_grad()
    def push(
        self,
        embeddings: Tensor,
        labels: Tensor,
        group: ProcessGroup,
        weights: Tensor | None = None,
        sizes: list[int] | None = None,
    ) -> None:
        """Takes in the samples of all ranks in rank order; collective.

        Where a step has several micro-batches, push one after the other: rank order within a micro-batch is the order
        of the step's positions.

        Args:
            embeddings: [n, embedding_dim], any length, any n per rank.
            labels: int64 [n, *label_shape].
            group: ranks that bring different samples.
            weights: [n], default 1; samples of weight 0 are left out.
            sizes: n of every rank of `group`, where the caller knows them; else the device is waited for.
        """
        sizes = sizes or shard_sizes(len(labels), group, labels.device)
        most, size, n = self._pushed_at_most(), len(self.labels), sum(sizes)
        unit = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)
        unit, known = gather_shards(unit, group, sizes), gather_shards(labels, group, sizes)
        counts = torch.ones(n, device=labels.device) if weights is None else gather_shards(weights, group, sizes)
        # Only the device knows how many samples count. So as many places are written as all samples need, the last of
        # them with their old content.
        kept, total = (counts > 0).int().argsort(descending=True, stable=True), (counts > 0).sum()
        newest = (total - size).clamp_min(0) + torch.arange(min(n, size), device=labels.device)
        source, places, counted = kept[newest], (self.pushed + newest) % size, newest < total
        for ring, new in ((self.embeddings, unit), (self.labels, known)):
            where = counted.view(-1, *[1] * (ring.dim() - 1))
            ring[places] = torch.where(where, new[source].to(ring.dtype), ring[places])
        self.pushed += total
        self._most = most + n

    def _pushed_at_most(self) -> int:
        if self._most is None:
            self._most = int(self.pushed)
        return self._most

    def _forget(self, _: object) -> None:
        self._most = None
