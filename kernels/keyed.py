"""Counter-based random bits in plain torch: a function of the keys, equal on every device and at every world size.
Source: ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGE = 1 << 25
"""Entries per launch: enough for a GPU, and small beside its memory."""


def mix(x: Tensor) -> Tensor:
    """A well-mixed 62-bit hash of int64, in wrapping integer arithmetic (after Steele et al. 2014, splitmix64)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) & ((1 << 62) - 1)


def random_bits(keys: Tensor, columns: int) -> Tensor:
    """32 random bits for each column of each key: keys int64 [n], well mixed -> int32 [n, columns]."""
    row = keys.to(torch.int32)[:, None]
    bits = (
        row ^ column_keys(columns, keys.device)
    ) * 0x2C1B3C6D  # int32: the passes over all entries dominate the cost
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= 0x297A2D39
    bits ^= (bits >> 12) & 0xFFFFF
    return bits


def column_keys(columns: int, device: torch.device) -> Tensor:
    """Keys of columns for `random_bits`: int32 [columns]."""
    return mix(torch.arange(columns, device=device)).to(torch.int32)


def fill_normal(rows: Tensor, std: float, first_id: int, seed: int) -> None:
    """Fills `rows` [n, d] with normal numbers keyed by the seed, the row's id (`first_id` and up) and the column.

    Source: Box and Muller 1958. The halves of a row's key draw radius and angle: of ten million keys of 62 bits hardly
    two are equal, of 32 bits thousands would be.
    """
    columns = rows.shape[1]
    half = -(-columns // 2)
    seed_key = mix(torch.tensor([seed])).item() - 1  # one below those of stochastic rounding
    for piece in rows.split(max(1, LARGE // columns)):
        ids = torch.arange(first_id, first_id + len(piece), device=rows.device)
        first_id += len(piece)
        keys = mix(mix(ids ^ seed_key))
        radius, angle = (random_bits(part, half) & 0xFFFFFF for part in (keys, keys >> 31))
        length = ((radius + 0.5) * 2.0**-24).log_().mul_(-2 * std**2).sqrt_()  # + 0.5: the logarithm of 0 is none
        angle = angle * (2 * math.pi * 2.0**-24)
        piece[:, :half] = length * angle.cos()
        piece[:, half:] = (length * angle.sin_())[:, : columns - half]
