"""The layouts of timm's VisionTransformer and of open_clip's two transformers, a table each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from models.weights.layout import Choice, Json, Layout
from models.weights.rules import WeightsError

Shapes = Mapping[str, tuple[int, ...]]


def _ratio(hidden: int, wide: int) -> float:
    """The factor that both libraries round down to `wide` when they multiply `hidden` by it."""
    ratio = wide / hidden
    return ratio if int(hidden * ratio) == wide else math.nextafter(ratio, math.inf)


# timm: an architecture of its registry, and what differs from it as model_args

_GATED = "giant_patch14_dinov2|giant_patch14_reg4_dinov2"
_GELU_TANH = "giantopt|so400m_patch16_siglip|base_patch32_siglip|large_patch16_siglip_(gap_)?512"
# Heads by width; elsewhere a head is 64 wide.
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}


def _unfold_timm(said: Json) -> Json:
    architecture = said["architecture"]
    gated = said.get("gated", bool(re.search(_GATED, architecture)))
    fc1 = int(said["embed_dim"] * said["mlp_ratio"])
    return said | {
        "ffn": fc1 // 2 if gated else fc1,
        "eps": 1e-5 if "clip" in architecture else 1e-6,
        "act_layer": "swiglu" if gated else said["act_layer"],
        "init_values": said["init_values"] or 0.0,
        "patch_bias": not said["pre_norm"],
        # With registers, timm's positions include those of the registers, or are those of the patches only.
        "class_position": said["class_token"] and not said["no_embed_class"] and not said["reg_tokens"],
    }


def _fold_timm(said: Json) -> Json:
    gated = said["act_layer"] == "swiglu"
    clip = said.pop("eps") == 1e-5  # not among the arguments that a file can hold, but clip's architectures have it
    wide = said.pop("ffn") * (2 if gated else 1)
    kind = "giant_patch14_dinov2" if gated else "base_patch16_clip_224" if clip else "base_patch16_224"
    class_position = said.pop("class_position")
    del said["patch_bias"]
    if gated:
        del said["act_layer"]  # the architecture's own
    return said | {
        "architecture": f"vit_{kind}",
        "mlp_ratio": _ratio(said["embed_dim"], wide),
        "init_values": said["init_values"] or None,
        "no_embed_class": not class_position,
        "fc_norm": False,
    }


def _timm_file(layout: Layout, said: Json) -> Json:
    architecture, side = said.pop("architecture"), said["img_size"]
    shown = {"architecture": architecture, "num_classes": 0, "num_features": said["embed_dim"]}
    sizes = {"input_size": [3, side, side], "fixed_input_size": True, "num_classes": 0}
    places = {"first_conv": "patch_embed.proj", "classifier": "head"}
    return shown | {"model_args": said | {"num_classes": 0}, "pretrained_cfg": sizes | places}


TIMM = Layout(
    tower="vision",
    name="timm",
    keys={"img_size": "image_size", "patch_size": "patch_size", "embed_dim": "hidden_size", "depth": "num_layers"}
    | {"num_heads": "num_attention_heads", "ffn": "ffn_hidden_size", "eps": "layernorm_eps"}
    | {"act_layer": Choice("activation", {name: name for name in ("gelu", "gelu_tanh", "quick_gelu", "swiglu")})}
    | {"global_pool": Choice("pooling", {"token": "class", "avg": "mean", "map": "attention"})}
    | {"class_token": "class_token", "class_position": "class_position", "reg_tokens": "register_tokens"}
    | {"patch_bias": "patch_bias", "qkv_bias": "qkv_bias", "qk_norm": "qk_norm", "pre_norm": "embedding_norm"}
    | {"init_values": "layer_scale"},
    fixed={"position_resize": "bicubic_antialias"},
    defaults={},
    unfold=_unfold_timm,
    fold=_fold_timm,
    wrap=_timm_file,
    known=(r"head\..*", r"head_dist\..*"),
    dims={"class_token": 3, "position": 3, "register_token": 3, "pool.probe": 3},
    names={"stem.": "patch_embed.proj.", "class_token": "cls_token", "position": "pos_embed"}
    | {"register_token": "reg_token", "embedding_norm.": "norm_pre.", "final_norm.": "norm."}
    | {"layer": "blocks.{i}.", "norm1.": "norm1.", "norm2.": "norm2.", "scale1": "ls1.gamma", "scale2": "ls2.gamma"}
    | {"qkv.": "attn.qkv.", "q_norm.": "attn.q_norm.", "k_norm.": "attn.k_norm.", "proj.": "attn.proj."}
    | {"fc1.": "mlp.fc1.", "fc2.": "mlp.fc2."}
    | {"pool.probe": "attn_pool.latent", "pool.qkv.": "attn_pool.(q|kv).", "pool.proj.": "attn_pool.proj."}
    | {"pool.norm.": "attn_pool.norm.", "pool.fc1.": "attn_pool.mlp.fc1.", "pool.fc2.": "attn_pool.mlp.fc2."},
)


def timm_said(shapes: Shapes, architecture: str, args: Json, prefix: str = "") -> Json:
    """Configuration of a VisionTransformer of timm, from the shapes of its tensors after `prefix`, and from its
    arguments where shapes do not tell.

    Raises:
        WeightsError: the tensors are not those of one.
    """
    own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    if "blocks.0.attn.qkv.weight" not in own or "pos_embed" not in own:
        raise WeightsError(
            f"'{architecture}' is not a VisionTransformer of timm: blocks.0.attn.qkv.weight or pos_embed is missing"
        )
    hidden, _, patch, _ = own["patch_embed.proj.weight"]
    fc1, fc2 = own["blocks.0.mlp.fc1.weight"][0], own["blocks.0.mlp.fc2.weight"][1]
    positions = own["pos_embed"][-2]
    grid = math.isqrt(positions)
    quick, tanh = "quickgelu" in architecture, re.search(_GELU_TANH, architecture)
    blocks = {name.split(".")[1] for name in own if name.startswith("blocks.")}
    return (
        {"architecture": architecture, "img_size": grid * patch, "patch_size": patch, "embed_dim": hidden}
        | {"depth": len(blocks)}
        | {"num_heads": _HEADS.get(hidden, hidden // 64), "mlp_ratio": _ratio(hidden, fc1), "gated": fc1 == 2 * fc2}
        | {"act_layer": "quick_gelu" if quick else "gelu_tanh" if tanh else "gelu"}
        | {"global_pool": "map" if "attn_pool.latent" in own else "token" if "cls_token" in own else "avg"}
        | {"class_token": "cls_token" in own, "no_embed_class": positions == grid * grid}
        | {"qkv_bias": "blocks.0.attn.qkv.bias" in own, "qk_norm": "blocks.0.attn.q_norm.weight" in own}
        | {"pre_norm": "norm_pre.weight" in own, "init_values": 1e-5 if "blocks.0.ls1.gamma" in own else None}
        | {"reg_tokens": own["reg_token"][1] if "reg_token" in own else 0}
        | {key: args[key] for key in ("num_heads", "act_layer", "global_pool") if key in args}
    )


# open_clip: a model_cfg with a part for each tower


def _unfold_open_clip(said: Json) -> Json:
    tanh = (said["act_kwargs"] or {}).get("approximate") == "tanh"
    return said | {
        "ffn": int(said["width"] * said["mlp_ratio"]),
        "eps": (said["norm_kwargs"] or {}).get("eps", 1e-5),
        "act": "quick_gelu" if said["quick_gelu"] else "gelu_tanh" if tanh else "gelu",
        "ls_init_value": said["ls_init_value"] or 0.0,
    }


def _fold_open_clip(said: Json) -> Json:
    eps, act = said.pop("eps"), said.pop("act")
    wide = said.pop("ffn")
    return said | {
        "mlp_ratio": _ratio(said["width"], wide),
        "norm_kwargs": {"eps": eps},
        "act_kwargs": {"approximate": "tanh"} if act == "gelu_tanh" else None,
        "quick_gelu": act == "quick_gelu",
        "ls_init_value": said["ls_init_value"] or None,
        "embed_dim": said["embed_dim"] or said["width"],
    }


def _unfold_open_clip_vision(said: Json) -> Json:
    return _unfold_open_clip(said) | {"heads": said["width"] // said["head_width"]}


def _fold_open_clip_vision(said: Json) -> Json:
    head_width = said["width"] // said.pop("heads")
    return _fold_open_clip(said) | {"head_width": head_width}


def _unfold_open_clip_text(said: Json) -> Json:
    said = _unfold_open_clip(said)
    highest = {"eos_id": said["vocab_size"] - 1} if said["pool_type"] == "argmax" else {}
    return said | highest | ({"embed_dim": 0} if said["proj_type"] == "none" else {})


def _fold_open_clip_text(said: Json) -> Json:
    kind = "linear" if said["embed_dim"] else "none"
    eos = {"pool_type": "eos"} if said["pool_type"] == "argmax" and said["eos_id"] != said["vocab_size"] - 1 else {}
    return _fold_open_clip(said) | {"proj_type": kind} | eos


def _open_clip_file(layout: Layout, said: Json) -> Json:
    shared = {key: said.pop(key) for key in ("embed_dim", "quick_gelu")}
    return {"model_cfg": {**shared, "custom_text": True, layout.section: said}, "preprocess_cfg": {}}


_OPEN_CLIP_KEYS = (
    {"width": "hidden_size", "layers": "num_layers", "heads": "num_attention_heads", "ffn": "ffn_hidden_size"}
    | {"act": Choice("activation", {name: name for name in ("gelu", "gelu_tanh", "quick_gelu")})}
    | {"eps": "layernorm_eps", "ls_init_value": "layer_scale", "embed_dim": "projection_dim"}
)
_OPEN_CLIP_DEFAULTS: Json = {"layers": 12, "mlp_ratio": 4.0, "quick_gelu": False}
_OPEN_CLIP_DEFAULTS |= {"ls_init_value": None, "norm_kwargs": None, "act_kwargs": None}
_OPEN_CLIP_KNOWN = (r"logit_(scale|bias)", r".*attn_mask")
OPEN_CLIP_VISION = Layout(
    tower="vision",
    name="open_clip",
    section="vision_cfg",
    keys=_OPEN_CLIP_KEYS
    | {"image_size": "image_size", "patch_size": "patch_size"}
    | {"no_ln_pre": Choice("embedding_norm", {False: True, True: False})}
    | {"pool_type": Choice("pooling", {"tok": "class", "avg": "mean"})},
    fixed={"class_token": True, "class_position": True, "patch_bias": False, "position_resize": "bicubic_antialias"},
    defaults=_OPEN_CLIP_DEFAULTS
    | {"width": 768, "head_width": 64, "patch_size": 16, "image_size": 224, "no_ln_pre": False, "pool_type": "tok"},
    unfold=_unfold_open_clip_vision,
    fold=_fold_open_clip_vision,
    wrap=_open_clip_file,
    prefixes=("visual.",),
    known=(*_OPEN_CLIP_KNOWN, r"visual\.proj", r"visual\.head\..*"),
    sibling=r"(?!visual\.|logit).*",
    dims={"class_token": 1, "position": 2},
    names={"stem.": "conv1.", "class_token": "class_embedding", "position": "positional_embedding"}
    | {"embedding_norm.": "ln_pre.", "final_norm.": "ln_post.", "projection.weight": "proj^T"}
    | {"layer": "transformer.resblocks.{i}.", "norm1.": "ln_1.", "norm2.": "ln_2."}
    | {"qkv.": "attn.in_proj_", "proj.": "attn.out_proj.", "fc1.": "mlp.c_fc.", "fc2.": "mlp.c_proj."}
    | {"scale1": "ls_1.gamma", "scale2": "ls_2.gamma"},
)
OPEN_CLIP_TEXT = replace(
    OPEN_CLIP_VISION,
    tower="text",
    section="text_cfg",
    keys=_OPEN_CLIP_KEYS
    | {"vocab_size": "vocab_size", "context_length": "max_length", "pad_id": "pad_id", "eos_id": "eos_id"}
    | {"no_causal_mask": Choice("causal", {False: True, True: False}), "proj_bias": "projection_bias"}
    | {"pool_type": Choice("pooling", {"argmax": "eos", "eos": "eos", "first": "class", "last": "last"})},
    fixed={"embedding_norm": False, "mask_padding": False},
    defaults=_OPEN_CLIP_DEFAULTS
    | {"width": 512, "heads": 8, "context_length": 77, "vocab_size": 49408, "pad_id": 0, "eos_id": 2}
    | {"no_causal_mask": False, "pool_type": "argmax", "proj_bias": False, "proj_type": "linear"},
    unfold=_unfold_open_clip_text,
    fold=_fold_open_clip_text,
    prefixes=("text.", ""),
    known=(*_OPEN_CLIP_KNOWN, r"(text\.)?text_projection.*"),
    sibling=r"visual\..*",
    dims={},
    names=OPEN_CLIP_VISION.names
    | {"words.weight": "token_embedding.weight", "final_norm.": "ln_final."}
    | {"projection.weight": "text_projection^T", "biased.projection.": "text_projection."},
)


def open_clip_of(shapes: Shapes, config: Json, tower: str) -> tuple[Layout, Json]:
    """The layout of a `tower` in an open_clip model, and what its model_cfg says of it, with the defaults.

    Raises:
        WeightsError: a tower of another project, or one that ends in a token of its own.
    """
    layout = OPEN_CLIP_VISION if tower == "vision" else OPEN_CLIP_TEXT
    said = config.get(layout.section) or {}
    if architecture := said.get("timm_model_name"):
        trunk = replace(TIMM, prefixes=("visual.trunk.",), known=layout.known, sibling=layout.sibling)
        return trunk, timm_said(shapes, architecture, {}, "visual.trunk.")
    if tower == "vision" and "visual.class_embedding" not in shapes:
        raise WeightsError("the image tower is not a vision transformer: visual.class_embedding is missing")
    prefix = layout.prefix(shapes)
    if prefix is None or f"{prefix}cls_emb" in shapes:
        raise WeightsError("the text tower is not open_clip's own transformer; import it from its own project")
    shared = {key: config[key] for key in ("embed_dim", "quick_gelu") if key in config}
    return layout, layout.defaults | said | shared
