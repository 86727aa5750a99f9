"""MAKE's modules behind the towers: fusion of title and image, Modal Adaptation, and the matching heads. Their forms
are ours.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.shape import TransformerBuilder, TransformerShape

_FIXED = {"equal": (1 / 3, 1 / 3, 1 / 3), "title": (1.0, 0.0, 0.0), "image": (0.0, 1.0, 0.0)}
Modalities = Literal["learned", "equal", "title", "image"]


class CrossModal(nn.Module):
    """One transformer over a first token, the title's words and the image's patches.

    Args:
        shape: of the transformer.
        text_size: width of the title tower.
        vision_size: width of the image tower.
        build: builds the transformer.
    """

    def __init__(self, shape: TransformerShape, text_size: int, vision_size: int, build: TransformerBuilder) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, shape.hidden_size) * 0.02)
        self.words_in = nn.Linear(text_size, shape.hidden_size)
        self.patches_in = nn.Linear(vision_size, shape.hidden_size)
        self.block = build.block(shape)

    def forward(self, words: Tensor, padding: Tensor | None, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """words [n, L, t], padding bool [n, L] or None where there is none, patches [n, P, v] -> (first token [n, h],
        words [n, L, h], patches [n, P, h]).
        """
        first = self.first.expand(len(words), 1, -1)
        x = torch.cat([first, self.words_in(words), self.patches_in(patches)], 1)
        hidden = None if padding is None else F.pad(padding, (1, patches.shape[1]))[:, None, None, :]
        x = self.block(x.transpose(0, 1).contiguous(), hidden).transpose(0, 1)
        length = 1 + words.shape[1]
        return x[:, 0], x[:, 1:length], x[:, length:]


class ModalAdaptation(nn.Module):
    """A product's vector: the sum of its unit title, image and fused vectors, weighted by a softmax that a small
    network finds for each product.

    Known (MAKE, arXiv 2301.12646): title and image get weights of the product's own from a cross-modal module. Ours:
    the form of that module.
    """

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3 * embedding_dim, embedding_dim), nn.GELU(), nn.Linear(embedding_dim, 3))

    def forward(self, title: Tensor, image: Tensor, fused: Tensor, modalities: str) -> tuple[Tensor, Tensor]:
        """Vectors [n, d] each; `modalities` is one of Modalities -> (parts [n, 3, d], whose sum is the product's
        vector; their weights [n, 3]).
        """
        units = torch.stack([F.normalize(x, dim=-1) for x in (title, image, fused)], 1)
        if modalities == "learned":
            weights = self.body(units.flatten(1)).softmax(-1)
        else:
            weights = torch.stack([units.new_full((len(units),), weight) for weight in _FIXED[modalities]], 1)
        return weights[:, :, None] * units, weights


class Match(nn.Module):
    """Matching score of a query and another vector, from both unit vectors and their product."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3 * embedding_dim, embedding_dim), nn.GELU(), nn.Linear(embedding_dim, 1))

    def forward(self, query: Tensor, other: Tensor) -> Tensor:
        """[n, d] and [n, d] -> logits [n]."""
        query, other = F.normalize(query, dim=-1), F.normalize(other, dim=-1)
        return self.body(torch.cat([query, other, query * other], -1))[:, 0]
