"""Helpers for losses of several terms: means over all ranks, the weighted sum of its terms, and the mean of its
micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from models.batch import Batch


def global_mean(terms: Tensor, weights: Tensor, group: ProcessGroup) -> Tensor:
    """sum(w l) / sum(w) over the terms [n] of all ranks of `group`, weighted [n], any n per rank; 0 if all weights are
    0. Collective.

    The value is the same on every rank to the bit; the gradient is that of the own terms: towers sum over `group`,
    never average.
    """
    weights = weights.to(terms.dtype)
    sums = torch.stack([terms.detach() @ weights, weights.sum()])
    dist.all_reduce(sums, group=group)
    weight = sums[1].clamp_min(torch.finfo(terms.dtype).tiny)
    local = terms @ weights / weight
    return sums[0] / weight + (local - local.detach())


def weight_errors(weights: object) -> list[str]:
    """The error where the weights of a loss's terms, the fields of `weights`, leave no term."""
    return [] if any(vars(weights).values()) else ["model.weights are all 0: there is no loss"]


def weighted_sum(weights: object, terms: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The terms, each times the field of `weights` of its name, and each of them as a metric, local [value, 1]."""
    total = torch.stack([getattr(weights, name) * value for name, value in terms.items()]).sum()
    return total, {name: torch.stack([value.detach(), torch.ones_like(total)]) for name, value in terms.items()}


def averaged(
    loss: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]], batches: Sequence[Batch]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """`loss` of each micro-batch, divided by their number, and its metrics."""
    for batch in batches:
        value, metrics = loss(batch)
        yield value / len(batches), metrics
