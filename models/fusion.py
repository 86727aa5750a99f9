"""OCLEAR's modules behind the towers: fusions of a document's text and image, and the transformation networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.principal import start_at_principal


class CrossAttention(nn.Module):
    """Pre-norm multi-head attention of queries over a context, with a residual unless told otherwise; also returns the
    attention map.
    """

    def __init__(self, hidden_size: int, context_size: int, heads: int, residual: bool = True) -> None:
        super().__init__()
        self.heads, self.residual = heads, residual
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
        read = self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + read if self.residual else read, weights


class Fused(NamedTuple):
    """Fused vector [b, h] of a document, gate [b] in (0, 1), attention of the concepts over patches [b, slots, P]; the
    parts [b, h] whose sum the vector is, and the weights [b] that they have in it; none where it is no sum.
    """

    vector: Tensor
    gate: Tensor
    attention: Tensor
    parts: tuple[Tensor, ...] = ()
    weights: tuple[Tensor | float, ...] = ()


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

    def forward(
        self, image: Tensor, patches: Tensor, words: Tensor, words_hidden: Tensor, every_text: bool = False
    ) -> Fused:
        """image [b, h]; patches [b, P, h]; words [b, L, t]; words_hidden bool [b, 1, 1, L], True = padding; every_text
        leaves out no text.
        """
        concepts, _ = self.text_attention(self.memory.expand(len(image), -1, -1), words, words_hidden)
        concepts, attention = self.patch_attention(concepts, patches)
        fused = self.norm(concepts).mean(1)
        gate = torch.sigmoid(self.gate(torch.cat([image, fused], -1)))
        mix = gate
        if self.training and self.text_dropout and not every_text:
            mix = gate * (torch.rand_like(gate) >= self.text_dropout)
        rest = 1 - mix
        parts = (rest * image, mix * fused)
        return Fused(parts[0] + parts[1], gate[:, 0], attention.mean(1), parts, (rest[:, 0], mix[:, 0]))


class ConcatFusion(nn.Module):
    """Baseline for ConceptFusion: image vector and mean word through one linear layer, or (text_size 0) only the image
    vector. Ours.
    """

    def __init__(self, hidden_size: int, text_size: int) -> None:
        super().__init__()
        self.join = nn.Linear(hidden_size + text_size, hidden_size) if text_size else None

    def forward(
        self, image: Tensor, patches: Tensor, words: Tensor, words_hidden: Tensor, every_text: bool = False
    ) -> Fused:
        """As ConceptFusion, with zeros [b] and [b, 1, P] for gate and attention."""
        nothing = image.new_zeros(patches.shape[:2])
        if self.join is None:
            return Fused(image, nothing[:, 0], nothing[:, None])
        text = mean_word(words, words_hidden)
        return Fused(self.join(torch.cat([image, text], -1)), nothing[:, 0], nothing[:, None])


def mean_word(words: Tensor, words_hidden: Tensor) -> Tensor:
    """Mean of the words [b, L, t] that are no padding: [b, t]."""
    seen = (~words_hidden[:, 0, 0, :, None]).to(words.dtype)
    return (words * seen).sum(1) / seen.sum(1).clamp_min(1)


class SumFusion(nn.Module):
    """Weighted sum of unit vectors in the embedding space: image, steered average, text identity. Ours.

    Image is the image vector, transformed as without any text. Steered is an average of patches that the text guides:
    ConceptFusion's concepts attend over the patches, but without the residual, which would carry the text itself into
    the vector. Text identity is the mean word through one linear layer. So the text can only add to the image: where it
    names the class outright, the image still has to be found. The weights are constants; a part of weight 0 is left
    out, parameters included. Training leaves out the text identity of a share `text_dropout` of the documents.

    Args:
        hidden_size: width of the patches.
        text_size: width of the words.
        embedding_dim: width of the embedding.
        slots: concepts.
        heads: of both attentions.
        weights: of image, steered average and text identity; not all 0.
        text_dropout: share of documents without text identity in training.

    Attributes:
        part_weights: of the parts that there are, the image first; may be set anew, not all 0.
    """

    def __init__(
        self,
        hidden_size: int,
        text_size: int,
        embedding_dim: int,
        slots: int,
        heads: int,
        weights: tuple[float, float, float],
        text_dropout: float,
    ) -> None:
        super().__init__()
        self.text_dropout = text_dropout
        self.part_weights = (weights[0], *(weight for weight in weights[1:] if weight))
        self.steers = bool(weights[1])
        if self.steers:
            self.memory = nn.Parameter(torch.randn(slots, hidden_size) * hidden_size**-0.5)
            self.text_attention = CrossAttention(hidden_size, text_size, heads)
            self.patch_attention = CrossAttention(hidden_size, hidden_size, heads, residual=False)
            self.norm = nn.LayerNorm(hidden_size)
        self.identity = nn.Linear(text_size, embedding_dim) if weights[2] else None

    def forward(
        self,
        image: Tensor,
        patches: Tensor,
        words: Tensor,
        words_hidden: Tensor,
        transform: Callable[[Tensor], Tensor],
        every_text: bool = False,
    ) -> tuple[Fused, Tensor]:
        """Arguments as ConceptFusion, and the documents' transform [n, h] -> [n, d].

        Returns:
            (the document's embedding [b, d] as the vector, zeros for the gate, the steered average's attention; the
            embedding of the image only [b, d], not normalised).
        """
        attention = image.new_zeros(patches.shape[:2])[:, None]
        looks = [image]
        if self.steers:
            concepts, _ = self.text_attention(self.memory.expand(len(image), -1, -1), words, words_hidden)
            read, maps = self.patch_attention(concepts, patches)
            looks.append(self.norm(read).mean(1))
            attention = maps.mean(1)
        parts = list(transform(torch.cat(looks)).tensor_split(len(looks)))  # also of no document
        if self.identity is not None:
            parts.append(self.identity(mean_word(words, words_hidden)))
        units = [F.normalize(part.float() if part.dtype == torch.bfloat16 else part, dim=-1) for part in parts]
        if self.identity is not None and self.training and self.text_dropout and not every_text:
            units[-1] = units[-1] * (torch.rand_like(units[-1][:, :1]) >= self.text_dropout)
        weighted = torch.stack([weight * unit for weight, unit in zip(self.part_weights, units, strict=True)])
        total, nothing = weighted.sum(0).to(image.dtype), attention.new_zeros(len(image))
        return Fused(total, nothing, attention, weighted.unbind(0), self.part_weights), parts[0]


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

    @torch.no_grad()
    def start_at_principal(self, count: Tensor, total: Tensor, products: Tensor) -> None:
        """Sets the projection by `models.principal`, to the moments of what comes in, and the body to add nothing."""
        start_at_principal(self.project, count, total, products)
        for parameter in self.body[-1].parameters():
            parameter.zero_()
