"""The layouts of Hugging Face's `transformers`, a table for each kind of tower.

Names are those on the hub. Defaults are those of the configuration classes, because files on the hub leave out what
equals them.
"""

from __future__ import annotations

from dataclasses import replace

from models.weights.layout import Choice, Json, Layout
from models.weights.rules import WeightsError


def _hub_file(layout: Layout, said: Json) -> Json:
    architecture = layout.architecture[bool(said.get("projection_dim"))]
    return {"model_type": layout.name, "architectures": [architecture], "dtype": "float32"} | said


_GELUS = {"gelu": "gelu", "quick_gelu": "quick_gelu"}
_GELUS |= {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}
_GATED_ACT = Choice("activation", _GELUS | {"swiglu": "swiglu"})
_KEYS: Json = (
    {"hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_attention_heads"}
    | {"intermediate_size": "ffn_hidden_size", "layer_norm_eps": "layernorm_eps"}
    | {"hidden_act": Choice("activation", _GELUS)}
)
_VISION_KEYS = _KEYS | {"image_size": "image_size", "patch_size": "patch_size", "num_channels": Choice("", {3: None})}
_TEXT_KEYS = _KEYS | {"vocab_size": "vocab_size", "max_position_embeddings": "max_length", "pad_token_id": "pad_id"}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_DEFAULTS = _BASE | {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
_VISION_DEFAULTS = _DEFAULTS | {"image_size": 224, "patch_size": 16, "num_channels": 3}
_DIMS = {"class_token": 3, "position": 3, "register_token": 3, "pool.probe": 3}

# ViT, DINOv2, DINOv3

VIT = Layout(
    tower="vision",
    name="vit",
    architecture=("ViTModel", "ViTModel"),
    wrap=_hub_file,
    keys=_VISION_KEYS | {"qkv_bias": "qkv_bias"},
    fixed={"pooling": "class", "class_position": True},
    defaults=_VISION_DEFAULTS | {"qkv_bias": True},
    prefixes=("", "vit."),
    known=(r".*pooler\..*", r"classifier\..*", r".*mask_token", r"decoder\..*"),
    dims=_DIMS,
    names={"stem.": "embeddings.patch_embeddings.projection.", "final_norm.": "layernorm."}
    | {"class_token": "embeddings.cls_token", "position": "embeddings.position_embeddings"}
    | {"layer": "encoder.layer.{i}.", "norm1.": "layernorm_before.", "norm2.": "layernorm_after."}
    | {"qkv.": "attention.attention.(query|key|value).", "proj.": "attention.output.dense."}
    | {"fc1.": "intermediate.dense.", "fc2.": "output.dense."},
)


def _unfold_dinov2(said: Json) -> Json:
    wide = int(said["hidden_size"] * said["mlp_ratio"])
    if not said["use_swiglu_ffn"]:
        return said | {"intermediate_size": wide}
    return said | {"intermediate_size": (int(wide * 2 / 3) + 7) // 8 * 8, "hidden_act": "swiglu"}


def _fold_dinov2(said: Json) -> Json:
    gated = said["hidden_act"] == "swiglu"
    ratio = said.pop("intermediate_size") * (1.5 if gated else 1) / said["hidden_size"]
    said |= {"mlp_ratio": round(ratio), "use_swiglu_ffn": gated}  # transformers takes only whole numbers
    return said | {"hidden_act": "gelu"} if gated else said


DINOV2 = replace(
    VIT,
    name="dinov2",
    architecture=("Dinov2Model", "Dinov2Model"),
    keys=VIT.keys | {"layerscale_value": "layer_scale", "hidden_act": _GATED_ACT},
    defaults=VIT.defaults
    | {"layer_norm_eps": 1e-6, "patch_size": 14, "mlp_ratio": 4, "use_swiglu_ffn": False, "layerscale_value": 1.0},
    unfold=_unfold_dinov2,
    fold=_fold_dinov2,
    prefixes=("", "dinov2."),
    names=VIT.names
    | {"norm1.": "norm1.", "norm2.": "norm2.", "scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1"}
    | {"fc1.": "mlp.fc1.", "gated.fc1.": "mlp.weights_in.", "fc2.": "mlp.fc2.", "gated.fc2.": "mlp.weights_out."},
)
DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    name="dinov2_with_registers",
    architecture=("Dinov2WithRegistersModel", "Dinov2WithRegistersModel"),
    keys=DINOV2.keys | {"num_register_tokens": "register_tokens"},
    fixed=DINOV2.fixed | {"position_resize": "bicubic_antialias"},
    defaults=DINOV2.defaults | {"patch_size": 16, "num_register_tokens": 4},
    prefixes=("", "dinov2_with_registers."),
    names=DINOV2.names | {"register_token": "embeddings.register_tokens"},
)


def _fold_dinov3(said: Json) -> Json:
    gated = said["hidden_act"] == "swiglu"
    return said | ({"use_gated_mlp": True, "hidden_act": "silu"} if gated else {"use_gated_mlp": False})


DINOV3 = replace(
    VIT,
    name="dinov3_vit",
    architecture=("DINOv3ViTModel", "DINOv3ViTModel"),
    keys=_VISION_KEYS
    | {"layerscale_value": "layer_scale", "hidden_act": _GATED_ACT}
    | {"rope_theta": "rotary_base", "num_register_tokens": "register_tokens", "query_bias": Choice("", {True: None})}
    | {"key_bias": Choice("key_bias", {False: False}), "value_bias": Choice("", {True: None})},
    fixed={"pooling": "class", "positions": "rotary"},
    defaults=_VISION_DEFAULTS
    | {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "layer_norm_eps": 1e-5}
    | {"rope_theta": 100.0, "layerscale_value": 1.0, "num_register_tokens": 0, "use_gated_mlp": False}
    | {"query_bias": True, "key_bias": False, "value_bias": True},
    unfold=lambda said: said | ({"hidden_act": "swiglu"} if said["use_gated_mlp"] else {}),
    fold=_fold_dinov3,
    prefixes=("", "model."),
    names=DINOV2_WITH_REGISTERS.names
    | {"stem.": "embeddings.patch_embeddings.", "layer": "layer.{i}.", "final_norm.": "norm."}
    | {"qkv.": "attention.(q|k|v)_proj.", "proj.": "attention.o_proj."}
    | {"fc1.": "mlp.up_proj.", "gated.fc1.": "mlp.(gate|up)_proj.", "fc2.": "mlp.down_proj."}
    | {"gated.fc2.": "mlp.down_proj."},
)

# CLIP, SigLIP, SigLIP 2: pairs

_PAIR_LAYERS = {"layer": "encoder.layers.{i}.", "norm1.": "layer_norm1.", "norm2.": "layer_norm2."} | {
    "qkv.": "self_attn.(q|k|v)_proj.",
    "proj.": "self_attn.out_proj.",
    "fc1.": "mlp.fc1.",
    "fc2.": "mlp.fc2.",
}
_PAIR_KNOWN = (r"logit_(scale|bias)", r".*position_ids", r"(visual|text)_projection\.weight")
_CLIP_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 512}
_SIGLIP_DEFAULTS = _DEFAULTS | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}

CLIP_VISION = Layout(
    tower="vision",
    name="clip_vision_model",
    whole="clip",
    section="vision_config",
    architecture=("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    wrap=_hub_file,
    keys=_VISION_KEYS | {"projection_dim": "projection_dim"},
    fixed={"pooling": "class", "class_position": True, "patch_bias": False, "embedding_norm": True},
    defaults=_VISION_DEFAULTS | _CLIP_DEFAULTS | {"patch_size": 32},
    prefixes=("vision_model.", ""),
    known=_PAIR_KNOWN,
    sibling=r"text_model\..*|text_projection\..*",
    dims={"class_token": 1, "position": 2},
    names=_PAIR_LAYERS
    | {"stem.": "embeddings.patch_embedding.", "class_token": "embeddings.class_embedding"}
    | {"position": "embeddings.position_embedding.weight", "embedding_norm.": "pre_layrnorm."}
    | {"final_norm.": "post_layernorm.", "projection.": "/visual_projection."},
)
CLIP_TEXT = Layout(
    tower="text",
    name="clip_text_model",
    whole="clip",
    section="text_config",
    architecture=("CLIPTextModel", "CLIPTextModelWithProjection"),
    wrap=_hub_file,
    keys=_TEXT_KEYS | {"eos_token_id": "eos_id", "projection_dim": "projection_dim"},
    fixed={"pooling": "eos", "causal": True, "embedding_norm": False, "mask_padding": False},
    defaults=_CLIP_DEFAULTS
    | {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}
    | {"vocab_size": 49408, "max_position_embeddings": 77, "pad_token_id": 1, "eos_token_id": 49407},
    # Before transformers 4.32 the end was written as 2, though it was, as in every CLIP vocabulary, the last piece.
    unfold=lambda said: said | ({"eos_token_id": said["vocab_size"] - 1} if said["eos_token_id"] == 2 else {}),
    prefixes=("text_model.", ""),
    known=_PAIR_KNOWN,
    sibling=r"vision_model\..*|visual_projection\..*",
    names=_PAIR_LAYERS
    | {"words.weight": "embeddings.token_embedding.weight", "position": "embeddings.position_embedding.weight"}
    | {"final_norm.": "final_layer_norm.", "projection.": "/text_projection."},
)
SIGLIP_VISION = replace(
    CLIP_VISION,
    name="siglip_vision_model",
    whole="siglip",
    architecture=("SiglipVisionModel", "SiglipVisionModel"),
    keys=_VISION_KEYS | {"vision_use_head": Choice("pooling", {False: "mean", True: "attention"})},
    fixed={},
    defaults=_VISION_DEFAULTS | _SIGLIP_DEFAULTS | {"vision_use_head": True},
    dims={"position": 2, "pool.probe": 3},
    names=CLIP_VISION.names
    | {"pool.probe": "head.probe", "pool.qkv.": "head.attention.in_proj_", "pool.proj.": "head.attention.out_proj."}
    | {"pool.norm.": "head.layernorm.", "pool.fc1.": "head.mlp.fc1.", "pool.fc2.": "head.mlp.fc2."},
)
SIGLIP_TEXT = replace(
    CLIP_TEXT,
    name="siglip_text_model",
    whole="siglip",
    architecture=("SiglipTextModel", "SiglipTextModel"),
    keys=_TEXT_KEYS | {"projection_size": "projection_dim"},
    fixed={"pooling": "last", "embedding_norm": False, "mask_padding": False, "projection_bias": True},
    defaults=_DEFAULTS | _SIGLIP_DEFAULTS | {"vocab_size": 32000, "max_position_embeddings": 64, "pad_token_id": 1},
    unfold=lambda said: {"projection_size": said["hidden_size"]} | said,
    known=(*_PAIR_KNOWN, r"(text_model\.)?head\..*"),
    names=CLIP_TEXT.names | {"projection.": "head."},
)
SIGLIP2_VISION = replace(
    SIGLIP_VISION,
    name="siglip2_vision_model",
    whole="siglip2",
    architecture=("Siglip2VisionModel", "Siglip2VisionModel"),
    fixed={"position_resize": "bilinear_antialias"},
    defaults=SIGLIP_VISION.defaults | {"num_patches": 256},
    unfold=lambda said: said | {"image_size": round(said["num_patches"] ** 0.5) * said["patch_size"]},
    fold=lambda said: said | {"num_patches": (said["image_size"] // said["patch_size"]) ** 2},
    flat_patches=True,
)
SIGLIP2_TEXT = replace(
    SIGLIP_TEXT,
    name="siglip2_text_model",
    whole="siglip2",
    architecture=("Siglip2TextModel", "Siglip2TextModel"),
)

# BERT, RoBERTa, XLM-R

BERT = Layout(
    tower="text",
    name="bert",
    architecture=("BertModel", "BertModel"),
    wrap=_hub_file,
    keys=_TEXT_KEYS | {"type_vocab_size": "token_types"},
    fixed={"post_norm": True, "pooling": "class"},
    defaults=_DEFAULTS | {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "pad_token_id": 0},
    prefixes=("", "bert."),
    known=(r".*pooler\..*", r"(cls|lm_head|classifier|qa_outputs)\..*", r".*position_ids"),
    names={"words.weight": "embeddings.word_embeddings.weight", "position": "embeddings.position_embeddings.weight"}
    | {"token_type": "embeddings.token_type_embeddings.weight", "norm.": "embeddings.LayerNorm."}
    | {"layer": "encoder.layer.{i}.", "norm1.": "attention.output.LayerNorm.", "norm2.": "output.LayerNorm."}
    | {"qkv.": "attention.self.(query|key|value).", "proj.": "attention.output.dense."}
    | {"fc1.": "intermediate.dense.", "fc2.": "output.dense."},
)


def _unfold_roberta(said: Json) -> Json:
    offset = said["pad_token_id"] + 1  # positions count on from the id of padding
    return said | {"offset": offset, "max_position_embeddings": said["max_position_embeddings"] - offset}


def _fold_roberta(said: Json) -> Json:
    said["max_position_embeddings"] += said.pop("offset")
    return said


ROBERTA = replace(
    BERT,
    name="roberta",
    architecture=("RobertaModel", "RobertaModel"),
    keys=BERT.keys | {"offset": "position_offset"},
    defaults=BERT.defaults | {"pad_token_id": 1, "vocab_size": 50265},
    unfold=_unfold_roberta,
    fold=_fold_roberta,
    prefixes=("", "roberta."),
)
XLM_ROBERTA = replace(
    ROBERTA,
    name="xlm-roberta",
    architecture=("XLMRobertaModel", "XLMRobertaModel"),
    defaults=BERT.defaults | {"pad_token_id": 1},
)

_VISION = (VIT, DINOV2, DINOV2_WITH_REGISTERS, DINOV3, CLIP_VISION, SIGLIP_VISION, SIGLIP2_VISION)
_TEXT = (CLIP_TEXT, SIGLIP_TEXT, SIGLIP2_TEXT, BERT, ROBERTA, XLM_ROBERTA)
FAMILIES: dict[str, Layout] = {layout.name: layout for layout in (*_VISION, *_TEXT)}


def family_of(config: Json, tower: str) -> tuple[Layout, Json]:
    """The family of that `tower` in a config.json, and what it says of it, with the defaults.

    Raises:
        WeightsError: an unknown model_type, or one without that tower.
    """
    kind = config.get("model_type", "")
    candidates = [layout for layout in FAMILIES.values() if layout.tower == tower]
    for layout in candidates:
        if kind not in (layout.name, layout.whole):
            continue
        said = dict(config)
        if kind == layout.whole:
            shared = {key: config[key] for key in ("projection_dim",) if key in config}
            said = (config.get(layout.section) or {}) | shared
        return layout, layout.defaults | {key: value for key, value in said.items() if value is not None}
    kinds = sorted({name for layout in candidates for name in (layout.name, layout.whole) if name})
    raise WeightsError(f"config.json's model_type is '{kind}'; a {tower} tower comes from {', '.join(kinds)}")
