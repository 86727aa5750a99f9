"""Cosine logits against a shard of class rows, tile by tile: never holds the [samples, classes] matrix.

The torch twin of the fused kernel, and its specification. Returns the log-sum-exp over *negatives only*, beside the target cosine: composing a margin
from a full log-sum-exp cancels in fp32 (at scale 64, margin 0.35, target cosine 0.5 it gives 0 where the truth is 4.23). Source: ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NO_TARGET = -1


class CosineLse(NamedTuple):
    """Per sample [n]: log-sum-exp over the shard's negatives (-inf without any), largest negative cosine (-inf), target cosine (0 if not here)."""

    lse: Tensor
    max_cosine: Tensor
    target_cosine: Tensor


def _negatives(cosine: Tensor, target: Tensor, start: int, filter_above: float) -> Tensor:
    """cosine [n, t] of the tile that begins at row `start`, with the target's own column and filtered negatives at -inf."""
    columns = torch.arange(start, start + cosine.shape[1], device=cosine.device)
    hidden = target[:, None] == columns
    if filter_above < 1.0:
        hidden |= cosine > filter_above
    return cosine.masked_fill(hidden, float("-inf"))


def cosine_lse(
    embeddings: Tensor, rows: Tensor, target: Tensor, scale: float, filter_above: float = 1.0, tile: int = 8192
) -> CosineLse:
    """Log-sum-exp of scale * cosine over the rows that are not a sample's target, and the target's cosine.

    Args:
        embeddings: [n, d], unit length, in the accumulation type (float32 or float64).
        rows: [a, d], any length, same type; a may be 0.
        target: int64 [n], row index of each sample's class, NO_TARGET where this shard does not hold it.
        scale: factor on the cosines.
        filter_above: negatives with a larger cosine are left out (1.0: none).
        tile: rows per tile.
    """
    n = len(embeddings)
    lse = embeddings.new_full((n,), float("-inf"))
    largest = embeddings.new_full((n,), float("-inf"))
    for start in range(0, len(rows), tile):
        cosine = embeddings @ F.normalize(rows[start : start + tile], dim=-1).T
        negative = _negatives(cosine, target, start, filter_above)
        lse = torch.logaddexp(lse, torch.logsumexp(scale * negative, dim=1))
        largest = torch.maximum(largest, negative.amax(1))
    here = target != NO_TARGET
    target_cosine = embeddings.new_zeros(n)
    if here.any():
        target_cosine[here] = (embeddings[here] * F.normalize(rows[target[here]], dim=-1)).sum(-1)
    return CosineLse(lse, largest, target_cosine)


def cosine_lse_backward(
    embeddings: Tensor,
    rows: Tensor,
    target: Tensor,
    scale: float,
    lse: Tensor,
    grad_lse: Tensor,
    grad_target: Tensor,
    filter_above: float = 1.0,
    tile: int = 8192,
) -> tuple[Tensor, Tensor]:
    """Gradients of `cosine_lse` by recomputing each tile.

    Args:
        embeddings, rows, target, scale, filter_above, tile: as in `cosine_lse`.
        lse: [n], the log-sum-exp over *all* shards.
        grad_lse: [n], gradient with respect to that log-sum-exp.
        grad_target: [n], gradient with respect to the target cosine (used where this shard holds the target).

    Returns:
        (this shard's part of the gradient of the unit embeddings [n, d], gradient of `rows` [a, d]).
    """
    grad_embeddings = torch.zeros_like(embeddings)
    grad_rows = torch.empty_like(rows)
    here = target != NO_TARGET
    lse = torch.where(lse.isfinite(), lse, 0.0)  # no negatives anywhere: their terms below are exp(-inf) = 0, not nan
    for start in range(0, len(rows), tile):
        part = rows[start : start + tile]
        unit = F.normalize(part, dim=-1)
        negative = _negatives(embeddings @ unit.T, target, start, filter_above)
        grad_cosine = scale * grad_lse[:, None] * torch.exp(scale * negative - lse[:, None])
        mine = here & (target >= start) & (target < start + len(part))
        grad_cosine[mine, target[mine] - start] = grad_target[mine]
        grad_embeddings += grad_cosine @ unit
        grad_unit = grad_cosine.T @ embeddings
        # d(unit)/d(row): only what is orthogonal to the row survives, over its length
        length = part.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        grad_rows[start : start + tile] = (grad_unit - (grad_unit * unit).sum(-1, keepdim=True) * unit) / length
    return grad_embeddings, grad_rows
