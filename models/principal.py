"""Start of a linear layer at the principal directions of its input, so that what it keeps of imported vectors is what
tells them apart, and cosines of its output are those of the vectors.

Known: principal directions and whitening of image descriptors (Jégou & Chum, ECCV 2012). Ours: half of the whitening,
because the whole of it hurts where queries and documents are pictures of two kinds (docs/results.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WHITENING = 0.5  # 0: directions only; 1: all have equal variance
RIDGE = 1e-3  # added to each direction's variance, as a part of the mean variance


@torch.no_grad()
def start_at_principal(layer: nn.Linear, count: Tensor, total: Tensor, products: Tensor) -> None:
    """Sets a layer [d, h], d <= h, to the first d principal directions of vectors v [h], centred, each divided by its
    standard deviation to the power of WHITENING. Its weights are on average as large as they were.

    Args:
        layer: with a bias.
        count: number of the vectors [], float64 like all of them.
        total: sum of v [h].
        products: sum of v v^T [h, h].
    """
    count = count.clamp_min(1)  # there is none where no image could be read
    mean = total / count
    variance, directions = torch.linalg.eigh(products / count - mean[:, None] * mean)
    variance, directions = variance.clamp_min(0).flip(0), directions.flip(1)[:, : layer.out_features]
    # A direction's sign is free; its largest part is made positive, so that it does not depend on the machine.
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    variance = variance + RIDGE * variance.mean().clamp_min(1e-30)  # where all vectors are equal
    weight = (directions * variance[: layer.out_features] ** (-WHITENING / 2)).T
    weight *= layer.weight.double().norm() / weight.norm()
    layer.weight.copy_(weight)
    layer.bias.copy_(-(weight @ mean))
