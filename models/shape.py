"""Size of a transformer, and the interface of its builders, which tensor-parallel towers and plain twins share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from models.activation import GATED, Activation
from models.fields import TRAINING_ONLY
from models.ranges import (
    ClosedUnitInterval,
    Layers,
    NonNegativeFloat,
    OptionalSize,
    Size,
    UnitIntervalBelow1,
)


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """Size of a transformer; the part that both towers' configurations share.

    Args:
        preset: a name of models.presets, whose values fill in what the recipe leaves out; by itself it changes nothing.
        num_layers: number of transformer layers.
        hidden_size: width of the residual stream.
        num_attention_heads: attention heads; divisible by the tensor-parallel size, and a divisor of hidden_size.
        ffn_hidden_size: width inside the MLP; 0 means 4 x hidden_size.
        dropout: dropout on the residual branches and on the embeddings.
        attention_dropout: dropout on the attention weights.
        layernorm_eps: epsilon of the layer norms.
        activation: gelu, gelu_tanh (SigLIP), quick_gelu (OpenAI's CLIP) or swiglu (DINOv2 giant; ffn_hidden_size is
            then the gated width).
        qkv_bias: whether queries, keys and values have a bias.
        key_bias: whether the keys' bias is trained; otherwise it is and stays 0 (DINOv3).
        qk_norm: a layer norm on the queries and one on the keys of every head (the weights shared by the heads).
        post_norm: norms behind the residual additions and no final norm, as in BERT; otherwise before the branches, and
            a final one.
        layer_scale: initial value of a learned factor for each channel of a branch; 0: no such factor.
        drop_path: share of samples whose branch is dropped in training, at the last layer; it rises linearly from 0 at
            the first.
        branch_init: factor on the initial weights that end each residual branch; well below 1 the transformer starts
            close to the identity and learns faster on what a convolutional stem brings. Source: LayerScale (Touvron et
            al. 2021), folded into the weights (ours).
    """

    preset: str = ""
    num_layers: Layers = 4
    hidden_size: Size = 128
    num_attention_heads: Size = 4
    ffn_hidden_size: OptionalSize = 0
    dropout: ClosedUnitInterval = field(default=0.0, metadata=TRAINING_ONLY)
    attention_dropout: ClosedUnitInterval = field(default=0.0, metadata=TRAINING_ONLY)
    layernorm_eps: NonNegativeFloat = 1e-5
    activation: Activation = "gelu"
    qkv_bias: bool = True
    key_bias: bool = True
    qk_norm: bool = False
    post_norm: bool = False
    layer_scale: NonNegativeFloat = 0.0
    drop_path: UnitIntervalBelow1 = field(default=0.0, metadata=TRAINING_ONLY)
    branch_init: NonNegativeFloat = field(default=1.0, metadata=TRAINING_ONLY)

    @property
    def is_transformer(self) -> bool:
        """False for a tower that only shares the configuration."""
        return True

    @property
    def mlp_size(self) -> int:
        """Width inside the MLP."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def fc1_size(self) -> int:
        """Outputs of the MLP's first linear layer."""
        return self.mlp_size * (2 if self.activation in GATED else 1)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def init_std(self) -> float:
        """Standard deviation of initial weights. Source: Nguyen and Salazar 2019; 0.023 at width 768."""
        return math.sqrt(2 / (5 * self.hidden_size))

    @property
    def branch_std(self) -> float:
        """Standard deviation of the weights that end a residual branch: megatron-core's own, times branch_init."""
        return self.branch_init * self.init_std / math.sqrt(2 * self.num_layers)


def shape_errors(shape: TransformerShape, tensor_parallel: int, where: str) -> list[str]:
    """Errors where `shape` does not divide over `tensor_parallel` ranks; empty if it does. `where` is its key, e.g.
    model.vision.
    """
    if not shape.is_transformer:  # its ranks hold equal copies
        return []
    errors = []
    if shape.hidden_size % shape.num_attention_heads:
        errors.append(
            f"{where}.hidden_size {shape.hidden_size} is not a multiple of "
            f"{where}.num_attention_heads {shape.num_attention_heads}"
        )
    for name, value in (("num_attention_heads", shape.num_attention_heads), ("ffn_hidden_size", shape.mlp_size)):
        if value % tensor_parallel:
            errors.append(f"{where}.{name} {value} does not divide over mesh.tensor_parallel {tensor_parallel}")
    return errors


class TransformerBuilder(Protocol):
    """Builds the two parts of a tower that are tensor-parallel; everything else is written once, in plain torch."""

    def block(self, shape: TransformerShape, final_norm: bool = True) -> nn.Module:
        """A transformer; a pre-norm one ends in a final norm unless told otherwise.

        (hidden [s, b, h], hidden_mask bool [b, 1, 1 or s, s] | None, True = hidden, rotary_pos_emb=angles [s, 1, 1,
        head_dim] | None) -> [s, b, h].
        """
        ...

    def embedding(self, num_embeddings: int, hidden_size: int) -> nn.Module:
        """A lookup table: ids int64 [...] -> [..., hidden_size]."""
        ...


def keep_keys_unbiased(bias: nn.Parameter, heads: int) -> None:
    """Sets the keys' part of a bias [heads * 3 * head_dim] of queries, keys and values to 0, without gradients."""
    with torch.no_grad():
        bias.unflatten(0, (heads, 3, -1))[:, 1].zero_()

    def without_keys(grad: Tensor) -> Tensor:
        kept = torch.ones_like(grad).unflatten(0, (heads, 3, -1))
        kept[:, 1] = 0
        return grad * kept.flatten()

    bias.register_hook(without_keys)


WORD_STD = 0.02  # standard deviation of word embeddings' initial weights
VOCAB_MULTIPLE = 128


def padded_vocab(vocab_size: int) -> int:
    """Vocabulary rounded up to a multiple of VOCAB_MULTIPLE at any tensor-parallel size: checkpoints can reshard."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def words_hidden(tokens: Tensor, pad_id: int) -> Tensor:
    """Attention mask of padded text: tokens [b, s] -> bool [b, 1, 1, s], True where the token is padding."""
    return (tokens == pad_id)[:, None, None, :]
