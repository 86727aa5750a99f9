"""The transformer block of both towers: megatron-core's, with our attention core and norm."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from models import megatron_cpu
from models.accelerators import LayerNormFunction
from models.activation import ACTIVATIONS
from models.branch import BranchEnd
from models.compiled import compiled, may_vary
from models.recompute import recomputed
from models.sequence import COMMON_STREAM, mark_partial, padded
from models.shape import WORD_STD, TransformerShape, keep_keys_unbiased

megatron_cpu.install()

from megatron.core import ModelParallelConfig, tensor_parallel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer import MegatronModule, TransformerConfig  # noqa: E402
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules  # noqa: E402

_FULL_RECOMPUTE: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def megatron_config(
    shape: TransformerShape, tensor_parallel_size: int, sequence_parallel: bool = False, recompute: str = "none"
) -> TransformerConfig:
    """megatron-core's configuration of `shape`; recomputation of the attention core (selective) is SdpaCore's, not
    megatron-core's.

    calculate_per_token_loss makes its data-parallel reduction a plain sum (our losses are already divided by the global
    weight). bias_activation_fusion stays off: it silently swaps erf-GELU for the tanh form.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # its default cuda_graph_scope warns about itself
        return TransformerConfig(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.num_attention_heads,
            ffn_hidden_size=shape.mlp_size,
            hidden_dropout=shape.dropout,
            attention_dropout=shape.attention_dropout,
            layernorm_epsilon=shape.layernorm_eps,
            activation_func=ACTIVATIONS[shape.activation],
            init_method_std=shape.init_std,
            output_layer_init_method=lambda weight: torch.nn.init.normal_(weight, std=shape.branch_std),
            tensor_model_parallel_size=tensor_parallel_size,
            sequence_parallel=sequence_parallel,
            **_FULL_RECOMPUTE if recompute == "full" else {},
            use_cpu_initialization=True,  # draws the master weight whole and cuts it: independent of the layout
            calculate_per_token_loss=True,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
        )


class LayerNorm(torch.nn.LayerNorm):
    """torch's layer norm under megatron-core's constructor; `fused` replaces its computation."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        fused: LayerNormFunction | None = None,
        **_: Any,
    ) -> None:
        super().__init__(hidden_size, eps=eps)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        if self.fused is None:
            return super().forward(x)
        return self.fused(x, self.weight, self.bias, self.normalized_shape, self.eps)


class HeadNorm(torch.nn.LayerNorm):
    """Layer norm of queries or keys [s, b, heads, d] over d. Its weights serve the heads of all ranks, so their
    gradients are summed over `group`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, group: ProcessGroup, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        weight, bias = (
            tensor_parallel.copy_to_tensor_model_parallel_region(p, self.group) for p in (self.weight, self.bias)
        )
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class MegatronBranchEnd(BranchEnd):
    """BranchEnd under the name and call that megatron-core has for its bias-dropout-add."""

    def __init__(self, shape: TransformerShape, layer: int, sequence_parallel: bool, backend: str) -> None:
        super().__init__(shape, layer)
        self.sequence_parallel, self.backend = sequence_parallel, backend
        self._joined = compiled(_joined, backend)

    def draw(self, samples: int, device: torch.device) -> Tensor:
        """See BranchEnd.draw; the same on all tensor-parallel ranks, also where each has its own tokens and stream."""
        with tensor_parallel.get_cuda_rng_tracker().fork(COMMON_STREAM) if self.sequence_parallel else nullcontext():
            return super().draw(samples, device)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """The function of (branch, its bias), residual [s, b, h] that joins them. Dropout is that of the BranchEnd."""

        def join(branch_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, _dropout: float) -> Tensor:
            return self.join(branch_and_bias[0], residual, branch_and_bias[1])

        return join

    def joined(self, branch: Tensor, residual: Tensor, bias: Tensor | None, drawn: Tensor | None) -> Tensor:
        """See BranchEnd.joined; one kernel where it is compiled."""
        if self.backend:
            may_vary(branch, 0, 1)
            may_vary(residual, 0, 1)
            may_vary(drawn, 0)
        return self._joined(self, branch, residual, bias, drawn)


def _joined(
    end: MegatronBranchEnd, branch: Tensor, residual: Tensor, bias: Tensor | None, drawn: Tensor | None
) -> Tensor:
    return BranchEnd.joined(end, branch, residual, bias, drawn)


class FusedMLP(MLP):
    """megatron-core's MLP, whose bias and activation are one kernel where they are compiled."""

    def __init__(self, *args: Any, backend: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend
        self._activated = compiled(_activated, backend)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> ([s, b, h] without the last bias, that bias)."""
        hidden, bias = self.linear_fc1(hidden_states)
        if self.backend:
            may_vary(hidden, 0, 1)
        return self.linear_fc2(self._activated(self.activation_func, hidden, bias))


def _activated(activation: Callable[[Tensor], Tensor], hidden: Tensor, bias: Tensor) -> Tensor:
    return activation(hidden + bias)


class SdpaCore(MegatronModule):
    """Attention core on torch.nn.functional.scaled_dot_product_attention. Source: ours.

    megatron-core's own core needs CUDA buffers, and its local ViT spec is silently causal; this one applies only the
    given mask.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        recompute: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.recompute = recompute
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | int | None, **_: Any
    ) -> Tensor:
        """query, key, value [s, b, heads, d]. Returns [s, b, heads * d].

        attention_mask: bool, broadcastable to [b, heads, s, seen], True = hidden; or only `seen`, the number of first
        keys that all queries see.
        """
        if attention_mask is not None:  # fewer keys instead of hidden ones: kernels are faster without a mask
            seen = attention_mask if isinstance(attention_mask, int) else attention_mask.shape[3]
            key, value = key[:seen], value[:seen]
        attention_mask = None if isinstance(attention_mask, int) else attention_mask
        if self.recompute and self.training:
            return recomputed(self._attend, query, key, value, attention_mask)
        return self._attend(query, key, value, attention_mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        # Heads differ between tensor-parallel ranks, so their dropout must too: it draws from the tracker's own stream,
        # which a sequence-parallel block has already switched to.
        own = dropout and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if own else nullcontext():
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=dropout,
                scale=self.softmax_scale,
            )
        return out.permute(2, 0, 1, 3).flatten(2)


class Block(TransformerBlock):
    """megatron-core's stack of layers, sequence-parallel at any number of tokens, and with our recomputation."""

    def forward(self, hidden: Tensor, mask: Tensor | None, rotary_pos_emb: Tensor | None = None) -> Tensor:
        """See TransformerBuilder.block. All ranks of the group pass and get all tokens."""
        if hidden.shape[1]:
            return self._forward(hidden, mask, rotary_pos_emb)
        # megatron-core's reshapes need a sample: one of zeros goes through, and only adds gradients of 0.
        mask = mask.new_zeros(1, *mask.shape[1:]) if mask is not None and not len(mask) else mask
        return self._forward(F.pad(hidden, (0, 0, 0, 1)), mask, rotary_pos_emb)[:, :0]

    def _forward(self, hidden: Tensor, mask: Tensor | None, rotary_pos_emb: Tensor | None) -> Tensor:
        if not self.config.sequence_parallel:
            return super().forward(hidden, mask, rotary_pos_emb=rotary_pos_emb)
        group, tokens = self.pg_collection.tp, len(hidden)
        hidden, seen, rotary_pos_emb = padded(hidden, mask, rotary_pos_emb, group.size())
        own = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=group)
        own = super().forward(own, seen, rotary_pos_emb=rotary_pos_emb)
        whole = tensor_parallel.gather_from_sequence_parallel_region(
            own, tensor_parallel_output_grad=False, group=group
        )
        return whole[:tokens]

    def _checkpointed_forward(
        self, hidden_states: Tensor, attention_mask: Tensor | int | None, rotary_pos_emb: Tensor | None, **_: Any
    ) -> Tensor:
        """Called by TransformerBlock.forward in training where recompute_granularity is full."""
        for layer in self.layers:

            def run(hidden: Tensor, layer: torch.nn.Module = layer) -> Tensor:
                return layer(hidden, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb)[0]

            hidden_states = recomputed(run, hidden_states)
        return hidden_states


def _without_bias(*args: Any, **kwargs: Any) -> torch.nn.Module:
    return tensor_parallel.ColumnParallelLinear(*args, **{**kwargs, "bias": False})


class MegatronBuilder:
    """Builds the tensor-parallel parts of a tower on megatron-core (models.shape.TransformerBuilder).

    Args:
        groups: process groups; `groups.tp` shards the weights.
        sequence_parallel: between the linear layers every rank of `groups.tp` holds a range of the tokens; after the
            last backward of a step models.sequence.sum_partial_gradients is due. Without effect on one rank.
        recompute: parts whose activations backward recomputes: none, selective (attention cores) or full (layers).
        layer_norm: computes the layer norms of the blocks (models.accelerators); None: torch.
        backend: of torch.compile, for the parts between the linear layers: bias with activation, and the ends of the
            branches. Empty: not compiled.
    """

    def __init__(
        self,
        groups: ProcessGroupCollection,
        sequence_parallel: bool = False,
        recompute: str = "none",
        layer_norm: LayerNormFunction | None = None,
        backend: str = "",
    ) -> None:
        self.groups, self.backend = groups, backend
        self.sequence_parallel = sequence_parallel and groups.tp.size() > 1
        self.recompute = recompute
        self.layer_norm = ModuleSpec(module=LayerNorm, params={"fused": layer_norm})

    def block(self, shape: TransformerShape, final_norm: bool = True) -> torch.nn.Module:
        """See TransformerBuilder.block; bidirectional: it attends to all that the given mask leaves visible."""
        config = megatron_config(shape, self.groups.tp.size(), self.sequence_parallel, self.recompute)
        layers = [self._layer(shape, layer) for layer in range(shape.num_layers)]
        submodules = TransformerBlockSubmodules(layer_specs=layers, layer_norm=self.layer_norm)
        final_norm = final_norm and not shape.post_norm
        block = Block(config, submodules, post_layer_norm=final_norm, pg_collection=self.groups)
        if self.sequence_parallel:
            for module in block.modules():
                if not isinstance(module, HeadNorm):  # sees all tokens, and sums over the heads by itself
                    mark_partial(module)
        if shape.qkv_bias and not shape.key_bias:
            for made in block.layers:
                attention = made.self_attention
                keep_keys_unbiased(attention.linear_qkv.bias, attention.num_attention_heads_per_partition)
        return block

    def _layer(self, shape: TransformerShape, layer: int) -> ModuleSpec:
        norm = IdentityOp if shape.post_norm else self.layer_norm
        head_norm = ModuleSpec(module=HeadNorm, params={"group": self.groups.tp}) if shape.qk_norm else IdentityOp
        end = ModuleSpec(
            module=MegatronBranchEnd,
            params={
                "shape": shape,
                "layer": layer,
                "sequence_parallel": self.sequence_parallel,
                "backend": self.backend,
            },
        )
        core = ModuleSpec(module=SdpaCore, params={"recompute": self.recompute == "selective"})
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=ModuleSpec(
                    module=SelfAttention,
                    params={"attn_mask_type": AttnMaskType.no_mask},
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=tensor_parallel.ColumnParallelLinear if shape.qkv_bias else _without_bias,
                        core_attention=core,
                        linear_proj=tensor_parallel.RowParallelLinear,
                        q_layernorm=head_norm,
                        k_layernorm=head_norm,
                    ),
                ),
                self_attn_bda=end,
                pre_mlp_layernorm=norm,
                mlp=ModuleSpec(
                    module=FusedMLP,
                    params={
                        "ffn_hidden_size": shape.fc1_size,  # of the first linear layer; the second takes the config's
                        "backend": self.backend,
                    },
                    submodules=MLPSubmodules(
                        linear_fc1=tensor_parallel.ColumnParallelLinear, linear_fc2=tensor_parallel.RowParallelLinear
                    ),
                ),
                mlp_bda=end,
            ),
        )

    def embedding(self, num_embeddings: int, hidden_size: int) -> torch.nn.Module:
        """Vocab-parallel word embedding; `num_embeddings` must be a multiple of the tensor-parallel size
        (models.shape.padded_vocab).
        """
        return tensor_parallel.VocabParallelEmbedding(
            num_embeddings,
            hidden_size,
            init_method=lambda weight: torch.nn.init.normal_(weight, std=WORD_STD),
            config=ModelParallelConfig(use_cpu_initialization=True, tensor_model_parallel_size=self.groups.tp.size()),
            tp_group=self.groups.tp,
        )
