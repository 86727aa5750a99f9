"""Which classes serve as negatives: a pure function of (seed, step, class id), so the active set is the same at every world size."""

from __future__ import annotations

import torch
from torch import Tensor

ID_BLOCK = 4096
"""Consecutive class ids that share one key, of initial rows and of sampling."""


def _mix(x: Tensor) -> Tensor:
    """A well-mixed 62-bit hash of int64, in wrapping integer arithmetic: equal on every device. Source: ours, after splitmix64."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) & ((1 << 62) - 1)


def sampled_classes(start: int, stop: int, rate: float, seed: int, step: int, device: torch.device) -> Tensor:
    """Class ids in [start, stop) drawn independently with probability `rate`: int64, ascending."""
    ids = torch.arange(start, stop, device=device)
    key = _mix(torch.tensor([seed], device=device)) + step
    block_key = _mix(_mix(key) ^ (ids // ID_BLOCK))
    return ids[_mix(block_key + (ids % ID_BLOCK) * 0x2545F4914F6CDD1D) < int(rate * (1 << 62))]
