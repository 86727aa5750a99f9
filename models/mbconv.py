"""The convolutional image tower: MBConv blocks of EfficientNet-Lite, without BatchNorm.

Source: Tan and Le 2019; Lite: no squeeze-excite, ReLU6, first and last convolution of fixed width. Imported batch norms
are folded into the convolutions, so that a sample does not depend on its batch and ranks share no statistics.

The tower is plain torch: tensor-parallel ranks hold equal copies, see equal images and get equal gradients from what
lies above, which counts them once. So no gradient is summed over these ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.shape import TransformerBuilder
from models.vision import VisionConfig

FIRST = 32  # channels of the first convolution


class Stage(NamedTuple):
    """Blocks of one width; the first has the stride."""

    kernel: int
    stride: int
    expansion: int
    channels: int
    blocks: int


# Of EfficientNet-B0: Tan and Le 2019, table 1.
STAGES = (
    Stage(3, 1, 1, 16, 1),
    Stage(3, 2, 6, 24, 2),
    Stage(5, 2, 6, 40, 2),
    Stage(3, 2, 6, 80, 3),
    Stage(5, 1, 6, 112, 3),
    Stage(5, 2, 6, 192, 4),
    Stage(3, 1, 6, 320, 1),
)


@dataclass(frozen=True)
class BlockShape:
    """Size of one MBConv block, and its place: number within its stage.

    Args:
        stage: from 0.
        number: within the stage, from 0.
        before: channels that come in.
        after: channels that go out.
        kernel: side of the depthwise convolution's kernel.
        stride: of the depthwise convolution.
        expansion: channels between, as a multiple of `before`; 1: no expansion.
    """

    stage: int
    number: int
    before: int
    after: int
    kernel: int
    stride: int
    expansion: int


def block_shapes(width: float, depth: float) -> list[BlockShape]:
    """The blocks of a tower whose channels are multiplied by `width` and whose blocks, but for the first and last
    stage, by `depth`.
    """
    found, before = [], FIRST
    for index, stage in enumerate(STAGES):
        inner = 0 < index < len(STAGES) - 1
        after = _rounded(stage.channels * width)
        for number in range(math.ceil(stage.blocks * depth) if inner else stage.blocks):
            stride = 1 if number else stage.stride
            found.append(BlockShape(index, number, before, after, stage.kernel, stride, stage.expansion))
            before = after
    return found


def _rounded(channels: float) -> int:
    """The nearest multiple of 8 that is at most a tenth below."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


class SameConv(nn.Conv2d):
    """A convolution with bias that gives ceil(size / stride) positions. At stride 2 the odd row and column of padding
    are below and right, as in TensorFlow, for sides that are even.
    """

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1, gain: float = 1) -> None:
        padding = (kernel - 1) // 2 if stride == 1 else 0
        super().__init__(before, after, kernel, stride, padding, groups=groups)
        missing = kernel - stride
        self.missing = (missing // 2, missing - missing // 2) * 2 if stride > 1 else ()
        nn.init.normal_(self.weight, std=gain / (kernel**2 * before // groups) ** 0.5)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[b, before, y, x] -> [b, after, y / stride, x / stride]."""
        return super().forward(F.pad(x, self.missing) if self.missing else x)


_RELU = 2**0.5  # gain of the weights before a ReLU: He et al. 2015


class MBConv(nn.Module):
    """Expansion, depthwise convolution, projection; added to the input where that has the same shape."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        wide = shape.before * shape.expansion
        self.residual = shape.stride == 1 and shape.before == shape.after
        self.expand = SameConv(shape.before, wide, 1, gain=_RELU) if shape.expansion > 1 else None
        self.depthwise = SameConv(wide, wide, shape.kernel, shape.stride, groups=wide, gain=_RELU)
        # Residual branches start close to the identity, as in models/stem.py.
        self.project = SameConv(wide, shape.after, 1, gain=0.2 if self.residual else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[b, before, y, x] -> [b, after, y / stride, x / stride]."""
        wide = x if self.expand is None else F.relu6(self.expand(x))
        found = self.project(F.relu6(self.depthwise(wide)))
        return x + found if self.residual else found


class Blocks(nn.Module):
    """MBConv blocks one after the other."""

    def __init__(self, shapes: list[BlockShape]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MBConv(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        """[b, FIRST, y, x] -> [b, c, y / 16, x / 16]."""
        for layer in self.layers:
            x = layer(x)
        return x


class MBConvTower(nn.Module):
    """Images to patch tokens and their mean, as models.vision.VisionTower."""

    EMBEDDINGS = ("stem",)

    def __init__(self, config: VisionConfig, _: TransformerBuilder) -> None:
        super().__init__()
        self.config = config
        shapes = block_shapes(config.width_factor, config.depth_factor)
        self.stem = SameConv(3, FIRST, 3, 2, gain=_RELU)
        self.block = Blocks(shapes)
        self.last = SameConv(shapes[-1].after, config.hidden_size, 1, gain=_RELU)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [b, 3, y, x], sides multiples of 32 -> (patches [b, P, hidden_size], row-major; pooled [b,
        hidden_size]).
        """
        # Channels last: most of these convolutions are 1x1, which are plain matrix products then.
        images = images.contiguous(memory_format=torch.channels_last)
        grid = F.relu6(self.last(self.block(F.relu6(self.stem(images)))))
        patches = grid.flatten(2).transpose(1, 2)
        return patches, patches.mean(1)
