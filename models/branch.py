"""Joint of a residual branch and the stream: layer scale, dropout, drop path, addition, and the norm of a post-norm
layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.shape import TransformerShape


class BranchEnd(nn.Module):
    """The end of one branch of layer `layer` (from 0). Parameters: `scale` with layer scale, `norm` with post-norm,
    none otherwise.

    Source: LayerScale, Touvron et al. 2021; drop path, Huang et al. 2016, its rate rising linearly over the layers;
    post-norm, Vaswani et al. 2017.
    """

    drop_path: Tensor

    def __init__(self, shape: TransformerShape, layer: int) -> None:
        super().__init__()
        self.dropout = shape.dropout
        rate = shape.drop_path * layer / max(1, shape.num_layers - 1)
        self.drops = rate > 0
        # A tensor, because torch.compile makes a graph for each value of a number: all layers are to share one.
        self.register_buffer("drop_path", torch.tensor(rate, dtype=torch.float64), persistent=False)
        self.scale = nn.Parameter(torch.full((shape.hidden_size,), shape.layer_scale)) if shape.layer_scale else None
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.layernorm_eps) if shape.post_norm else None

    def join(self, branch: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
        """branch, residual [s, b, h], bias [h] of the branch -> [s, b, h]. Drop path drops the whole branch of a
        sample.
        """
        drawn = self.draw(branch.shape[1], branch.device) if self.drops and self.training else None
        return self.joined(branch, residual, bias, drawn)

    def joined(self, branch: Tensor, residual: Tensor, bias: Tensor | None, drawn: Tensor | None) -> Tensor:
        """`join` with its random numbers [b] given. Only operations on tensors, so that they can be fused."""
        if bias is not None:
            branch = branch + bias
        if self.scale is not None:
            branch = branch * self.scale
        branch = F.dropout(branch, self.dropout, self.training)
        if drawn is not None:
            kept = drawn[None, :, None] >= self.drop_path
            branch = branch * (kept.to(branch.dtype) / (1 - self.drop_path))
        joined = residual + branch
        return joined if self.norm is None else self.norm(joined)

    def draw(self, samples: int, device: torch.device) -> Tensor:
        """Uniform numbers [samples] in [0, 1) that decide which samples' branches are dropped."""
        return torch.rand(samples, device=device)
