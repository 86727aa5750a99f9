"""EfficientNet-Lite in the layouts of timm (tf_efficientnet_lite0 to 4) and of the package efficientnet-lite-pytorch.

Batch norms are folded into the convolutions in float64, so these weights do not go back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from models.mbconv import block_shapes
from models.presets import VISION
from models.vision import VisionConfig
from models.weights.layout import Json, Layout, TowerConfig
from models.weights.rules import Rule, WeightsError

# timm's models without tf_ have other padding and another epsilon.
ARCHITECTURE = re.compile(r"(?:tf_efficientnet_|efficientnet-)(lite[0-4])")
EPSILON = 1e-3  # of the batch norms
_NORM = ("weight", "bias", "running_mean", "running_var")


class EfficientNetLite(Layout):
    """One of the two layouts; `names` has only the first convolution's."""

    def fields(self, said: Json) -> Json:
        """Our fields."""
        return VISION[f"efficientnet_{ARCHITECTURE.fullmatch(said['architecture'])[1]}"]  # type: ignore[index]

    def rules(self, config: TowerConfig, prefix: str) -> list[Rule]:
        """The rules of a tower, for all of its tensors."""
        assert isinstance(config, VisionConfig)
        places = _timm if self.name == "timm" else _package
        return [_folded(f"vision.{ours}", conv, norm) for ours, conv, norm in places(config)]


def _layout(name: str, first: str, known: str) -> EfficientNetLite:
    return EfficientNetLite(
        tower="vision",
        name=name,
        keys={},
        defaults={},
        wrap=lambda layout, said: said,
        names={"stem.": first},
        known=(known,),
    )


TIMM_LITE = _layout("timm", "conv_stem.", r"classifier\..*")
PACKAGE_LITE = _layout("efficientnet-lite-pytorch", "_conv_stem.", r"_fc\..*")


def _timm(config: VisionConfig) -> Iterator[tuple[str, str, str]]:
    """(our convolution, theirs, its batch norm)."""
    yield "stem", "conv_stem", "bn1"
    for i, shape in enumerate(block_shapes(config.width_factor, config.depth_factor)):
        theirs = f"blocks.{shape.stage}.{shape.number}"
        convolutions = ("conv_pw", "conv_dw", "conv_pwl") if shape.expansion > 1 else ("conv_dw", "conv_pw")
        ours = ("expand", "depthwise", "project")[-len(convolutions) :]
        for number, (own, conv) in enumerate(zip(ours, convolutions, strict=True), 1):
            yield f"block.layers.{i}.{own}", f"{theirs}.{conv}", f"{theirs}.bn{number}"
    yield "last", "conv_head", "bn2"


def _package(config: VisionConfig) -> Iterator[tuple[str, str, str]]:
    """(our convolution, theirs, its batch norm)."""
    yield "stem", "_conv_stem", "_bn0"
    for i, shape in enumerate(block_shapes(config.width_factor, config.depth_factor)):
        for number, name in enumerate(("expand", "depthwise", "project")):
            if shape.expansion > 1 or name != "expand":
                yield f"block.layers.{i}.{name}", f"_blocks.{i}._{name}_conv", f"_blocks.{i}._bn{number}"
    yield "last", "_conv_head", "_bn1"


def _folded(ours: str, conv: str, norm: str) -> Rule:
    """A convolution without bias and the batch norm behind it as a convolution with bias."""

    def load(t: list[Tensor]) -> list[Tensor]:
        kernel, weight, bias, mean, variance = (tensor.double() for tensor in t)
        scale = weight / torch.sqrt(variance + EPSILON)
        return [(kernel * scale[:, None, None, None]).float(), (bias - mean * scale).float()]

    def save(t: list[Tensor]) -> list[Tensor]:
        raise WeightsError(f"{ours} has no batch norm to give back")

    return Rule(
        (f"{ours}.weight", f"{ours}.bias"), (f"{conv}.weight", *(f"{norm}.{part}" for part in _NORM)), load, save
    )
