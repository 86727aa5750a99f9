"""Sampled negative classes: a pure function of (seed, step, block of class ids), so the active set is the same at every
world size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.keyed import mix

ID_BLOCK = 4096
"""Consecutive class ids that share one key, of initial rows and of sampling."""
_HALF = 6  # bits; two halves make an id within its block
_ROUNDS = 6


def sampled_classes(start: int, stop: int, rate: float, seed: int, step: int, device: torch.device) -> Tensor:
    """Class ids in [start, stop), each drawn with probability `rate`: int64 in no particular order; -1 stands for no
    id. Source: ours.

    Every block draws rate x 4,096 ids without replacement (rounded up or down by its key), as the first values of a
    keyed permutation: the cost follows the number of ids drawn, not of classes. The length of the result depends only
    on the arguments: nothing waits for the device.
    """
    if start >= stop:
        return torch.empty(0, dtype=torch.int64, device=device)
    blocks = torch.arange(start // ID_BLOCK, -(-stop // ID_BLOCK), device=device)
    key = mix(mix(torch.full((1,), seed, device=device)) + step)
    key = mix(key ^ blocks)[:, None]
    whole = int(rate * ID_BLOCK)
    chance = int((rate * ID_BLOCK - whole) * (1 << 31))
    place = torch.arange(min(whole + 1, ID_BLOCK), device=device)[None]
    drawn = (place < whole) | ((mix(key) & ((1 << 31) - 1)) < chance)
    ids = blocks[:, None] * ID_BLOCK + _permuted(place, key)
    return torch.where(drawn & (ids >= start) & (ids < stop), ids, -1).flatten()


def _permuted(place: Tensor, key: Tensor) -> Tensor:
    """A permutation of [0, ID_BLOCK) for each key, at the given places: a Feistel network on the two halves of the
    number.
    """
    low = (1 << _HALF) - 1
    left, right = (place >> _HALF).expand(len(key), -1), (place & low).expand(len(key), -1)
    for number in range(_ROUNDS):
        left, right = right, left ^ (mix(key + right * 0x2545F4914F6CDD1D + number) & low)
    return left << _HALF | right
