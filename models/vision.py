"""The image tower's configuration, and the tower of kind transformer: stem, positions, transformer, pooling."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from models.pool import AttentionPool
from models.positions import Resize, resized, rotary_angles, sine_cosine
from models.ranges import MOST_LAYERS, OptionalSize, Pixels, PositiveFloat, Size, Tokens
from models.shape import TransformerBuilder, TransformerShape
from models.stem import conv_stem, patch_stem

CONV_PATCH = 32  # pixels of the image from one token of convolutions to the next
MOST_FACTOR = 8.0


@dataclass(frozen=True, kw_only=True)
class VisionConfig(TransformerShape):
    """The image tower.

    Args:
        kind: transformer, or efficientnet_lite (convolutions, models/mbconv.py), which has only image_size, patch_size
            (32), hidden_size (of its last convolution), and the two factors.
        width_factor: factor on the channels of EfficientNet-Lite0, the first and last convolution aside.
        depth_factor: factor on its blocks.
        image_size: side of the square input in pixels.
        patch_size: side of the square that becomes one token; with a convolutional stem, 2 ** number of stages.
        patch_bias: whether the linear patch embedding has a bias (CLIP's has none).
        stem_channels: channels of the convolutional stem, a stage each; empty: one linear patch embedding.
        stem_blocks: residual blocks in each stage of the stem.
        positions: learned, sincos (fixed) or rotary (in the attention, as DINOv3).
        position_grid: side of the learned positions' grid, which any image's grid is interpolated from; 0: that of
            image_size.
        position_resize: how: bicubic, bicubic_antialias or bilinear_antialias.
        rotary_base: longest period of rotary positions.
        class_token: a class token even if pooling does not use it.
        class_position: whether the class token has a learned position of its own.
        register_tokens: tokens that belong to no patch and are dropped at the end (DINOv2 with registers).
        embedding_norm: a norm before the first layer (CLIP).
        pooling: how the tokens become one vector: mean (over the patches), class (a token of its own), attention (a
            learned query, SigLIP), or mean_max (mean plus maximum of each channel, the norm behind it: a small object
            on a large ground stands out).
        projection_dim: width of a last linear layer without bias on the pooled vector (CLIP); 0: none.
    """

    kind: Literal["transformer", "efficientnet_lite"] = "transformer"
    width_factor: PositiveFloat = 1.0
    depth_factor: PositiveFloat = 1.0
    image_size: Pixels = 224
    patch_size: Pixels = 16
    patch_bias: bool = True
    stem_channels: tuple[Size, ...] = ()
    stem_blocks: tuple[OptionalSize, ...] = ()
    positions: Literal["learned", "sincos", "rotary"] = "learned"
    position_grid: Tokens = 0
    position_resize: Resize = "bicubic"
    rotary_base: PositiveFloat = 100.0
    class_token: bool = False
    class_position: bool = False
    register_tokens: Tokens = 0
    embedding_norm: bool = False
    pooling: Literal["mean", "class", "attention", "mean_max"] = "mean"
    projection_dim: OptionalSize = 0

    @property
    def num_patches(self) -> int:
        """Patch tokens of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """Learned positions of patches."""
        return (self.position_grid**2 or self.num_patches) if self.is_transformer else 0

    @property
    def is_transformer(self) -> bool:
        """False for convolutions."""
        return self.kind == "transformer"

    @property
    def has_class_token(self) -> bool:
        """True with a class token."""
        return self.class_token or self.pooling == "class"

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: class and registers."""
        return self.has_class_token + self.register_tokens

    @property
    def pooled_size(self) -> int:
        """Width of the pooled vector."""
        return self.projection_dim or self.hidden_size

    def errors(self, where: str) -> list[str]:
        """Errors for values that do not fit together; each names its key under `where`."""
        errors = []
        if self.image_size % self.patch_size:
            errors.append(
                f"{where}.image_size {self.image_size} is not a multiple of {where}.patch_size {self.patch_size}"
            )
        if not self.is_transformer:
            return errors + self._convolution_errors(where)
        if (self.width_factor, self.depth_factor) != (1, 1):
            errors.append(f"{where}.width_factor and {where}.depth_factor need {where}.kind efficientnet_lite")
        if self.stem_channels and 2 ** len(self.stem_channels) != self.patch_size:
            errors.append(
                f"{where}.stem_channels has {len(self.stem_channels)} stages, which makes patches of "
                f"{2 ** len(self.stem_channels)} pixels, but {where}.patch_size is {self.patch_size}"
            )
        if len(self.stem_blocks) != len(self.stem_channels):
            errors.append(
                f"{where}.stem_blocks needs one number for each of the {len(self.stem_channels)} stem_channels"
            )
        if sum(self.stem_blocks) > MOST_LAYERS:
            errors.append(f"{where}.stem_blocks has {sum(self.stem_blocks)} blocks; at most {MOST_LAYERS}")
        if self.positions != "learned" and (self.position_grid or self.class_position):
            errors.append(f"{where}.position_grid and {where}.class_position need {where}.positions learned")
        if self.class_position and not self.has_class_token:
            errors.append(f"{where}.class_position needs a class token: {where}.class_token or {where}.pooling class")
        if self.positions == "sincos" and self.hidden_size % 4:
            errors.append(
                f"{where}.positions sincos needs {where}.hidden_size {self.hidden_size} to be a multiple of 4"
            )
        if self.positions == "rotary" and self.head_dim % 4:
            errors.append(f"{where}.positions rotary needs heads whose width is a multiple of 4, not {self.head_dim}")
        return errors

    def _convolution_errors(self, where: str) -> list[str]:
        errors = [] if self.patch_size == CONV_PATCH else [f"{where}.patch_size must be {CONV_PATCH} with convolutions"]
        if max(self.width_factor, self.depth_factor) > MOST_FACTOR:
            errors.append(f"{where}.width_factor and {where}.depth_factor can be at most {MOST_FACTOR}")
        own = ("preset", "kind", "width_factor", "depth_factor", "image_size", "patch_size", "hidden_size")
        given = [f.name for f in fields(self) if f.name not in own and getattr(self, f.name) != f.default]
        return errors + [f"{where}.{name} needs {where}.kind transformer" for name in given]


class VisionTower(nn.Module):
    """Images to patch tokens and one pooled vector. Source: Dosovitskiy et al. 2021; stem ours."""

    EMBEDDINGS = ("stem", "position", "class_token", "class_position", "register_token", "embedding_norm")

    def __init__(self, config: VisionConfig, build: TransformerBuilder) -> None:
        super().__init__()
        self.config = config
        self.stem = (
            conv_stem(config.stem_channels, config.stem_blocks, config.hidden_size)
            if config.stem_channels
            else patch_stem(config.patch_size, config.hidden_size, config.patch_bias)
        )
        hidden = config.hidden_size
        self.class_token = nn.Parameter(torch.zeros(1, hidden)) if config.has_class_token else None
        self.position = (
            nn.Parameter(torch.randn(config.num_positions, hidden) * 0.02) if config.positions == "learned" else None
        )
        self.class_position = nn.Parameter(torch.zeros(1, hidden)) if config.class_position else None
        self.register_token = (
            nn.Parameter(torch.randn(config.register_tokens, hidden) * 0.02) if config.register_tokens else None
        )
        self.embedding_norm = nn.LayerNorm(hidden, eps=config.layernorm_eps) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        pooled_norm = config.pooling == "mean_max"  # a norm on every token would hide which of them stand out
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps) if pooled_norm else None
        self.block = build.block(config, final_norm=not pooled_norm)
        self.pool = AttentionPool(config) if config.pooling == "attention" else None
        self.projection = nn.Linear(hidden, config.projection_dim, bias=False) if config.projection_dim else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [b, 3, y, x] of any whole number of patches -> (patches [b, P, h], row-major; pooled [b,
        pooled_size]).
        """
        grid = self.stem(images)
        x = self._with_prefix(self._positioned(grid))
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = self.block(self.dropout(x).contiguous(), None, **self._rotary(grid))
        patches = x[self.config.num_prefix :] if self.config.num_prefix else x
        batched = patches.transpose(0, 1)
        pooled = self._pooled(x, patches)
        return batched, pooled if self.projection is None else self.projection(pooled)

    def _positioned(self, grid: Tensor) -> Tensor:
        """grid [b, h, rows, columns] -> patches with their positions [P, b, h]."""
        rows, columns = grid.shape[2:]
        x = grid.flatten(2).permute(2, 0, 1)
        if self.position is not None:
            return x + resized(self.position, rows, columns, self.config.position_resize)[:, None]
        if self.config.positions == "sincos":
            return x + sine_cosine(rows, columns, self.config.hidden_size, grid)[:, None]
        return x

    def _with_prefix(self, x: Tensor) -> Tensor:
        prefix = []
        if self.class_token is not None:
            prefix.append(self.class_token if self.class_position is None else self.class_token + self.class_position)
        if self.register_token is not None:
            prefix.append(self.register_token)
        return torch.cat([*(t[:, None].expand(-1, x.shape[1], -1) for t in prefix), x]) if prefix else x

    def _rotary(self, grid: Tensor) -> dict[str, Tensor]:
        if self.config.positions != "rotary":
            return {}
        rows, columns = grid.shape[2:]
        c = self.config
        return {"rotary_pos_emb": rotary_angles(rows, columns, c.num_prefix, c.head_dim, c.rotary_base, grid.device)}

    def _pooled(self, x: Tensor, patches: Tensor) -> Tensor:
        """All tokens [s, b, h] and those of patches -> [b, h]."""
        if self.pool is not None:
            return self.pool(x)
        if self.norm is not None:
            return self.norm(patches.mean(0) + patches.amax(0))
        return x[0] if self.config.pooling == "class" else patches.mean(0)
