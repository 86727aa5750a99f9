"""The transformer block in plain torch, with the state names, the weight layout and the initial weights of the merged
megatron-core one.

The twin that tests compare with, what a search service runs and, compiled, what trains where nothing is
tensor-parallel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.activation import ACTIVATIONS
from models.branch import BranchEnd
from models.compiled import compiled, may_vary
from models.shape import WORD_STD, TransformerShape, keep_keys_unbiased


class PlainAttention(nn.Module):
    """Multi-head self-attention; linear_qkv holds (q, k, v) head by head, as megatron-core interleaves them."""

    def __init__(self, shape: TransformerShape, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.heads = shape.num_attention_heads
        self.dropout = shape.attention_dropout
        self.linear_qkv = nn.Linear(shape.hidden_size, 3 * shape.hidden_size, bias=shape.qkv_bias)
        if shape.qkv_bias and not shape.key_bias:
            keep_keys_unbiased(self.linear_qkv.bias, self.heads)
        self.linear_proj = nn.Linear(shape.hidden_size, shape.hidden_size)
        if shape.qk_norm:
            self.q_layernorm = nn.LayerNorm(shape.head_dim, eps=shape.layernorm_eps)
            self.k_layernorm = nn.LayerNorm(shape.head_dim, eps=shape.layernorm_eps)
        self.qk_norm = shape.qk_norm

    def forward(self, hidden: Tensor, mask: Tensor | None, rotary: Tensor | None) -> Tensor:
        """hidden [s, b, h]; mask bool [b, 1, 1 or s, s], True = hidden; rotary angles [s, 1, 1, head_dim]. Returns [s,
        b, h].
        """
        q, k, v = self.linear_qkv(hidden).unflatten(2, (self.heads, 3, -1)).unbind(3)
        if self.qk_norm:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if rotary is not None:
            q, k = rotated(q, rotary), rotated(k, rotary)
        if self.recompute and self.training:
            return self.linear_proj(checkpoint(self._attend, q, k, v, mask, use_reentrant=False))
        return self.linear_proj(self._attend(q, k, v, mask))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q, k, v [s, b, heads, d] -> [s, b, heads * d]."""
        out = F.scaled_dot_product_attention(
            q.permute(1, 2, 0, 3),
            k.permute(1, 2, 0, 3),
            v.permute(1, 2, 0, 3),
            attn_mask=None if mask is None else ~mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x [s, b, heads, d] rotated by `angles` [s, 1, 1, d], the halves of d being the two coordinates. Source: Su et al.
    2021 (RoPE).
    """
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos().to(x.dtype) + torch.cat([-second, first], dim=-1) * angles.sin().to(x.dtype)


class PlainMLP(nn.Module):
    """Two linear layers with the activation between."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[shape.activation]
        self.linear_fc1 = nn.Linear(shape.hidden_size, shape.fc1_size)
        self.linear_fc2 = nn.Linear(shape.mlp_size, shape.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return self.linear_fc2(self.activation(self.linear_fc1(hidden)))


class PlainLayer(nn.Module):
    """One transformer layer; a post-norm one has its norms in the ends of its branches."""

    def __init__(self, shape: TransformerShape, layer: int, recompute_attention: bool = False) -> None:
        super().__init__()
        self.input_layernorm = _pre_norm(shape)
        self.self_attention = PlainAttention(shape, recompute_attention)
        self.self_attn_bda = BranchEnd(shape, layer)
        self.pre_mlp_layernorm = _pre_norm(shape)
        self.mlp = PlainMLP(shape)
        self.mlp_bda = BranchEnd(shape, layer)

    def forward(self, hidden: Tensor, mask: Tensor | None, rotary: Tensor | None) -> Tensor:
        """hidden [s, b, h]; mask and rotary as in PlainAttention. Returns [s, b, h]."""
        hidden = self.self_attn_bda.join(self.self_attention(self.input_layernorm(hidden), mask, rotary), hidden)
        return self.mlp_bda.join(self.mlp(self.pre_mlp_layernorm(hidden)), hidden)


def _pre_norm(shape: TransformerShape) -> nn.Module:
    return nn.Identity() if shape.post_norm else nn.LayerNorm(shape.hidden_size, eps=shape.layernorm_eps)


def _run(layer: nn.Module, hidden: Tensor, mask: Tensor | None, rotary: Tensor | None) -> Tensor:
    return layer(hidden, mask, rotary)


class PlainBlock(nn.Module):
    """A stack of layers with a final norm, or without. See PlainBuilder for `recompute` and `backend`."""

    def __init__(
        self, shape: TransformerShape, final_norm: bool = True, recompute: str = "none", backend: str = ""
    ) -> None:
        super().__init__()
        self.recompute, self.backend = recompute == "full", backend
        self._run = compiled(_run, backend)
        with torch.random.fork_rng(devices=[]):  # what torch's layers draw for themselves is not used
            layers = [PlainLayer(shape, layer, recompute == "selective") for layer in range(shape.num_layers)]
            self.layers = nn.ModuleList(layers)
            self.final_layernorm = _pre_norm(shape) if final_norm else nn.Identity()
        for made in layers:
            _draw_weights(made, shape)

    def forward(self, hidden: Tensor, mask: Tensor | None, rotary_pos_emb: Tensor | None = None) -> Tensor:
        """hidden [s, b, h]; mask and rotary as in PlainAttention. Returns [s, b, h]."""
        samples = hidden.shape[1]
        # torch.compile takes 0 and 1 for constants. Added samples of zeros only add gradients of 0.
        if self.backend and samples < 2:
            hidden = F.pad(hidden, (0, 0, 0, 2 - samples))
            if mask is not None and len(mask) == samples:
                mask = F.pad(mask, (0, 0) * (mask.dim() - 1) + (0, 2 - samples))
            return self._layers(hidden, mask, rotary_pos_emb)[:, :samples]
        return self._layers(hidden, mask, rotary_pos_emb)

    def _layers(self, hidden: Tensor, mask: Tensor | None, rotary: Tensor | None) -> Tensor:
        if self.backend:
            may_vary(mask, 0, 2, 3)
            may_vary(rotary, 0)
        for layer in self.layers:
            if self.backend:
                may_vary(hidden, 0, 1)
            if self.recompute and self.training:
                hidden = checkpoint(self._run, layer, hidden, mask, rotary, use_reentrant=False)
            else:
                hidden = self._run(layer, hidden, mask, rotary)
        return self.final_layernorm(hidden)


def _draw_weights(layer: PlainLayer, shape: TransformerShape) -> None:
    """Initial weights, in megatron-core's order: the same numbers from the same generator."""
    attention, mlp = layer.self_attention, layer.mlp
    for linear, std in (
        (attention.linear_proj, shape.branch_std),
        (attention.linear_qkv, shape.init_std),
        (mlp.linear_fc1, shape.init_std),
        (mlp.linear_fc2, shape.branch_std),
    ):
        nn.init.normal_(linear.weight, std=std)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


class PlainBuilder:
    """Builds a tower's transformer parts in plain torch (models.shape.TransformerBuilder).

    Args:
        recompute: parts whose activations backward recomputes: none, selective (attention cores) or full (layers).
        backend: of torch.compile, for the layers; empty: they are not compiled.
    """

    def __init__(self, recompute: str = "none", backend: str = "") -> None:
        self.recompute, self.backend = recompute, backend

    def block(self, shape: TransformerShape, final_norm: bool = True) -> nn.Module:
        """See TransformerBuilder.block."""
        return PlainBlock(shape, final_norm, self.recompute, self.backend)

    def embedding(self, num_embeddings: int, hidden_size: int) -> nn.Module:
        """See TransformerBuilder.embedding."""
        with torch.random.fork_rng(devices=[]):
            words = nn.Embedding(num_embeddings, hidden_size)
        nn.init.normal_(words.weight, std=WORD_STD)
        return words
