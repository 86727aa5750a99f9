"""The layouts of timm's VisionTransformer and of open_clip: what the tower is follows from the tensors' shapes and two words of the description."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models.weights.names import LayerNames, PoolNames, TextNames, VisionNames
from models.weights.rules import WeightsError

Shapes = Mapping[str, tuple[int, ...]]
Fields = dict[str, Any]

TIMM_NAMES = VisionNames(
    layers=LayerNames(
        layer="blocks.{i}.",
        qkv=("attn.qkv.",),
        proj="attn.proj.",
        norm1="norm1.",
        norm2="norm2.",
        fc1="mlp.fc1.",
        fc2="mlp.fc2.",
        gated_fc1=("mlp.fc1.",),
        gated_fc2="mlp.fc2.",
        scale1="ls1.gamma",
        scale2="ls2.gamma",
        head_norms=("attn.q_norm.", "attn.k_norm."),
    ),
    patch="patch_embed.proj.",
    class_token="cls_token",
    position="pos_embed",
    register="reg_token",
    embedding_norm="norm_pre.",
    final_norm="norm.",
    pool=PoolNames(
        probe="attn_pool.latent",
        qkv=("attn_pool.q.", "attn_pool.kv."),
        proj="attn_pool.proj.",
        norm="attn_pool.norm.",
        fc1="attn_pool.mlp.fc1.",
        fc2="attn_pool.mlp.fc2.",
    ),
)
TIMM_KNOWN = (r"head\..*", r"head_dist\..*")
_CLIP_LAYERS = LayerNames(
    layer="transformer.resblocks.{i}.",
    qkv=("attn.in_proj_",),
    proj="attn.out_proj.",
    norm1="ln_1.",
    norm2="ln_2.",
    fc1="mlp.c_fc.",
    fc2="mlp.c_proj.",
    scale1="ls_1.gamma",
    scale2="ls_2.gamma",
)
OPEN_CLIP_VISION_NAMES = VisionNames(
    layers=_CLIP_LAYERS,
    patch="conv1.",
    class_token="class_embedding",
    position="positional_embedding",
    embedding_norm="ln_pre.",
    final_norm="ln_post.",
    projection="{prefix}proj",
    projection_transposed=True,
    token_dims=1,
    position_dims=2,
)
OPEN_CLIP_TEXT_NAMES = TextNames(
    layers=_CLIP_LAYERS,
    words="token_embedding.weight",
    position="positional_embedding",
    final_norm="ln_final.",
    projection="{prefix}text_projection",
    projection_transposed=True,
)
OPEN_CLIP_KNOWN = (
    r"logit_scale",
    r"logit_bias",
    r".*attn_mask",
    r"visual\.proj",
    r"visual\.head\..*",
    r"(text\.)?text_projection.*",
)

# Heads of timm's vision transformers by width; elsewhere a head is 64 wide.
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}


def timm_fields(shapes: Shapes, architecture: str, prefix: str = "") -> Fields:
    """Our fields of a timm VisionTransformer whose tensors have these shapes, by names after `prefix`.

    Raises:
        WeightsError: the tensors are not those of one.
    """
    own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    if "blocks.0.attn.qkv.weight" not in own or "pos_embed" not in own:
        raise WeightsError(
            f"'{architecture}' is no VisionTransformer of timm: blocks.0.attn.qkv.weight or pos_embed is missing"
        )
    hidden, _, patch, _ = own["patch_embed.proj.weight"]
    fc1, fc2 = own["blocks.0.mlp.fc1.weight"][0], own["blocks.0.mlp.fc2.weight"][1]
    positions = own["pos_embed"][-2]
    grid = math.isqrt(positions)
    class_token = "cls_token" in own
    pooling = "attention" if "attn_pool.latent" in own else "class" if class_token else "mean"
    fields: Fields = {
        "image_size": grid * patch,
        "patch_size": patch,
        "position_grid": grid,
        "hidden_size": hidden,
        "num_layers": _count(own, "blocks."),
        "num_attention_heads": _HEADS.get(hidden, hidden // 64),
        "ffn_hidden_size": fc2,
        "layernorm_eps": 1e-5 if "clip" in architecture else 1e-6,
        "activation": "swiglu" if fc1 == 2 * fc2 else "quick_gelu" if "quickgelu" in architecture else "gelu",
        "pooling": pooling,
        "class_token": class_token,
        "class_position": positions != grid * grid,
        "patch_bias": "patch_embed.proj.bias" in own,
        "qkv_bias": "blocks.0.attn.qkv.bias" in own,
        "qk_norm": "blocks.0.attn.q_norm.weight" in own,
        "embedding_norm": "norm_pre.weight" in own,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in own else 0.0,
        "register_tokens": own["reg_token"][1] if "reg_token" in own else 0,
    }
    return fields


def open_clip_vision(shapes: Shapes, config: Mapping[str, Any]) -> tuple[Fields, VisionNames, str]:
    """(our fields, names, prefix) of the image tower of an open_clip model; `config` is its model_cfg.

    Raises:
        WeightsError: an image tower that is no vision transformer.
    """
    cfg = config["vision_cfg"]
    if architecture := cfg.get("timm_model_name"):
        return timm_fields(shapes, architecture, "visual.trunk."), TIMM_NAMES, "visual.trunk."
    if "visual.class_embedding" not in shapes:
        raise WeightsError("the image tower is no vision transformer: visual.class_embedding is missing")
    hidden, _, patch, _ = shapes["visual.conv1.weight"]
    grid = math.isqrt(shapes["visual.positional_embedding"][0])
    fields = _open_clip_layers(shapes, "visual.", cfg, config) | {
        "image_size": grid * patch,
        "patch_size": patch,
        "position_grid": grid,
        "num_attention_heads": hidden // cfg.get("head_width", 64),
        "pooling": "class",
        "class_position": True,
        "patch_bias": False,
        "embedding_norm": "visual.ln_pre.weight" in shapes,
        "projection_dim": shapes["visual.proj"][1] if "visual.proj" in shapes else 0,
    }
    return fields, OPEN_CLIP_VISION_NAMES, "visual."


def open_clip_text(shapes: Shapes, config: Mapping[str, Any]) -> tuple[Fields, TextNames, str]:
    """(our fields, names, prefix) of the text tower of an open_clip model; `config` is its model_cfg.

    Raises:
        WeightsError: a text tower of another project, or one that ends in a token of its own.
    """
    cfg = config["text_cfg"]
    prefix = "text." if "text.token_embedding.weight" in shapes else ""
    if f"{prefix}token_embedding.weight" not in shapes or f"{prefix}cls_emb" in shapes:
        raise WeightsError("the text tower is not open_clip's own transformer; import it from its own project")
    vocab = shapes[f"{prefix}token_embedding.weight"][0]
    bias = f"{prefix}text_projection.bias" in shapes
    projection = shapes.get(f"{prefix}text_projection.weight", shapes.get(f"{prefix}text_projection", (0, 0)))
    pool = cfg.get("pool_type", "argmax")
    if pool not in ("argmax", "eos", "first", "last"):
        raise WeightsError(f"text_cfg.pool_type is '{pool}'; known are argmax, eos, first and last")
    fields = _open_clip_layers(shapes, prefix, cfg, config) | {
        "vocab_size": vocab,
        "max_length": shapes[f"{prefix}positional_embedding"][0],
        "num_attention_heads": cfg.get("heads", 8),
        "pad_id": cfg.get("pad_id", 0),
        "eos_id": cfg.get("eos_id", 2) if pool == "eos" else vocab - 1,
        "embedding_norm": False,
        "causal": not cfg.get("no_causal_mask", False),
        "mask_padding": False,
        "pooling": {"first": "class", "last": "last"}.get(pool, "eos"),
        "projection_dim": projection[0] if bias else projection[1],
        "projection_bias": bias,
    }
    return fields, OPEN_CLIP_TEXT_NAMES, prefix


def _open_clip_layers(shapes: Shapes, prefix: str, cfg: Mapping[str, Any], config: Mapping[str, Any]) -> Fields:
    base = f"{prefix}transformer.resblocks."
    first = shapes[f"{base}0.mlp.c_fc.weight"]
    tanh = (cfg.get("act_kwargs") or {}).get("approximate") == "tanh"
    return {
        "hidden_size": first[1],
        "ffn_hidden_size": first[0],
        "num_layers": _count(shapes, base),
        "layernorm_eps": (cfg.get("norm_kwargs") or {}).get("eps", 1e-5),
        "activation": "quick_gelu" if config.get("quick_gelu") else "gelu_tanh" if tanh else "gelu",
        "layer_scale": 1e-5 if f"{base}0.ls_1.gamma" in shapes else 0.0,
    }


def _count(shapes: Shapes, base: str) -> int:
    return len({name[len(base) :].split(".")[0] for name in shapes if name.startswith(base)})
