"""Counter-based random bits in plain torch: a function of keys alone, equal on every device and at every world size. Source: ours."""

from __future__ import annotations

import torch
from torch import Tensor


def mix(x: Tensor) -> Tensor:
    """A well-mixed 62-bit hash of int64, in wrapping integer arithmetic (after Steele et al. 2014, splitmix64)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) & ((1 << 62) - 1)


def random_bits(keys: Tensor, columns: int) -> Tensor:
    """32 random bits for each column of each key: keys int64 [n], well mixed -> int32 [n, columns]."""
    row = keys.to(torch.int32)[:, None]
    column = mix(torch.arange(columns, device=keys.device)).to(torch.int32)
    bits = (row ^ column) * 0x2C1B3C6D  # int32: these passes over all entries are what the bits cost
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= 0x297A2D39
    bits ^= (bits >> 12) & 0xFFFFF
    return bits
