"""The layouts of Hugging Face's `transformers`: a config.json to our configuration and back, and the names of the tensors, family by family.

Names are those on the hub. Defaults are those of the configuration classes, because files on the hub leave out what equals them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from models.text import TextConfig
from models.vision import VisionConfig
from models.weights.names import LayerNames, PoolNames, TextNames, VisionNames
from models.weights.rules import WeightsError

Json = dict[str, Any]
Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of tower.

    Args:
        tower: vision or text.
        model_type: of a config.json that describes this tower alone; also what it is exported as.
        whole: model_type of one that describes both towers of a pair; this one is then under `section`.
        section: see `whole`.
        architecture: the class of transformers that reads it: (without projection, with it).
        prefixes: what may stand before the names; the first is written.
        defaults: values of config.json that may be left out.
        fields: config.json, with the defaults, to our fields.
        describe: our configuration to config.json.
        names: of the tensors.
        known: patterns of tensors that are no part of the tower (heads of the training it had).
        sibling: pattern of the other tower's tensors, where a folder holds a pair.
    """

    tower: str
    model_type: str
    whole: str = ""
    section: str = ""
    architecture: tuple[str, str]
    prefixes: tuple[str, ...]
    defaults: Json
    fields: Callable[[Json], Fields]
    describe: Callable[[Any], Fields]
    names: Any
    known: tuple[str, ...]
    sibling: str = ""


_SIZES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "layernorm_eps": "layer_norm_eps",
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_SIZE_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}


def _sizes(config: Json) -> Fields:
    if config["hidden_act"] not in _ACTIVATIONS:
        raise WeightsError(f"hidden_act is '{config['hidden_act']}'; known are {', '.join(_ACTIVATIONS)}")
    return {ours: config[theirs] for ours, theirs in _SIZES.items()} | {
        "activation": _ACTIVATIONS[config["hidden_act"]]
    }


def _described(config: VisionConfig | TextConfig) -> Fields:
    """What every config.json says of a tower's sizes."""
    theirs = {name: getattr(config, ours) for ours, name in _SIZES.items()} | {"intermediate_size": config.mlp_size}
    names = {ours: name for name, ours in reversed(_ACTIVATIONS.items())}
    return theirs | {"hidden_act": names.get(config.activation, config.activation)}


def _grid(config: Json) -> Fields:
    """Patches and learned positions; an image that is no whole number of patches loses its rest."""
    if config.get("num_channels", 3) != 3:
        raise WeightsError(f"num_channels is {config['num_channels']}; our towers see 3")
    grid, patch = config["image_size"] // config["patch_size"], config["patch_size"]
    return {"image_size": grid * patch, "patch_size": patch, "position_grid": grid}


def _described_grid(config: VisionConfig) -> Fields:
    grid = config.position_grid or config.image_size // config.patch_size
    return {"image_size": grid * config.patch_size, "patch_size": config.patch_size, "num_channels": 3}


def _vit(config: Json) -> Fields:
    class_token = {"pooling": "class", "class_position": True, "qkv_bias": config["qkv_bias"]}
    return _sizes(config) | _grid(config) | class_token


def _dinov2(config: Json) -> Fields:
    hidden, ratio = config["hidden_size"], config["mlp_ratio"]
    wide = int(hidden * ratio)
    gated = config["use_swiglu_ffn"]
    fields = _vit(config | {"intermediate_size": (int(wide * 2 / 3) + 7) // 8 * 8 if gated else wide})
    fields |= {"layer_scale": config["layerscale_value"], "register_tokens": config["num_register_tokens"]}
    antialias = {"position_resize": "bicubic_antialias"} if config["num_register_tokens"] else {}
    return fields | antialias | ({"activation": "swiglu"} if gated else {})


def _describe_dinov2(config: VisionConfig) -> Fields:
    gated = config.activation == "swiglu"
    ratio = config.mlp_size * (1.5 if gated else 1) / config.hidden_size
    theirs = _described(config) | _described_grid(config)
    del theirs["intermediate_size"]
    return theirs | {
        "mlp_ratio": round(ratio),  # transformers takes whole numbers alone
        "use_swiglu_ffn": gated,
        "qkv_bias": config.qkv_bias,
        "layerscale_value": config.layer_scale,
        "num_register_tokens": config.register_tokens,
        **({"hidden_act": "gelu"} if gated else {}),
    }


def _dinov3(config: Json) -> Fields:
    if config["use_gated_mlp"]:
        gated = {"activation": "swiglu"}
        config = config | {"hidden_act": "gelu"}
    else:
        gated = {}
    for bias, wanted in {"query_bias": True, "value_bias": True, "key_bias": False}.items():
        if config[bias] is not wanted:
            raise WeightsError(f"{bias} is {config[bias]}; only {wanted} is known for dinov3_vit")
    grid = _grid(config)
    del grid["position_grid"]
    return (
        _sizes(config)
        | grid
        | gated
        | {
            "key_bias": False,
            "positions": "rotary",
            "rotary_base": config["rope_theta"],
            "pooling": "class",
            "layer_scale": config["layerscale_value"],
            "register_tokens": config["num_register_tokens"],
        }
    )


def _describe_dinov3(config: VisionConfig) -> Fields:
    gated = config.activation == "swiglu"
    return (
        _described(config)
        | _described_grid(config)
        | {
            "use_gated_mlp": gated,
            "hidden_act": "silu" if gated else _described(config)["hidden_act"],
            "rope_theta": config.rotary_base,
            "layerscale_value": config.layer_scale,
            "num_register_tokens": config.register_tokens,
        }
    )


def _clip_vision(config: Json) -> Fields:
    fields = _sizes(config) | _grid(config) | {"pooling": "class", "class_position": True}
    return fields | {"patch_bias": False, "embedding_norm": True, "projection_dim": config["projection_dim"]}


def _clip_text(config: Json) -> Fields:
    # Before transformers 4.32 the end was written as 2, though it was, as in every CLIP vocabulary, the last piece.
    end = config["vocab_size"] - 1 if config["eos_token_id"] == 2 else config["eos_token_id"]
    return _pair_text(config) | {
        "eos_id": end,
        "causal": True,
        "pooling": "eos",
        "projection_dim": config["projection_dim"],
    }


def _siglip_vision(config: Json) -> Fields:
    pooling = "attention" if config["vision_use_head"] else "mean"
    return _sizes(config) | _grid(config) | {"pooling": pooling}


def _siglip2_vision(config: Json) -> Fields:
    side = round(config["num_patches"] ** 0.5)
    fields = _siglip_vision(config | {"image_size": side * config["patch_size"]})
    return fields | {"position_resize": "bilinear_antialias"}


def _describe_siglip(config: VisionConfig) -> Fields:
    return _described(config) | _described_grid(config) | {"vision_use_head": config.pooling == "attention"}


def _describe_siglip2(config: VisionConfig) -> Fields:
    return _describe_siglip(config) | {"num_patches": config.num_positions}


def _pair_text(config: Json) -> Fields:
    return _sizes(config) | {
        "vocab_size": config["vocab_size"],
        "max_length": config["max_position_embeddings"],
        "pad_id": config["pad_token_id"],
        "embedding_norm": False,
        "mask_padding": False,
    }


def _siglip_text(config: Json) -> Fields:
    projection = {"projection_dim": config["projection_size"], "projection_bias": True}
    return _pair_text(config) | {"pooling": "last"} | projection


def _describe_text(config: TextConfig) -> Fields:
    return _described(config) | {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length + config.position_offset,
        "pad_token_id": config.pad_id,
    }


def _bert(config: Json) -> Fields:
    return _sizes(config) | {
        "vocab_size": config["vocab_size"],
        "max_length": config["max_position_embeddings"],
        "pad_id": config["pad_token_id"],
        "token_types": config["type_vocab_size"],
        "post_norm": True,
        "pooling": "class",
    }


def _roberta(config: Json) -> Fields:
    offset = config["pad_token_id"] + 1
    return _bert(config) | {"position_offset": offset, "max_length": config["max_position_embeddings"] - offset}


_VIT_LAYERS = LayerNames(
    layer="encoder.layer.{i}.",
    qkv=("attention.attention.query.", "attention.attention.key.", "attention.attention.value."),
    proj="attention.output.dense.",
    norm1="layernorm_before.",
    norm2="layernorm_after.",
    fc1="intermediate.dense.",
    fc2="output.dense.",
)
_VIT_NAMES = VisionNames(
    layers=_VIT_LAYERS,
    patch="embeddings.patch_embeddings.projection.",
    class_token="embeddings.cls_token",
    position="embeddings.position_embeddings",
    register="embeddings.register_tokens",
    final_norm="layernorm.",
)
_DINOV2_NAMES = replace(
    _VIT_NAMES,
    layers=replace(
        _VIT_LAYERS,
        norm1="norm1.",
        norm2="norm2.",
        fc1="mlp.fc1.",
        fc2="mlp.fc2.",
        gated_fc1=("mlp.weights_in.",),
        gated_fc2="mlp.weights_out.",
        scale1="layer_scale1.lambda1",
        scale2="layer_scale2.lambda1",
    ),
)
_DINOV3_NAMES = replace(
    _DINOV2_NAMES,
    patch="embeddings.patch_embeddings.",
    final_norm="norm.",
    layers=replace(
        _DINOV2_NAMES.layers,
        layer="layer.{i}.",
        qkv=("attention.q_proj.", "attention.k_proj.", "attention.v_proj."),
        proj="attention.o_proj.",
        fc1="mlp.up_proj.",
        fc2="mlp.down_proj.",
        gated_fc1=("mlp.gate_proj.", "mlp.up_proj."),
        gated_fc2="mlp.down_proj.",
    ),
)
_PAIR_LAYERS = LayerNames(
    layer="encoder.layers.{i}.",
    qkv=("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    proj="self_attn.out_proj.",
    norm1="layer_norm1.",
    norm2="layer_norm2.",
    fc1="mlp.fc1.",
    fc2="mlp.fc2.",
)
_CLIP_VISION_NAMES = VisionNames(
    layers=_PAIR_LAYERS,
    patch="embeddings.patch_embedding.",
    class_token="embeddings.class_embedding",
    position="embeddings.position_embedding.weight",
    embedding_norm="pre_layrnorm.",
    final_norm="post_layernorm.",
    projection="visual_projection.weight",
    token_dims=1,
    position_dims=2,
    pool=PoolNames(
        probe="head.probe",
        qkv=("head.attention.in_proj_",),
        proj="head.attention.out_proj.",
        norm="head.layernorm.",
        fc1="head.mlp.fc1.",
        fc2="head.mlp.fc2.",
    ),
)
_CLIP_TEXT_NAMES = TextNames(
    layers=_PAIR_LAYERS,
    words="embeddings.token_embedding.weight",
    position="embeddings.position_embedding.weight",
    final_norm="final_layer_norm.",
    projection="text_projection.weight",
)
_BERT_NAMES = TextNames(
    layers=LayerNames(
        layer="encoder.layer.{i}.",
        qkv=("attention.self.query.", "attention.self.key.", "attention.self.value."),
        proj="attention.output.dense.",
        norm1="attention.output.LayerNorm.",
        norm2="output.LayerNorm.",
        fc1="intermediate.dense.",
        fc2="output.dense.",
    ),
    words="embeddings.word_embeddings.weight",
    position="embeddings.position_embeddings.weight",
    token_type="embeddings.token_type_embeddings.weight",
    norm="embeddings.LayerNorm.",
)

_VIT_DEFAULTS = _SIZE_DEFAULTS | {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "qkv_bias": True,
}
_DINOV2_DEFAULTS = _VIT_DEFAULTS | {
    "layer_norm_eps": 1e-6,
    "patch_size": 14,
    "mlp_ratio": 4,
    "use_swiglu_ffn": False,
    "layerscale_value": 1.0,
    "num_register_tokens": 0,
}
_CLIP_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 512}
_SIGLIP_DEFAULTS = _SIZE_DEFAULTS | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_SIGLIP_VISION_DEFAULTS = _SIGLIP_DEFAULTS | {"image_size": 224, "patch_size": 16, "vision_use_head": True}
_SIGLIP_TEXT_DEFAULTS = _SIGLIP_DEFAULTS | {"vocab_size": 32000, "max_position_embeddings": 64, "pad_token_id": 1}
_BERT_DEFAULTS = _SIZE_DEFAULTS | {
    "vocab_size": 30522,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
_PAIR_KNOWN = (
    r"logit_scale",
    r"logit_bias",
    r".*position_ids",
    r"visual_projection\.weight",
    r"text_projection\.weight",
)
_VISION_SIBLING, _TEXT_SIBLING = r"vision_model\..*|visual_projection\..*", r"text_model\..*|text_projection\..*"
_BERT_KNOWN = (r".*pooler\..*", r"cls\..*", r"lm_head\..*", r"classifier\..*", r"qa_outputs\..*", r".*position_ids")
_VIT_KNOWN = (r".*pooler\..*", r"classifier\..*", r".*mask_token", r"decoder\..*")


def _bert_family(
    model_type: str, prefix: str, architecture: str, fields: Callable[[Json], Fields], **defaults: int
) -> Family:
    return Family(
        tower="text",
        model_type=model_type,
        architecture=(architecture, architecture),
        prefixes=("", prefix),
        defaults=_BERT_DEFAULTS | defaults,
        fields=fields,
        describe=lambda config: _describe_text(config) | {"type_vocab_size": config.token_types},
        names=_BERT_NAMES,
        known=_BERT_KNOWN,
    )


def _siglip_families(
    name: str, library: str, vision: Callable[[Json], Fields], describe: Callable[..., Fields]
) -> list[Family]:
    naflex = name == "siglip2"
    return [
        Family(
            tower="vision",
            model_type=f"{name}_vision_model",
            whole=name,
            section="vision_config",
            architecture=(f"{library}VisionModel", f"{library}VisionModel"),
            prefixes=("vision_model.", ""),
            defaults=_SIGLIP_VISION_DEFAULTS | ({"num_patches": 256} if naflex else {}),
            fields=vision,
            describe=describe,
            names=replace(_CLIP_VISION_NAMES, flat_patches=naflex),
            known=_PAIR_KNOWN,
            sibling=_TEXT_SIBLING,
        ),
        Family(
            tower="text",
            model_type=f"{name}_text_model",
            whole=name,
            section="text_config",
            architecture=(f"{library}TextModel", f"{library}TextModel"),
            prefixes=("text_model.", ""),
            defaults=_SIGLIP_TEXT_DEFAULTS,
            fields=_siglip_text,
            describe=lambda config: _describe_text(config) | {"projection_size": config.projection_dim},
            names=replace(_CLIP_TEXT_NAMES, projection="{prefix}head"),
            known=(*_PAIR_KNOWN, r"(text_model\.)?head\..*"),
            sibling=_VISION_SIBLING,
        ),
    ]


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            tower="vision",
            model_type="vit",
            architecture=("ViTModel", "ViTModel"),
            prefixes=("", "vit."),
            defaults=_VIT_DEFAULTS,
            fields=_vit,
            describe=lambda c: _described(c) | _described_grid(c) | {"qkv_bias": c.qkv_bias},
            names=_VIT_NAMES,
            known=_VIT_KNOWN,
        ),
        Family(
            tower="vision",
            model_type="dinov2",
            architecture=("Dinov2Model", "Dinov2Model"),
            prefixes=("", "dinov2."),
            defaults=_DINOV2_DEFAULTS,
            fields=_dinov2,
            describe=_describe_dinov2,
            names=_DINOV2_NAMES,
            known=_VIT_KNOWN,
        ),
        Family(
            tower="vision",
            model_type="dinov2_with_registers",
            architecture=("Dinov2WithRegistersModel", "Dinov2WithRegistersModel"),
            prefixes=("", "dinov2_with_registers."),
            defaults=_DINOV2_DEFAULTS | {"patch_size": 16, "num_register_tokens": 4},
            fields=_dinov2,
            describe=_describe_dinov2,
            names=_DINOV2_NAMES,
            known=_VIT_KNOWN,
        ),
        Family(
            tower="vision",
            model_type="dinov3_vit",
            architecture=("DINOv3ViTModel", "DINOv3ViTModel"),
            prefixes=("", "model."),
            defaults={
                **_VIT_DEFAULTS,
                "hidden_size": 384,
                "num_attention_heads": 6,
                "intermediate_size": 1536,
                "layer_norm_eps": 1e-5,
                "rope_theta": 100.0,
                "layerscale_value": 1.0,
                "num_register_tokens": 0,
                "use_gated_mlp": False,
                "query_bias": True,
                "key_bias": False,
                "value_bias": True,
            },
            fields=_dinov3,
            describe=_describe_dinov3,
            names=_DINOV3_NAMES,
            known=_VIT_KNOWN,
        ),
        Family(
            tower="vision",
            model_type="clip_vision_model",
            whole="clip",
            section="vision_config",
            architecture=("CLIPVisionModel", "CLIPVisionModelWithProjection"),
            prefixes=("vision_model.", ""),
            defaults=_SIZE_DEFAULTS | _CLIP_DEFAULTS | {"image_size": 224, "patch_size": 32},
            fields=_clip_vision,
            describe=lambda c: _described(c) | _described_grid(c) | {"projection_dim": c.projection_dim},
            names=_CLIP_VISION_NAMES,
            known=_PAIR_KNOWN,
            sibling=_TEXT_SIBLING,
        ),
        Family(
            tower="text",
            model_type="clip_text_model",
            whole="clip",
            section="text_config",
            architecture=("CLIPTextModel", "CLIPTextModelWithProjection"),
            prefixes=("text_model.", ""),
            defaults={
                **_CLIP_DEFAULTS,
                "hidden_size": 512,
                "num_hidden_layers": 12,
                "num_attention_heads": 8,
                "intermediate_size": 2048,
                "vocab_size": 49408,
                "max_position_embeddings": 77,
                "pad_token_id": 1,
                "eos_token_id": 49407,
            },
            fields=_clip_text,
            describe=lambda c: _describe_text(c) | {"eos_token_id": c.eos_id, "projection_dim": c.projection_dim},
            names=_CLIP_TEXT_NAMES,
            known=_PAIR_KNOWN,
            sibling=_VISION_SIBLING,
        ),
        *_siglip_families("siglip", "Siglip", _siglip_vision, _describe_siglip),
        *_siglip_families("siglip2", "Siglip2", _siglip2_vision, _describe_siglip2),
        _bert_family("bert", "bert.", "BertModel", _bert),
        _bert_family("roberta", "roberta.", "RobertaModel", _roberta, pad_token_id=1, vocab_size=50265),
        _bert_family("xlm-roberta", "roberta.", "XLMRobertaModel", _roberta, pad_token_id=1),
    )
}


def family_of(config: Json, tower: str) -> tuple[Family, Fields]:
    """The family of that `tower` in a config.json, and what it says of it, with the defaults.

    Raises:
        WeightsError: an unknown model_type, or one without that tower.
    """
    kind = config.get("model_type", "")
    for family in FAMILIES.values():
        if family.tower == tower and kind in (family.model_type, family.whole):
            whole = kind == family.whole and family.section
            said = dict(config.get(family.section) or {}) if whole else dict(config)
            if whole and "projection_dim" in config:
                said["projection_dim"] = config["projection_dim"]
            if tower == "text" and "siglip" in kind and "projection_size" not in said:
                said["projection_size"] = said.get("hidden_size", family.defaults["hidden_size"])
            return family, {**family.defaults, **{key: value for key, value in said.items() if value is not None}}
    kinds = sorted({k for f in FAMILIES.values() if f.tower == tower for k in (f.model_type, f.whole) if k})
    raise WeightsError(f"config.json's model_type is '{kind}'; a {tower} tower comes from {', '.join(kinds)}")
