"""Dense float64 references, written for clarity: all logits at once, gradients by autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.heads.class_parallel import ClassHeadConfig


def dense_loss_and_metrics(
    embeddings: Tensor,
    rows: Tensor,
    labels: Tensor,
    weights: Tensor,
    config: ClassHeadConfig,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, mean target cosine, accuracy), weighted, over all rows (or the `active` ones, which hold every label);
    labels of -1 count nothing.
    """
    weights = weights * (labels >= 0)
    cosine = F.normalize(embeddings, dim=-1) @ F.normalize(rows, dim=-1).T
    m1, m2, m3 = config.margin
    target = cosine.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    x = m1 * torch.acos(target) + m2
    k = torch.floor(x / math.pi).detach().clamp_min(0)
    value = (1 - 2 * (k % 2)) * torch.cos(x) - 2 * k - m3 if (m1, m2) != (1.0, 0.0) else target - m3
    if config.gradient == "straight_through":
        value = target + (value - target).detach()
    negative = torch.ones_like(cosine, dtype=torch.bool)
    if active is not None:
        negative[:] = False
        negative[:, active] = True
    negative &= cosine.detach() <= config.filter_above
    negative.scatter_(1, labels.clamp_min(0)[:, None], False)
    logits = (config.scale * cosine).masked_fill(~negative, float("-inf"))
    right = config.scale * target > logits.amax(1)
    logits = torch.cat([config.scale * value[:, None], logits], dim=1)
    losses = torch.where(weights > 0, torch.logsumexp(logits, 1) - logits[:, 0], 0.0)
    weights = weights / weights.sum()
    return losses @ weights, target.detach() @ weights, right.to(weights.dtype) @ weights


def dense_loss(*args: Any) -> Tensor:
    """The loss of `dense_loss_and_metrics`."""
    return dense_loss_and_metrics(*args)[0]
