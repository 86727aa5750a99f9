"""Activations of the MLPs by their name in a recipe. Shared by the tensor-parallel towers and their plain twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh approximation, as SigLIP's checkpoints were trained with."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), as OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def swiglu(pairs: Tensor) -> Tensor:
    """[..., 2n] -> [..., n]: silu(gate) * up, where gate and up alternate so that tensor-parallel shards are plain
    ranges.

    Source: Shazeer 2020 (arXiv 2002.05202); the interleaving is ours.
    """
    gate, up = pairs.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate) * up


Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "swiglu": swiglu,
}
GATED = ("swiglu",)  # their first linear layer is twice as wide
