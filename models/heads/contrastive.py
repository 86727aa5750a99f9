"""In-batch contrastive loss with negatives from every rank: the comparison to class-parallel classification."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from models.comm import gather_shards, gather_with_grad, own_slice, shard_sizes


def info_nce(
    queries: Tensor,
    documents: Tensor,
    labels: Tensor,
    temperature: float,
    group: ProcessGroup,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Symmetric InfoNCE over the global batch; row i of queries and documents is a pair.

    Args:
        queries, documents: [n, d], any length; n may differ between ranks.
        labels: int64 [n], product or class of the pair; other pairs with the same label are no negatives.
        temperature: divisor of the cosines.
        group: ranks that bring different pairs.
        weights: [n], default 1.

    Returns:
        (loss, the same on every rank, with gradient d(global loss) / d(own embeddings); metrics positive_cosine and accuracy as local
        [weighted sum, weight], which add up over ranks).
    """
    if weights is None:
        weights = torch.ones(len(labels), device=labels.device)
    sizes = shard_sizes(len(labels), group, labels.device)
    q = F.normalize(
        gather_with_grad(queries.to(torch.promote_types(queries.dtype, torch.float32)), group, sizes), dim=-1
    )
    d = F.normalize(gather_with_grad(documents.to(q.dtype), group, sizes), dim=-1)
    label, weight = gather_shards(labels, group, sizes), gather_shards(weights.to(q.dtype), group, sizes)
    weight = weight / weight.sum()
    # Each rank computes the terms of its own pairs; the gather's backward adds up what the ranks found.
    mine = own_slice(sizes, group.rank())
    index = torch.arange(len(label), device=label.device)
    same = (label[mine, None] == label) & (index[mine, None] != index)
    terms = []
    for anchors, others in ((q, d), (d, q)):
        logits = (anchors[mine] @ others.T / temperature).masked_fill(same, float("-inf"))
        terms.append(F.cross_entropy(logits, index[mine], reduction="none"))
    local = ((terms[0] + terms[1]) / 2) @ weight[mine]
    # The value shown is global, the gradient is the local terms' (others' reach us through the gather).
    total = local.detach().clone()
    dist.all_reduce(total, group=group)
    with torch.no_grad():
        right = (q[mine] @ d.T).masked_fill(same, float("-inf")).argmax(1) == index[mine]
        own = weights.to(q.dtype)
        sums = {"positive_cosine": (q[mine] * d[mine]).sum(-1) @ own, "accuracy": right.to(q.dtype) @ own}
    return local + (total - local.detach()), {name: torch.stack([value, own.sum()]) for name, value in sums.items()}
