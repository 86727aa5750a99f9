"""Published weights by their usual names: repository on the Hugging Face hub, licence, expected pixels; found in the
hub's cache on this machine. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.presets import PRESETS
from models.weights.convert import own_file, read_object
from models.weights.rules import WeightsError

Pixel = tuple[float, float, float]
IMAGENET: tuple[Pixel, Pixel] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Pixel, Pixel] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP: tuple[Pixel, Pixel] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Published:
    """Weights on the hub.

    Args:
        repository: owner/name.
        licence: as the repository's page states it; that page counts.
        pixels: mean and standard deviation of red, green and blue in 0..1 that the image tower was trained with; None
            without one.
    """

    repository: str
    licence: str
    pixels: tuple[Pixel, Pixel] | None = None


# Names are those of models/presets.py, which also says which towers a name has.
PUBLISHED: Mapping[str, Published] = {
    "vit_s16": Published("timm/vit_small_patch16_224.augreg_in21k", "Apache-2.0", HALF),
    "vit_b16": Published("google/vit-base-patch16-224-in21k", "Apache-2.0", HALF),
    "vit_l16": Published("google/vit-large-patch16-224-in21k", "Apache-2.0", HALF),
    "dinov2_vits14": Published("facebook/dinov2-small", "Apache-2.0", IMAGENET),
    "dinov2_vitb14": Published("facebook/dinov2-base", "Apache-2.0", IMAGENET),
    "dinov2_vitl14": Published("facebook/dinov2-large", "Apache-2.0", IMAGENET),
    "dinov2_vitg14": Published("facebook/dinov2-giant", "Apache-2.0", IMAGENET),
    "dinov2_vits14_reg4": Published("facebook/dinov2-with-registers-small", "Apache-2.0", IMAGENET),
    "dinov2_vitb14_reg4": Published("facebook/dinov2-with-registers-base", "Apache-2.0", IMAGENET),
    "dinov2_vitl14_reg4": Published("facebook/dinov2-with-registers-large", "Apache-2.0", IMAGENET),
    "dinov2_vitg14_reg4": Published("facebook/dinov2-with-registers-giant", "Apache-2.0", IMAGENET),
    "dinov3_vits16": Published("facebook/dinov3-vits16-pretrain-lvd1689m", "DINOv3 License (ask for access)", IMAGENET),
    "dinov3_vitb16": Published("facebook/dinov3-vitb16-pretrain-lvd1689m", "DINOv3 License (ask for access)", IMAGENET),
    "dinov3_vitl16": Published("facebook/dinov3-vitl16-pretrain-lvd1689m", "DINOv3 License (ask for access)", IMAGENET),
    "dinov3_vith16plus": Published(
        "facebook/dinov3-vith16plus-pretrain-lvd1689m", "DINOv3 License (ask for access)", IMAGENET
    ),
    "efficientnet_lite0": Published("timm/tf_efficientnet_lite0.in1k", "Apache-2.0", IMAGENET),
    "efficientnet_lite1": Published("timm/tf_efficientnet_lite1.in1k", "Apache-2.0", IMAGENET),
    "efficientnet_lite2": Published("timm/tf_efficientnet_lite2.in1k", "Apache-2.0", IMAGENET),
    "efficientnet_lite3": Published("timm/tf_efficientnet_lite3.in1k", "Apache-2.0", IMAGENET),
    "efficientnet_lite4": Published("timm/tf_efficientnet_lite4.in1k", "Apache-2.0", IMAGENET),
    "clip_vit_b32": Published("timm/vit_base_patch32_clip_224.openai", "Apache-2.0", CLIP),
    "clip_vit_b16": Published("timm/vit_base_patch16_clip_224.openai", "Apache-2.0", CLIP),
    "clip_vit_l14": Published("timm/vit_large_patch14_clip_224.openai", "Apache-2.0", CLIP),
    "clip_vit_l14_336": Published("timm/vit_large_patch14_clip_336.openai", "Apache-2.0", CLIP),
    "siglip_base_patch16_224": Published("google/siglip-base-patch16-224", "Apache-2.0", HALF),
    "siglip2_base_patch16_224": Published("google/siglip2-base-patch16-224", "Apache-2.0", HALF),
    "siglip2_base_patch16_256": Published("google/siglip2-base-patch16-256", "Apache-2.0", HALF),
    "siglip2_large_patch16_256": Published("google/siglip2-large-patch16-256", "Apache-2.0", HALF),
    "siglip2_so400m_patch14_224": Published("google/siglip2-so400m-patch14-224", "Apache-2.0", HALF),
    "siglip2_so400m_patch16_256": Published("google/siglip2-so400m-patch16-256", "Apache-2.0", HALF),
    "bert_small": Published("google/bert_uncased_L-4_H-512_A-8", "Apache-2.0"),
    "bert_base": Published("google-bert/bert-base-uncased", "Apache-2.0"),
    "bert_large": Published("google-bert/bert-large-uncased", "Apache-2.0"),
    "roberta_base": Published("FacebookAI/roberta-base", "MIT"),
    "xlm_roberta_base": Published("FacebookAI/xlm-roberta-base", "MIT"),
    "xlm_roberta_large": Published("FacebookAI/xlm-roberta-large", "MIT"),
}


def known_name(given: str) -> str:
    """The name in PUBLISHED that a name, a repository or the last part of one means; empty for others."""
    plain = given.lower().replace("-", "_")
    for name, published in PUBLISHED.items():
        owner_and_name = published.repository.lower().replace("-", "_")
        if plain in (name, owner_and_name, owner_and_name.partition("/")[2]):
            return name
    return ""


def towers_of(name: str) -> list[str]:
    """Those of vision and text that a name has."""
    return [tower for tower, presets in PRESETS.items() if name in presets]


def cache_folder() -> Path:
    """The hub's cache: HF_HUB_CACHE, else hub/ under HF_HOME, else under XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get("HF_HUB_CACHE"):
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def cached(repository: str) -> Path | None:
    """The snapshot of a repository's main branch in the cache, else the newest one; None: it is not there."""
    folder = cache_folder() / f"models--{repository.replace('/', '--')}"
    try:
        main = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
        if main.is_dir():
            return main
    except (OSError, ValueError):
        pass
    found = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def download_line(repository: str) -> str:
    """The command that brings a repository into the cache, without its weights for other frameworks."""
    return f"hf download {repository} --include '*.json' --include '*.safetensors'"


def expected_pixels(folder: Path) -> tuple[Pixel, Pixel] | None:
    """Mean and standard deviation that a folder of transformers, timm or open_clip states; None where it does not."""
    for file, section, mean, std in (
        ("preprocessor_config.json", "", "image_mean", "image_std"),
        ("open_clip_config.json", "preprocess_cfg", "mean", "std"),
        ("config.json", "pretrained_cfg", "mean", "std"),
    ):
        try:
            whole = read_object(own_file(folder, file))
        except WeightsError:
            continue
        said = whole.get(section) if section else whole
        if isinstance(said, dict) and (found := _pixel(said.get(mean))) and (spread := _pixel(said.get(std))):
            return (found, spread) if min(spread) > 0 else None
    return None


def _pixel(value: object) -> Pixel | None:
    """Three numbers in 0..1."""
    if not isinstance(value, list) or len(value) != 3 or not all(type(number) in (int, float) for number in value):
        return None
    red, green, blue = map(float, value)
    return (red, green, blue) if min(value) >= 0 and max(value) <= 1 else None
