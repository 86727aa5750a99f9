"""Attention pooling: a learned query attends to all tokens. Replicated on all tensor-parallel ranks: it is one layer on
one token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.activation import ACTIVATIONS
from models.shape import TransformerShape


class AttentionPool(nn.Module):
    """Tokens to one vector. Source: Zhai et al. 2022 (multi-head attention pooling), as SigLIP has it.

    linear_qkv holds all queries, then all keys, then all values.
    """

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        h = shape.hidden_size
        self.heads = shape.num_attention_heads
        self.probe = nn.Parameter(torch.randn(1, h) * h**-0.5)
        self.linear_qkv = nn.Linear(h, 3 * h)
        self.linear_proj = nn.Linear(h, h)
        self.norm = nn.LayerNorm(h, eps=shape.layernorm_eps)
        self.activation = ACTIVATIONS[shape.activation]
        self.linear_fc1 = nn.Linear(h, shape.fc1_size)
        self.linear_fc2 = nn.Linear(shape.mlp_size, h)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [s, b, h] -> [b, h]."""
        b, h = tokens.shape[1:]
        weight, bias = self.linear_qkv.weight, self.linear_qkv.bias
        query = F.linear(self.probe, weight[:h], bias[:h]).view(1, self.heads, 1, -1).expand(b, -1, -1, -1)
        keys, values = F.linear(tokens, weight[h:], bias[h:]).unflatten(2, (2, self.heads, -1)).permute(2, 1, 3, 0, 4)
        pooled = F.scaled_dot_product_attention(query, keys, values)
        pooled = self.linear_proj(pooled.reshape(b, h))
        return pooled + self.linear_fc2(self.activation(self.linear_fc1(self.norm(pooled))))
