"""Size of a transformer, and who builds it: the seam between the tensor-parallel towers and their plain twins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """Size of a transformer; the part that both towers' configurations share.

    Args:
        num_layers: number of transformer layers.
        hidden_size: width of the residual stream.
        num_attention_heads: attention heads; divisible by the tensor-parallel size, and a divisor of hidden_size.
        ffn_hidden_size: width inside the MLP; 0 means 4 x hidden_size.
        dropout: dropout on the residual branches and on the embeddings.
        attention_dropout: dropout on the attention weights.
        layernorm_eps: epsilon of the layer norms.
        branch_init: factor on the initial weights that end each residual branch; well below 1 the transformer starts close to the identity
            and learns faster on what a convolutional stem brings. Source: LayerScale (Touvron et al. 2021), folded into the weights (ours).
    """

    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    ffn_hidden_size: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_eps: float = 1e-5
    branch_init: float = 1.0

    @property
    def mlp_size(self) -> int:
        """Width inside the MLP."""
        return self.ffn_hidden_size or 4 * self.hidden_size


def shape_errors(shape: TransformerShape, tensor_parallel: int, where: str) -> list[str]:
    """What does not divide in `shape` over `tensor_parallel` ranks; empty if all is well. `where` is its key, e.g. model.vision."""
    errors = []
    if shape.hidden_size % shape.num_attention_heads:
        errors.append(
            f"{where}.hidden_size {shape.hidden_size} is no multiple of {where}.num_attention_heads {shape.num_attention_heads}"
        )
    for name, value in (("num_attention_heads", shape.num_attention_heads), ("ffn_hidden_size", shape.mlp_size)):
        if value % tensor_parallel:
            errors.append(f"{where}.{name} {value} does not divide over mesh.tensor_parallel {tensor_parallel}")
    return errors


class TransformerBuilder(Protocol):
    """Builds the two parts of a tower that are tensor-parallel; everything else is written once, in plain torch."""

    def block(self, shape: TransformerShape, final_norm: bool = True) -> nn.Module:
        """A pre-norm transformer, with a final norm unless told otherwise.

        (hidden [s, b, h], hidden_mask bool [b, 1, 1, s] | None, True = hidden) -> [s, b, h].
        """
        ...

    def embedding(self, num_embeddings: int, hidden_size: int) -> nn.Module:
        """A lookup table: ids int64 [...] -> [..., hidden_size]."""
        ...


def padded_vocab(vocab_size: int) -> int:
    """Vocabulary rounded up to a multiple of 128, whatever the tensor-parallel size, so that checkpoints reshard."""
    return -(-vocab_size // 128) * 128


def words_hidden(tokens: Tensor, pad_id: int) -> Tensor:
    """Attention mask of padded text: tokens [b, s] -> bool [b, 1, 1, s], True where the token is padding."""
    return (tokens == pad_id)[:, None, None, :]
