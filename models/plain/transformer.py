"""The transformer block in plain torch, with the state names and the weight layout of the merged megatron-core checkpoint."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.shape import TransformerShape


class PlainAttention(nn.Module):
    """Multi-head self-attention; linear_qkv holds (q, k, v) head by head, as megatron-core interleaves them."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.heads = shape.num_attention_heads
        self.dropout = shape.attention_dropout
        self.linear_qkv = nn.Linear(shape.hidden_size, 3 * shape.hidden_size)
        self.linear_proj = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """hidden [s, b, h]; mask bool [b, 1, 1, s], True = hidden. Returns [s, b, h]."""
        s, b, _ = hidden.shape
        qkv = self.linear_qkv(hidden).view(s, b, self.heads, 3, -1).permute(3, 1, 2, 0, 4)
        out = F.scaled_dot_product_attention(
            qkv[0],
            qkv[1],
            qkv[2],
            attn_mask=None if mask is None else ~mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.linear_proj(out.permute(2, 0, 1, 3).reshape(s, b, -1))


class PlainMLP(nn.Module):
    """Two linear layers with erf-GELU between."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(shape.hidden_size, shape.mlp_size)
        self.linear_fc2 = nn.Linear(shape.mlp_size, shape.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return self.linear_fc2(F.gelu(self.linear_fc1(hidden)))


class PlainLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(shape.hidden_size, eps=shape.layernorm_eps)
        self.self_attention = PlainAttention(shape)
        self.pre_mlp_layernorm = nn.LayerNorm(shape.hidden_size, eps=shape.layernorm_eps)
        self.mlp = PlainMLP(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """hidden [s, b, h]; mask bool [b, 1, 1, s] or None. Returns [s, b, h]."""
        hidden = hidden + self.dropout(self.self_attention(self.input_layernorm(hidden), mask))
        return hidden + self.dropout(self.mlp(self.pre_mlp_layernorm(hidden)))


class PlainBlock(nn.Module):
    """A stack of layers with a final norm, or without."""

    def __init__(self, shape: TransformerShape, final_norm: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainLayer(shape) for _ in range(shape.num_layers))
        self.final_layernorm = nn.LayerNorm(shape.hidden_size, eps=shape.layernorm_eps) if final_norm else nn.Identity()

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """hidden [s, b, h]; mask bool [b, 1, 1, s] or None. Returns [s, b, h]."""
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.final_layernorm(hidden)


class PlainBuilder:
    """Builds a tower's transformer parts in plain torch (models.shape.TransformerBuilder)."""

    def block(self, shape: TransformerShape, final_norm: bool = True) -> nn.Module:
        """See TransformerBuilder.block."""
        return PlainBlock(shape, final_norm)

    def embedding(self, num_embeddings: int, hidden_size: int) -> nn.Module:
        """See TransformerBuilder.embedding."""
        return nn.Embedding(num_embeddings, hidden_size)
