"""Registry of the image towers: `model.vision.kind` in a recipe selects an entry."""

from __future__ import annotations

from collections.abc import Callable

from models.mbconv import MBConvTower
from models.shape import TransformerBuilder
from models.vision import VisionConfig, VisionTower

ImageTower = VisionTower | MBConvTower
KINDS: dict[str, Callable[[VisionConfig, TransformerBuilder], ImageTower]] = {
    "transformer": VisionTower,
    "efficientnet_lite": MBConvTower,
}


def vision_tower(config: VisionConfig, build: TransformerBuilder) -> ImageTower:
    """The image tower of a configuration: images [b, 3, y, x] -> (patches [b, P, hidden_size], row-major; pooled [b,
    pooled_size]).
    """
    return KINDS[config.kind](config, build)
