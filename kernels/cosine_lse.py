"""Cosine logits against a shard of class rows, tile by tile: never holds the [samples, classes] matrix.

The torch twin of the fused kernel, and its specification. Returns the log-sum-exp over *negatives only* and the target
cosine. Subtracting the target from a full log-sum-exp cancels in fp32: at scale 64, margin 0.35 and target cosine 0.5
it gives 0 instead of 4.23. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NO_TARGET = -1
TILE = 2048
"""Rows per tile. At 256 samples and width 256, the rows and logits of a tile fit a CPU's cache."""
_TINY = 1e-12


class CosineLse(NamedTuple):
    """Per sample [n]: log-sum-exp over the shard's negatives (-inf without any), largest negative cosine (-inf), target
    cosine (0 if not here).
    """

    lse: Tensor
    max_cosine: Tensor
    target_cosine: Tensor


def cosine_lse(
    embeddings: Tensor,
    table: Tensor,
    index: Tensor | None,
    target: Tensor,
    scale: float,
    filter_above: float = 1.0,
    tile: int = TILE,
) -> CosineLse:
    """Log-sum-exp of scale * cosine over the rows that are not a sample's target, and the target's cosine.

    Args:
        embeddings: [n, d], unit length, in the accumulation type (float32 or float64).
        table: [N, d], the shard's rows in any type; a row is gathered and brought to the accumulation type in its tile.
        index: int64 [a], the active rows of the table; None for all. a may be 0.
        target: int64 [n], position of each sample's class in `index`, NO_TARGET where this shard does not hold it.
        scale: factor on the cosines.
        filter_above: negatives with a larger cosine are left out (1.0: none).
        tile: rows per tile.
    """
    n = len(embeddings)
    scaled, order = scale * embeddings, _Targets(target)
    peak = embeddings.new_full((n,), float("-inf"))
    total = embeddings.new_zeros(n)
    for start, unit, _ in _tiles(table, index, tile, embeddings.dtype):
        logits = scaled @ unit.T
        order.hide(logits, start, scale, filter_above)
        higher = torch.maximum(peak, logits.amax(1))
        base = _finite(higher)
        total = total * torch.exp(peak - base) + logits.sub_(base[:, None]).exp_().sum(1)
        peak = higher
    here = target != NO_TARGET
    cosine = embeddings.new_zeros(n)
    if here.any():
        own = target[here] if index is None else index[target[here]]
        cosine[here] = (embeddings[here] * F.normalize(table[own].to(embeddings.dtype), dim=-1)).sum(-1)
    return CosineLse(_finite(peak) + total.log(), peak / scale, cosine)


def cosine_lse_backward(
    embeddings: Tensor,
    table: Tensor,
    index: Tensor | None,
    target: Tensor,
    scale: float,
    lse: Tensor,
    grad_lse: Tensor,
    grad_target: Tensor,
    filter_above: float = 1.0,
    tile: int = TILE,
) -> tuple[Tensor, Tensor]:
    """Gradients of `cosine_lse` by recomputing each tile.

    Args:
        embeddings, table, index, target, scale, filter_above, tile: as in `cosine_lse`.
        lse: [n], the log-sum-exp over *all* shards.
        grad_lse: [n], gradient with respect to that log-sum-exp.
        grad_target: [n], gradient with respect to the target cosine (used where this shard holds the target).

    Returns:
        (this shard's part of the gradient of the unit embeddings [n, d], gradient of the active rows [a, d], both in
        the accumulation type).
    """
    scaled, order = scale * embeddings, _Targets(target)
    lse = _finite(lse)  # no negatives anywhere: their terms below are exp(-inf) = 0, not nan
    factor = (scale * grad_lse)[:, None]
    grad_embeddings = torch.zeros_like(embeddings)
    grad_rows = embeddings.new_empty(len(table) if index is None else len(index), table.shape[1])
    for start, unit, length in _tiles(table, index, tile, embeddings.dtype):
        grad_cosine = scaled @ unit.T
        order.hide(grad_cosine, start, scale, filter_above)
        grad_cosine.sub_(lse[:, None]).exp_().mul_(factor)
        order.put(grad_cosine, start, grad_target)
        grad_embeddings.addmm_(grad_cosine, unit)
        grad = torch.mm(grad_cosine.T, embeddings, out=grad_rows[start : start + len(unit)])
        # d(unit)/d(row): the part orthogonal to the row, over the row's length
        grad.addcmul_(unit, torch.linalg.vecdot(grad, unit)[:, None], value=-1).div_(length)
    return grad_embeddings, grad_rows


def _tiles(table: Tensor, index: Tensor | None, tile: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first position, unit rows [t, d], their lengths [t, 1]) of each tile of the active rows."""
    for start in range(0, len(table) if index is None else len(index), tile):
        rows = table[start : start + tile] if index is None else table.index_select(0, index[start : start + tile])
        rows = rows.to(dtype)
        length = rows.norm(dim=-1, keepdim=True).clamp_min_(_TINY)
        yield start, rows / length, length


class _Targets:
    """Places of the samples' own classes among the rows: their columns are not negatives."""

    def __init__(self, target: Tensor) -> None:
        # Sorted once, so that a tile finds its few targets without comparing every sample with every column.
        self.column, self.sample = target.sort()
        self.known = self.column.cpu()

    def _within(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        first, last = torch.searchsorted(self.known, torch.tensor([start, stop])).tolist()
        return self.sample[first:last], self.column[first:last] - start

    def hide(self, logits: Tensor, start: int, scale: float, filter_above: float) -> None:
        """Sets the targets' columns, and the negatives above the filter, of a tile's logits [n, t] to -inf."""
        if filter_above < 1.0:
            logits.masked_fill_(logits > scale * filter_above, float("-inf"))
        logits[self._within(start, start + logits.shape[1])] = float("-inf")

    def put(self, grad_cosine: Tensor, start: int, grad_target: Tensor) -> None:
        """Writes the targets' own gradient into a tile's [n, t]."""
        sample, column = self._within(start, start + grad_cosine.shape[1])
        grad_cosine[sample, column] = grad_target[sample]


def _finite(x: Tensor) -> Tensor:
    """x with 0 in place of -inf, so that -inf - x stays -inf."""
    return torch.where(x.isfinite(), x, 0.0)
