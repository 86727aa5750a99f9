"""Collectives over shards of unequal, also empty, size."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def shard_sizes(count: int, group: ProcessGroup, device: torch.device) -> list[int]:
    """The `count` of every rank of `group`, in rank order. Waits for the device: who knows the sizes passes them on
    instead.
    """
    if group.size() == 1:
        return [count]
    sizes = torch.empty(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([count], device=device), group=group)
    return sizes.tolist()


def gather_shards(x: Tensor, group: ProcessGroup, sizes: list[int] | None = None) -> Tensor:
    """Rows of every rank's `x` [n_r, ...], concatenated in rank order; not differentiable. `sizes` saves the exchange
    of n_r.
    """
    if group.size() == 1:
        return x
    sizes = sizes or shard_sizes(len(x), group, x.device)
    longest = max(sizes)
    padded = x if len(x) == longest else torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    gathered = x.new_empty(group.size() * longest, *x.shape[1:])
    dist.all_gather_into_tensor(gathered, padded.contiguous(), group=group)
    if min(sizes) == longest:
        return gathered
    return torch.cat([gathered[r * longest : r * longest + n] for r, n in enumerate(sizes)])


def scatter_sum(x: Tensor, group: ProcessGroup, sizes: list[int]) -> Tensor:
    """Every rank's own rows [n_r, ...] of the sum of all ranks' `x` [sum of n_r, ...]: the counterpart of
    gather_shards.
    """
    if group.size() == 1:
        return x
    longest = max(sizes)
    if min(sizes) < longest:
        padding = x.new_zeros(longest - min(sizes), *x.shape[1:])
        x = torch.cat([part for rows in x.split(sizes) for part in (rows, padding[: longest - len(rows)])])
    own = x.new_empty(longest, *x.shape[1:])
    dist.reduce_scatter_tensor(own, x.contiguous(), group=group)
    return own[: sizes[group.rank()]]


def own_slice(sizes: list[int], rank: int) -> slice:
    """Range of rank's rows in the result of gather_shards."""
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, sizes: list[int]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        return gather_shards(x, group, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return scatter_sum(grads[0], ctx.group, ctx.sizes), None, None


def gather_with_grad(x: Tensor, group: ProcessGroup, sizes: list[int]) -> Tensor:
    """gather_shards whose backward sums the gradients of all ranks and returns each rank its own rows."""
    return x if group.size() == 1 else _GatherWithGrad.apply(x, group, sizes)
