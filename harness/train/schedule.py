"""Configuration of the optimizer, and learning rate and margin of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from harness.train.param_groups import split_factor
from models.heads.row_optimizer import RowOptimizerConfig
from models.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, UnitIntervalAbove0, UnitIntervalBelow1


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW for the towers, warm-up and cosine decay, and clipping over towers and class rows together.

    Args:
        lr: peak learning rate of the towers.
        min_lr_factor: the cosine ends at lr x this.
        warmup_steps: steps of linear warm-up from 0.
        weight_decay: decoupled weight decay of matrices; biases and norms have none.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        clip_norm: largest global norm of the gradient; 0 never clips.
        frozen: parts of the towers that are not trained: names of parameters as in a checkpoint, or their beginnings
            (vision.stem, text, vision.block.layers.0); * and [0-5] as in a shell.
        layer_decay: factor on the learning rate from each layer of a tower to the one below it; 1 trains all layers
            alike.
        lr_factors: factors on the learning rate by name, as query_transform=10, the names as in `frozen`; the last that
            fits counts.
        overlap: whether gradients are reduced while backward still runs: auto (on a GPU), always or never.
        rows: AdamW of the class rows.
    """

    lr: PositiveFloat = 1e-3
    min_lr_factor: NonNegativeFloat = 0.01
    warmup_steps: NonNegativeInt = 100
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[UnitIntervalBelow1, UnitIntervalBelow1] = (0.9, 0.98)
    eps: NonNegativeFloat = 1e-8
    clip_norm: NonNegativeFloat = 1.0
    frozen: tuple[str, ...] = ()
    layer_decay: UnitIntervalAbove0 = 1.0
    lr_factors: tuple[str, ...] = ()
    overlap: Literal["auto", "always", "never"] = "auto"
    rows: RowOptimizerConfig = field(default_factory=RowOptimizerConfig)

    def errors(self, where: str) -> list[str]:
        """Errors in the factors by name; each names its key under `where`."""
        errors = []
        for entry in self.lr_factors:
            try:
                good = 0 < split_factor(entry)[1] < math.inf
            except ValueError:
                good = False
            if not good:
                errors.append(f"{where}.lr_factors has '{entry}'; it must be name=factor with a factor above 0")
        return errors


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of update `step` (0-based) of `steps`: linear warm-up, then cosine to lr x min_lr_factor."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_factor + (1 - config.min_lr_factor) * cosine)


def margin_part(schedule: str, warmup: int, step: int) -> float:
    """Share of the margin in [0, 1] at update `step` (0-based) of a train.margin_schedule over `warmup` updates."""
    part = 1.0 if schedule == "constant" else min(1.0, (step + 1) / max(1, warmup))
    return 0.5 * (1 - math.cos(math.pi * part)) if schedule == "cosine" else part
