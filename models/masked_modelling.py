"""Masked modelling: hiding of patches, targets of their reconstruction, head for masked words. Shared by MAKE and ITEm.

The batch says which words and patches are masked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def hide_patches(images: Tensor, masked: Tensor, patch_size: int) -> Tensor:
    """images [b, 3, S, S] with the masked patches (bool [b, P], row-major) at 0, the mean colour.

    Pixels are hidden, not patch embeddings (ours): a stem whose patches overlap must not see them either.
    """
    side = images.shape[-1] // patch_size
    grid = masked.view(-1, 1, side, side)
    hidden = grid.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    return images.masked_fill(hidden, 0)


def patch_pixels(images: Tensor, patch_size: int) -> Tensor:
    """images [b, 3, S, S] -> pixels of each patch [b, P, 3 * patch_size**2], with mean 0 and variance 1. Source: He et
    al. 2022 (MAE).
    """
    pixels = F.unfold(images.to(torch.promote_types(images.dtype, torch.float32)), patch_size, stride=patch_size)
    return F.layer_norm(pixels.transpose(1, 2), pixels.shape[1:2], eps=1e-6)


class WordHead(nn.Module):
    """Token vectors to logits over the vocabulary. Source: Devlin et al. 2019 (BERT); not tied to the word embeddings
    (ours).

    Replicated over tensor-parallel ranks: it sees only the few masked words.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.LayerNorm(hidden_size))
        self.words = nn.Linear(hidden_size, vocab_size)

    def forward(self, states: Tensor) -> Tensor:
        """[m, h] -> [m, vocab_size]."""
        return self.words(self.body(states))


def word_terms(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy [m] of logits [m, vocab_size] and the true tokens [m]."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens, reduction="none")
