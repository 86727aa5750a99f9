"""OCLEAR's modules behind the towers: concept-aware fusion of a document's text and image, and the transformation
networks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Pre-norm multi-head attention of queries over a context, with a residual; also returns the attention map."""

    def __init__(self, hidden_size: int, context_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query = nn.LayerNorm(hidden_size)
        self.norm_context = nn.LayerNorm(context_size)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(context_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, context: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [b, m, h]; context [b, n, c]; hidden bool [b, 1, 1, n], True = not seen. Returns ([b, m, h], map [b, heads,
        m, n]).
        """
        q = self.query(self.norm_query(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        both = self.key_value(self.norm_context(context)).unflatten(2, (2, self.heads, -1))
        k, v = both.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        weights = scores.softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2)), weights


class Fused(NamedTuple):
    """Fused vector [b, h] of a document, gate [b] in (0, 1), attention of the concepts over patches [b, slots, P]."""

    vector: Tensor
    gate: Tensor
    attention: Tensor


class ConceptFusion(nn.Module):
    """Concept-aware modality fusion.

    Known (OCLEAR, arXiv 2305.03972): concepts are extracted from the text through a learned external memory; they
    attend over image patches. Ours: `slots` memory vectors attend over the text tokens, the resulting concepts attend
    over the patches, their mean is the fused vector, and a gate in (0, 1) mixes it with the image vector: gate = 0 is
    the image only. Training leaves out the text of a share `text_dropout` of the documents: otherwise the text, which
    names the class, leaves the image nothing to learn, and unseen products are found by neither. The gate starts near
    `gate_init`.
    """

    def __init__(
        self,
        hidden_size: int,
        text_size: int,
        slots: int,
        heads: int,
        gate_init: float = 0.5,
        text_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.text_dropout = text_dropout
        self.memory = nn.Parameter(torch.randn(slots, hidden_size) * hidden_size**-0.5)
        self.text_attention = CrossAttention(hidden_size, text_size, heads)
        self.patch_attention = CrossAttention(hidden_size, hidden_size, heads)
        self.norm = nn.LayerNorm(hidden_size)
        self.gate = nn.Linear(2 * hidden_size, 1)
        with torch.no_grad():
            self.gate.bias.add_(math.log(gate_init / (1 - gate_init)))

    def forward(self, image: Tensor, patches: Tensor, words: Tensor, words_hidden: Tensor) -> Fused:
        """image [b, h]; patches [b, P, h]; words [b, L, t]; words_hidden bool [b, 1, 1, L], True = padding."""
        concepts, _ = self.text_attention(self.memory.expand(len(image), -1, -1), words, words_hidden)
        concepts, attention = self.patch_attention(concepts, patches)
        fused = self.norm(concepts).mean(1)
        gate = torch.sigmoid(self.gate(torch.cat([image, fused], -1)))
        mix = gate
        if self.training and self.text_dropout:
            mix = gate * (torch.rand_like(gate) >= self.text_dropout)
        return Fused(mix * fused + (1 - mix) * image, gate[:, 0], attention.mean(1))


class ConcatFusion(nn.Module):
    """Baseline for ConceptFusion: image vector and mean word through one linear layer, or (text_size 0) only the image
    vector. Ours.
    """

    def __init__(self, hidden_size: int, text_size: int) -> None:
        super().__init__()
        self.join = nn.Linear(hidden_size + text_size, hidden_size) if text_size else None

    def forward(self, image: Tensor, patches: Tensor, words: Tensor, words_hidden: Tensor) -> Fused:
        """As ConceptFusion, with zeros [b] and [b, 1, P] for gate and attention."""
        nothing = image.new_zeros(patches.shape[:2])
        if self.join is None:
            return Fused(image, nothing[:, 0], nothing[:, None])
        seen = (~words_hidden[:, 0, 0, :, None]).to(words.dtype)
        text = (words * seen).sum(1) / seen.sum(1).clamp_min(1)
        return Fused(self.join(torch.cat([image, text], -1)), nothing[:, 0], nothing[:, None])


class ResidualTransform(nn.Module):
    """Two-layer residual transformation network and the projection to the embedding space: [b, h] -> [b, d].

    Known (OCLEAR): separate networks for query and document after the shared image encoder. Ours: its form.
    """

    def __init__(self, hidden_size: int, embedding_dim: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, 2 * hidden_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * hidden_size, hidden_size),
        )
        self.project = nn.Linear(hidden_size, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[b, h] -> [b, d], not normalised."""
        return self.project(x + self.body(x))
