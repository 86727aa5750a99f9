"""Rows spread over ranks: their ranges, and collectives over shards of unequal or empty size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Entered around an exchange of a training step, in which a rank waits for those that come later: a trainer measures it.
waiting: Callable[[], AbstractContextManager[None]] = nullcontext


def share(total: int, parts: int, part: int) -> range:
    """Range `part` of `parts` nearly equal consecutive ranges of range(total); some are empty where total < parts."""
    return range(part * total // parts, (part + 1) * total // parts)


def shard_sizes(count: int, group: ProcessGroup | None, device: torch.device) -> list[int]:
    """Gathers the `count` of every rank of `group` (None: a single process), in rank order.

    Waits for the device: a caller that knows the sizes passes them on instead.
    """
    if group is None or group.size() == 1:
        return [count]
    sizes = torch.empty(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([count], device=device), group=group)
    return sizes.tolist()


def gather_shards(x: Tensor, group: ProcessGroup | None, sizes: list[int] | None = None) -> Tensor:
    """Concatenates the rows of every rank's `x` [n_r, ...] in rank order, on all ranks; not differentiable.

    Args:
        x: this rank's rows, n_r >= 0; shape and type beyond the rows are the same on all ranks.
        group: the ranks; None: a single process.
        sizes: n_r of every rank in rank order, which saves their exchange.

    Returns:
        [sum of n_r, ...]; padded only on the way. `x` itself where the group has one rank.
    """
    if group is None or group.size() == 1:
        return x
    sizes = sizes or shard_sizes(len(x), group, x.device)
    longest = max(sizes)
    gathered = x.new_empty(group.size() * longest, *x.shape[1:])
    with waiting():
        dist.all_gather_into_tensor(gathered, _padded(x, longest), group=group)
    if min(sizes) == longest:
        return gathered
    return torch.cat([gathered[r * longest : r * longest + n] for r, n in enumerate(sizes)])


def gather_to_first(x: Tensor, group: ProcessGroup) -> Tensor:
    """`gather_shards` on the first rank of `group` only; the other ranks get [0, ...]."""
    if group.size() == 1:
        return x
    sizes = shard_sizes(len(x), group, x.device)
    padded = _padded(x, max(sizes))
    parts = [torch.empty_like(padded) for _ in sizes] if group.rank() == 0 else None
    dist.gather(padded, parts, group=group, group_dst=0)
    return x[:0] if parts is None else torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


def _padded(x: Tensor, length: int) -> Tensor:
    """`x` [n, ...] with rows of zeros up to `length`, contiguous."""
    if len(x) == length:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])])


def scatter_sum(x: Tensor, group: ProcessGroup, sizes: list[int]) -> Tensor:
    """Sums all ranks' `x` [sum of n_r, ...] and gives every rank its own rows [n_r, ...]: the reverse of
    gather_shards.
    """
    if group.size() == 1:
        return x
    longest = max(sizes)
    if min(sizes) < longest:
        padding = x.new_zeros(longest - min(sizes), *x.shape[1:])
        x = torch.cat([part for rows in x.split(sizes) for part in (rows, padding[: longest - len(rows)])])
    own = x.new_empty(longest, *x.shape[1:])
    with waiting():
        dist.reduce_scatter_tensor(own, x.contiguous(), group=group)
    return own[: sizes[group.rank()]]


def own_slice(sizes: list[int], rank: int) -> slice:
    """Rows of `rank` in the result of gather_shards."""
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
    """Differentiable gather_shards: backward sums the gradients of all ranks and returns each rank its own rows."""
    return x if group.size() == 1 else _GatherWithGrad.apply(x, group, sizes)
