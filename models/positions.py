"""Positions of patches on a grid: learned ones at any resolution, fixed sine-cosine ones, and rotary angles."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Resize = Literal["bicubic", "bicubic_antialias", "bilinear_antialias"]
# name -> (mode, antialias) of torch's interpolate: what the models that bring learned positions do at another
# resolution.
RESIZES: dict[Resize, tuple[str, bool]] = {
    "bicubic": ("bicubic", False),
    "bicubic_antialias": ("bicubic", True),
    "bilinear_antialias": ("bilinear", True),
}


def resized(positions: Tensor, rows: int, columns: int, how: Resize) -> Tensor:
    """Learned positions [g * g, h] of a square grid, as [rows * columns, h] of another one; the same tensor where the
    grid is the same.
    """
    side = math.isqrt(len(positions))
    if (rows, columns) == (side, side):
        return positions
    mode, antialias = RESIZES[how]
    grid = positions.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=(rows, columns), mode=mode, align_corners=False, antialias=antialias)
    return grid[0].permute(1, 2, 0).flatten(0, 1).to(positions.dtype)


def sine_cosine(rows: int, columns: int, width: int, like: Tensor) -> Tensor:
    """Fixed positions [rows * columns, width]: sines and cosines of the column, then of the row. Source: Chen et al.
    2021 (MoCo v3).
    """
    frequency = 1e4 ** -torch.arange(0, 1, 4 / width, dtype=torch.float32, device=like.device)
    row, column = (torch.arange(n, dtype=torch.float32, device=like.device) for n in (rows, columns))
    y, x = (grid.flatten()[:, None] * frequency for grid in torch.meshgrid(row, column, indexing="ij"))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).to(like.dtype)


def rotary_angles(rows: int, columns: int, prefix: int, head_dim: int, base: float, device: torch.device) -> Tensor:
    """Angles [prefix + rows * columns, 1, 1, head_dim] of rotary attention: rows and columns run over [-1, 1], prefix
    tokens are not rotated.

    Source: Simeoni et al. 2025 (DINOv3).
    """
    frequency = 2 * math.pi * base ** -torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=device)
    row, column = (2 * torch.arange(0.5, n, device=device) / n - 1 for n in (rows, columns))
    y, x = (grid.flatten()[:, None] * frequency for grid in torch.meshgrid(row, column, indexing="ij"))
    angles = torch.cat([y, x, y, x], dim=1)
    return F.pad(angles, (0, 0, prefix, 0))[:, None, None]
