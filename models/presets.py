"""Towers by their usual names: the fields of VisionConfig and TextConfig. A recipe's own keys win over its preset's.

Sizes are those of the papers and of the configurations on the hub. Dropout and drop path are left to the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = dict[str, Any]


def _size(layers: int, width: int, heads: int, mlp: int) -> Fields:
    return {"num_layers": layers, "hidden_size": width, "num_attention_heads": heads, "ffn_hidden_size": mlp}


_SMALL, _BASE, _LARGE = _size(12, 384, 6, 1536), _size(12, 768, 12, 3072), _size(24, 1024, 16, 4096)
_HUGE, _SO400M = _size(32, 1280, 16, 5120), _size(27, 1152, 16, 4304)


def _vit(size: Fields, patch: int) -> Fields:
    """Dosovitskiy et al. 2021."""
    tower = {"patch_size": patch, "layernorm_eps": 1e-6, "pooling": "class", "class_position": True}
    return size | {"image_size": 224} | tower


def _dinov2(size: Fields, registers: int = 0) -> Fields:
    """Oquab et al. 2023; Darcet et al. 2023 (registers). Positions of 518 pixels, read at 224."""
    tower = _vit(size, 14) | {"position_grid": 37, "layer_scale": 1.0, "register_tokens": registers}
    return tower | ({"position_resize": "bicubic_antialias"} if registers else {})


def _dinov3(size: Fields) -> Fields:
    """Simeoni et al. 2025."""
    attention = {
        "key_bias": False,
        "positions": "rotary",
        "rotary_base": 100.0,
        "layer_scale": 1.0,
        "register_tokens": 4,
    }
    return size | {"image_size": 224, "patch_size": 16, "layernorm_eps": 1e-5, "pooling": "class"} | attention


def _clip(size: Fields, patch: int, image_size: int = 224) -> Fields:
    """Radford et al. 2021, as OpenAI trained it (open_clip's own models have the activation gelu)."""
    tower = _vit(size, patch) | {"image_size": image_size, "layernorm_eps": 1e-5, "activation": "quick_gelu"}
    return tower | {"patch_bias": False, "embedding_norm": True}


def _siglip(size: Fields, patch: int, image_size: int) -> Fields:
    """Zhai et al. 2023; Tschannen et al. 2025 (SigLIP 2)."""
    tower = {"image_size": image_size, "patch_size": patch, "layernorm_eps": 1e-6, "activation": "gelu_tanh"}
    return size | tower | {"pooling": "attention"}


def _efficientnet_lite(width: float, depth: float, image_size: int) -> Fields:
    """Tan and Le 2019, in Google's Lite form. Sizes of the image are the paper's, down to a multiple of 32."""
    factors = {"width_factor": width, "depth_factor": depth}
    return {"kind": "efficientnet_lite", "image_size": image_size, "patch_size": 32, "hidden_size": 1280} | factors


def _clip_text(size: Fields) -> Fields:
    pair = {"vocab_size": 49408, "max_length": 77, "pad_id": 49407, "eos_id": 49407, "causal": True, "pooling": "eos"}
    return size | pair | {"activation": "quick_gelu", "embedding_norm": False, "mask_padding": False}


def _siglip_text(size: Fields, vocab: int, pad: int) -> Fields:
    pair = {"vocab_size": vocab, "max_length": 64, "pad_id": pad, "pooling": "last", "activation": "gelu_tanh"}
    return size | pair | {"layernorm_eps": 1e-6, "embedding_norm": False, "mask_padding": False}


def _bert(size: Fields) -> Fields:
    """Devlin et al. 2019; the small one Turc et al. 2019."""
    tower = {"vocab_size": 30522, "max_length": 512, "pad_id": 0, "token_types": 2, "layernorm_eps": 1e-12}
    return size | tower | {"post_norm": True, "pooling": "class"}


def _roberta(size: Fields, vocab: int) -> Fields:
    """Liu et al. 2019; Conneau et al. 2020 (XLM-R)."""
    tower = {"vocab_size": vocab, "pad_id": 1, "position_offset": 2, "token_types": 1, "layernorm_eps": 1e-5}
    return _bert(size) | tower


VISION: dict[str, Fields] = {
    "vit_s16": _vit(_SMALL, 16),
    "vit_b32": _vit(_BASE, 32),
    "vit_b16": _vit(_BASE, 16),
    "vit_l16": _vit(_LARGE, 16),
    "vit_l14": _vit(_LARGE, 14),
    "vit_h14": _vit(_HUGE, 14),
    "vit_g14": _vit(_size(40, 1408, 16, 6144), 14),
    **{
        f"dinov2_{name}14{suffix}": _dinov2(size, registers)
        for suffix, registers in (("", 0), ("_reg4", 4))
        for name, size in (
            ("vits", _SMALL),
            ("vitb", _BASE),
            ("vitl", _LARGE),
            ("vitg", _size(40, 1536, 24, 4096) | {"activation": "swiglu"}),
        )
    },
    "dinov3_vits16": _dinov3(_SMALL),
    "dinov3_vitb16": _dinov3(_BASE),
    "dinov3_vitl16": _dinov3(_LARGE),
    "dinov3_vith16plus": _dinov3(_size(32, 1280, 20, 5120) | {"activation": "swiglu"}),
    "efficientnet_lite0": _efficientnet_lite(1.0, 1.0, 224),
    "efficientnet_lite1": _efficientnet_lite(1.0, 1.1, 224),
    "efficientnet_lite2": _efficientnet_lite(1.1, 1.2, 256),
    "efficientnet_lite3": _efficientnet_lite(1.2, 1.4, 256),
    "efficientnet_lite4": _efficientnet_lite(1.4, 1.8, 288),
    "clip_vit_b32": _clip(_BASE, 32),
    "clip_vit_b16": _clip(_BASE, 16),
    "clip_vit_l14": _clip(_LARGE, 14),
    "clip_vit_l14_336": _clip(_LARGE, 14, 336),
    "siglip_base_patch16_224": _siglip(_BASE, 16, 224),
    "siglip2_base_patch16_224": _siglip(_BASE, 16, 224),
    "siglip2_base_patch16_256": _siglip(_BASE, 16, 256),
    "siglip2_large_patch16_256": _siglip(_LARGE, 16, 256),
    "siglip2_so400m_patch14_224": _siglip(_SO400M, 14, 224),
    "siglip2_so400m_patch16_256": _siglip(_SO400M, 16, 256),
}
_CLIP_512, _CLIP_768 = _clip_text(_size(12, 512, 8, 2048)), _clip_text(_size(12, 768, 12, 3072))
TEXT: dict[str, Fields] = {
    "clip_vit_b32": _CLIP_512,
    "clip_vit_b16": _CLIP_512,
    "clip_vit_l14": _CLIP_768,
    "clip_vit_l14_336": _CLIP_768,
    "siglip_base_patch16_224": _siglip_text(_BASE, 32000, 1),
    "siglip2_base_patch16_224": _siglip_text(_BASE, 256000, 0),
    "siglip2_base_patch16_256": _siglip_text(_BASE, 256000, 0),
    "siglip2_large_patch16_256": _siglip_text(_LARGE, 256000, 0),
    "siglip2_so400m_patch14_224": _siglip_text(_SO400M, 256000, 0),
    "siglip2_so400m_patch16_256": _siglip_text(_SO400M, 256000, 0),
    "bert_small": _bert(_size(4, 512, 8, 2048)),
    "bert_base": _bert(_BASE),
    "bert_large": _bert(_LARGE),
    "roberta_base": _roberta(_BASE, 50265),
    "xlm_roberta_base": _roberta(_BASE, 250002),
    "xlm_roberta_large": _roberta(_LARGE, 250002),
}
PRESETS = {"vision": VISION, "text": TEXT}


def expand(tower: str, given: Mapping[str, Any]) -> Fields:
    """The keys of model.vision or model.text (`tower`) that a recipe gives, with those of its `preset` filled in under
    them.

    Raises:
        ValueError: no preset of that name for that tower; the message lists those that exist.
    """
    name = given.get("preset", "")
    if not name:
        return dict(given)
    if name not in PRESETS[tower]:
        raise ValueError(f"model.{tower}.preset is '{name}'; it can be {', '.join(PRESETS[tower])}")
    return {**PRESETS[tower][name], **given}
