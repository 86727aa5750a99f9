"""The margin of the target logit: cos(m1 * theta + m2) - m3, continued monotonously past pi."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Margin = tuple[float, float, float]


def margin_cosine(cosine: Tensor, margin: Margin, straight_through: bool) -> tuple[Tensor, Tensor]:
    """The margined target cosine and its derivative with respect to the plain one.

    Args:
        cosine: [n] in [-1, 1], float32 or float64.
        margin: (m1, m2, m3): (1, 0, m) is CosFace, (1, m, 0) ArcFace, (m, 0, 0) SphereFace.
        straight_through: take the derivative as 1 (what Partial FC does silently) instead of the true one.

    Returns:
        (value [n], derivative [n]). Past m1 * theta + m2 = pi the cosine goes on falling: (-1)^k cos(x) - 2k for x in
        [k pi, (k+1) pi] (the continuation of SphereFace), so a worse angle never gets a better logit. At theta = 0 the
        true derivative of an angular margin is infinite; 1 / sin(theta) is bounded by 1000 there.
    """
    m1, m2, m3 = margin
    if m1 == 1.0 and m2 == 0.0:
        return cosine - m3, torch.ones_like(cosine)
    cosine = cosine.clamp(-1.0, 1.0)
    sine = ((1 - cosine) * (1 + cosine)).sqrt()
    angle = m1 * torch.atan2(sine, cosine) + m2  # acos loses half its digits near 1
    turn = torch.floor(angle / math.pi).clamp_min(0)
    sign = 1 - 2 * (turn % 2)
    value = sign * torch.cos(angle) - 2 * turn - m3
    if straight_through:
        return value, torch.ones_like(cosine)
    return value, m1 * sign * torch.sin(angle) / sine.clamp_min(1e-3)


def scaled_margin(margin: Margin, part: float) -> Margin:
    """`part` in [0, 1] of a margin: 0 is no margin, 1 all of it."""
    m1, m2, m3 = margin
    return 1 + (m1 - 1) * part, m2 * part, m3 * part
