"""The image tower: stem, positions, transformer, pooling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.shape import TransformerBuilder, TransformerShape
from models.stem import conv_stem, patch_stem


@dataclass(frozen=True, kw_only=True)
class VisionConfig(TransformerShape):
    """The image tower.

    Args:
        image_size: side of the square input in pixels.
        patch_size: side of the square that becomes one token; with a convolutional stem, 2 ** number of stages.
        stem_channels: channels of the convolutional stem, a stage each; empty: one linear patch embedding.
        stem_blocks: residual blocks in each stage of the stem.
        pooling: how the tokens become one vector: mean, class (a token of its own), or mean_max (mean plus maximum of each channel, the
            norm behind it: a small object on a large ground stands out).
    """

    image_size: int = 224
    patch_size: int = 16
    stem_channels: tuple[int, ...] = ()
    stem_blocks: tuple[int, ...] = ()
    pooling: str = "mean"

    @property
    def num_patches(self) -> int:
        """Patch tokens of one image."""
        return (self.image_size // self.patch_size) ** 2

    def errors(self, where: str) -> list[str]:
        """What does not fit together, as sentences that name the key under `where`."""
        errors = []
        if self.image_size % self.patch_size:
            errors.append(
                f"{where}.image_size {self.image_size} is no multiple of {where}.patch_size {self.patch_size}"
            )
        if self.stem_channels and 2 ** len(self.stem_channels) != self.patch_size:
            errors.append(
                f"{where}.stem_channels has {len(self.stem_channels)} stages, which makes patches of "
                f"{2 ** len(self.stem_channels)} pixels, but {where}.patch_size is {self.patch_size}"
            )
        if len(self.stem_blocks) != len(self.stem_channels):
            errors.append(
                f"{where}.stem_blocks needs one number for each of the {len(self.stem_channels)} stem_channels"
            )
        if self.pooling not in ("mean", "class", "mean_max"):
            errors.append(f"{where}.pooling is '{self.pooling}'; it can be 'mean', 'class' or 'mean_max'")
        return errors


class VisionTower(nn.Module):
    """Images to patch tokens and one pooled vector. Source: Dosovitskiy et al. 2021; stem ours."""

    def __init__(self, config: VisionConfig, build: TransformerBuilder) -> None:
        super().__init__()
        self.stem = (
            conv_stem(config.stem_channels, config.stem_blocks, config.hidden_size)
            if config.stem_channels
            else patch_stem(config.patch_size, config.hidden_size)
        )
        self.class_token = nn.Parameter(torch.zeros(1, config.hidden_size)) if config.pooling == "class" else None
        self.position = nn.Parameter(torch.randn(config.num_patches, config.hidden_size) * 0.02)
        self.dropout = nn.Dropout(config.dropout)
        pooled_norm = config.pooling == "mean_max"  # a norm on every token would hide which of them stand out
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps) if pooled_norm else None
        self.block = build.block(config, final_norm=not pooled_norm)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [b, 3, S, S] -> (patches [b, P, h], pooled [b, h]); row-major patches."""
        x = self.stem(images).flatten(2).permute(2, 0, 1) + self.position[:, None]
        if self.class_token is not None:
            x = torch.cat([self.class_token[:, None].expand(-1, x.shape[1], -1), x])
        x = self.block(self.dropout(x).contiguous(), None)
        if self.class_token is not None:
            return x[1:].transpose(0, 1), x[0]
        if self.norm is not None:
            return x.transpose(0, 1), self.norm(x.mean(0) + x.amax(0))
        return x.transpose(0, 1), x.mean(0)
