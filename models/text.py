"""The text tower: word and position embeddings, transformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from models.fields import TRAINING_ONLY
from models.ranges import OptionalSize, Size
from models.shape import TransformerBuilder, TransformerShape, padded_vocab, words_hidden


@dataclass(frozen=True, kw_only=True)
class TextConfig(TransformerShape):
    """The text tower.

    Args:
        vocab_size: number of word pieces; 0 takes the catalogue's tokenizer.
        max_length: tokens of one text; longer ones are cut.
        pad_id: the id of padding.
        eos_id: the id that ends a text, for pooling eos.
        position_offset: rows of the position table before that of the first token (2 in RoBERTa and XLM-R).
        token_types: rows of a table of token types, the first of which is added to every token (2 in BERT); 0: no such
            table.
        embedding_norm: a norm on the embeddings, before the first layer.
        causal: a token sees only itself and the tokens before it (CLIP).
        mask_padding: whether padding is hidden from attention; CLIP and SigLIP were trained without.
        pooling: what `pool` makes of a text: class (its first token), mean (over its tokens), eos (its first eos_id) or
            last (the last position, padding or not); none: it has no vector of its own.
        projection_dim: width of a last linear layer on the pooled vector; 0: none.
        projection_bias: whether that layer has a bias (SigLIP's has).
    """

    vocab_size: OptionalSize = field(default=0, metadata=TRAINING_ONLY)
    max_length: Size = 64
    pad_id: OptionalSize = 0
    eos_id: OptionalSize = 0
    position_offset: OptionalSize = 0
    token_types: OptionalSize = 0
    embedding_norm: bool = True
    causal: bool = False
    mask_padding: bool = True
    pooling: Literal["none", "class", "mean", "eos", "last"] = "none"
    projection_dim: OptionalSize = 0
    projection_bias: bool = False

    @property
    def trims(self) -> bool:
        """True if cutting off the padding behind a text leaves its vectors unchanged."""
        return (self.mask_padding or self.causal) and self.pooling != "last"

    def errors(self, where: str) -> list[str]:
        """Errors for values that do not fit together; each names its key under `where`."""
        bare = self.projection_dim and self.pooling == "none"
        return [f"{where}.projection_dim needs a {where}.pooling"] if bare else []


class TextTower(nn.Module):
    """Tokens to token vectors. Source: Devlin et al. 2019 (BERT), with pre-norm layers (ours) unless post_norm; Radford
    et al. 2021 (CLIP).
    """

    EMBEDDINGS = ("words", "position", "token_type", "norm")

    def __init__(self, config: TextConfig, build: TransformerBuilder) -> None:
        super().__init__()
        self.config = config
        self.words = build.embedding(padded_vocab(config.vocab_size), config.hidden_size)
        rows = config.max_length + config.position_offset
        self.position = nn.Parameter(torch.randn(rows, config.hidden_size) * 0.02)
        self.token_type = (
            nn.Parameter(torch.randn(config.token_types, config.hidden_size) * 0.02) if config.token_types else None
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.block = build.block(config)
        self.projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=config.projection_bias)
            if config.projection_dim
            else None
        )

    def forward(self, tokens: Tensor, padded: bool = True) -> Tensor:
        """tokens int64 [b, L], padding behind the text, L <= max_length -> [b, L, h]; undefined at masked padding.

        padded: whether there may be padding. Without it, attention that is not causal needs no mask and has faster
        kernels.
        """
        offset = self.config.position_offset
        x = self.words(tokens) + self.position[offset : offset + tokens.shape[1]]
        if self.token_type is not None:
            x = x + self.token_type[0]
        if self.norm is not None:
            x = self.norm(x)
        x = self.dropout(x).transpose(0, 1).contiguous()
        return self.block(x, self._mask(tokens, padded)).transpose(0, 1)

    def pool(self, tokens: Tensor, words: Tensor) -> Tensor:
        """tokens [b, L] and forward's words [b, L, h] -> one vector each [b, projection_dim or h]."""
        if self.config.pooling == "mean":
            seen = (tokens != self.config.pad_id)[:, :, None].to(words.dtype)
            pooled = (words * seen).sum(1) / seen.sum(1).clamp(min=1)
        elif self.config.pooling == "eos":
            end = (tokens == self.config.eos_id).int().argmax(1)
            pooled = words[torch.arange(len(words), device=words.device), end]
        else:
            pooled = words[:, {"class": 0, "last": -1}[self.config.pooling]]
        return pooled if self.projection is None else self.projection(pooled)

    def _mask(self, tokens: Tensor, padded: bool) -> Tensor | None:
        """Mask of attention: bool [b, 1, 1 or L, L], or None."""
        hidden = words_hidden(tokens, self.config.pad_id) if self.config.mask_padding and padded else None
        if not self.config.causal:
            return hidden
        length = tokens.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)[None, None]
        return future if hidden is None else hidden | future
