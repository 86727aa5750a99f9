"""Means of a loss: of its terms over all ranks, and of its micro-batches, in the form that every loss here takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from models.batch import Batch


def global_mean(terms: Tensor, weights: Tensor, group: ProcessGroup) -> Tensor:
    """sum(w l) / sum(w) over the terms [n] of all ranks of `group`, weighted [n], any n per rank; 0 where nothing weighs anything. Collective.

    The value is the same on every rank to the bit; the gradient is that of the own terms: towers sum over `group`, never average.
    """
    weights = weights.to(terms.dtype)
    sums = torch.stack([terms.detach() @ weights, weights.sum()])
    dist.all_reduce(sums, group=group)
    weight = sums[1].clamp_min(torch.finfo(terms.dtype).tiny)
    local = terms @ weights / weight
    return sums[0] / weight + (local - local.detach())


def averaged(
    loss: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]], batches: Sequence[Batch]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """`loss` of each micro-batch, divided by their number, and its metrics."""
    for batch in batches:
        value, metrics = loss(batch)
        yield value / len(batches), metrics
