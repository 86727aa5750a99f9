"""The text tower: word and position embeddings, transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.shape import TransformerBuilder, TransformerShape, padded_vocab, words_hidden


@dataclass(frozen=True, kw_only=True)
class TextConfig(TransformerShape):
    """The text tower.

    Args:
        vocab_size: number of word pieces; 0 takes the catalogue's tokenizer.
        max_length: tokens of one text; longer ones are cut.
        pad_id: the id of padding.
    """

    vocab_size: int = 0
    max_length: int = 64
    pad_id: int = 0


class TextTower(nn.Module):
    """Tokens to token vectors. Source: Devlin et al. 2019 (BERT), with pre-norm layers (ours)."""

    def __init__(self, config: TextConfig, build: TransformerBuilder) -> None:
        super().__init__()
        self.pad_id = config.pad_id
        self.words = build.embedding(padded_vocab(config.vocab_size), config.hidden_size)
        self.position = nn.Parameter(torch.randn(config.max_length, config.hidden_size) * 0.02)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.block = build.block(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [b, L], L <= max_length -> [b, L, h]; what stands at padding is meaningless."""
        x = self.norm(self.words(tokens) + self.position[: tokens.shape[1]])
        x = self.dropout(x).transpose(0, 1).contiguous()
        return self.block(x, words_hidden(tokens, self.pad_id)).transpose(0, 1)
