"""The mean of a loss's terms over all ranks, in the form that every loss here takes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


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
