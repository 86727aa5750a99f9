"""Stem, from image to patch tokens: a linear patch embedding, or a convolutional stem without BatchNorm, which would
make a sample depend on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelNorm(nn.GroupNorm):
    """Group norm with groups of 16 channels (one group below that)."""

    def __init__(self, channels: int) -> None:
        super().__init__(max(1, channels // 16), channels)


class ResidualConv(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions at constant size. Source: He et al. 2016, with group norm
    (ours).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_norm_act(channels), _conv3(channels, channels, 1), *_norm_act(channels), _conv3(channels, channels, 1)
        )
        with torch.no_grad():
            self.body[-1].weight.mul_(0.2)  # type: ignore[operator]  # close to the identity at the start

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, y, x] -> the same shape."""
        return x + self.body(x)


def patch_stem(patch_size: int, hidden_size: int, bias: bool = True) -> nn.Module:
    """One linear layer per patch: [b, 3, S, S] -> [b, hidden_size, S / patch_size, S / patch_size]."""
    return nn.Conv2d(3, hidden_size, patch_size, stride=patch_size, bias=bias)


def conv_stem(channels: tuple[int, ...], blocks: tuple[int, ...], hidden_size: int) -> nn.Module:
    """Stages that halve the image, each with `blocks[i]` residual blocks at `channels[i]`; a 1x1 convolution ends at
    hidden_size.

    [b, 3, S, S] -> [b, hidden_size, S / 2**len(channels), S / 2**len(channels)].
    """
    layers: list[nn.Module] = []
    previous = 3
    for stage, (width, count) in enumerate(zip(channels, blocks, strict=True)):
        if stage:
            layers += _norm_act(previous)
        layers.append(_conv3(previous, width, 2))
        layers.extend(ResidualConv(width) for _ in range(count))
        previous = width
    layers += [*_norm_act(previous), nn.Conv2d(previous, hidden_size, 1)]
    return nn.Sequential(*layers)


def _norm_act(channels: int) -> list[nn.Module]:
    return [ChannelNorm(channels), nn.ReLU()]  # GELU costs a stem a fifth of its time on a CPU and gains nothing


def _conv3(before: int, after: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return conv
