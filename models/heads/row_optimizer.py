"""AdamW that touches active rows only: an inactive row costs nothing, and catches up on its weight decay when it becomes active."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RowOptimizerConfig:
    """AdamW on the rows of the class-parallel head.

    Args:
        lr_factor: learning rate of the rows, relative to the towers'.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
    """

    lr_factor: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


class RowAdamW:
    """Row-sparse AdamW. Source: ours (Loshchilov and Hutter 2019, per row).

    A row's moments and its bias correction advance only in steps where the row is active. Decoupled weight decay is due in every step:
    `log_decay` sums log(1 - lr * weight_decay) over the steps so far, each row remembers the sum up to which it was paid.

    Args:
        rows: [n, d], updated in place.
        config: hyper-parameters.
    """

    def __init__(self, rows: Tensor, config: RowOptimizerConfig) -> None:
        self.rows, self.config = rows, config
        self.exp_avg = torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.row_step = torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device)
        self.paid = torch.zeros(len(rows), 1, dtype=torch.float64, device=rows.device)
        self.log_decay = 0.0

    def catch_up(self, active: Tensor) -> None:
        """Pays the weight decay that `active` rows (int64 [a]) still owe; call before they are read."""
        if self.config.weight_decay:
            owed = torch.exp(self.log_decay - self.paid[active]).to(self.rows.dtype)
            self.rows[active] = self.rows[active] * owed
            self.paid[active] = self.log_decay

    def step(self, active: Tensor, grad: Tensor, lr: float) -> None:
        """One update of `active` rows by `grad` [a, d] at the towers' learning rate `lr`."""
        config, lr = self.config, lr * self.config.lr_factor
        if config.weight_decay:
            self.log_decay += math.log1p(-lr * config.weight_decay)
            self.catch_up(active)
        if not len(active):
            return
        beta1, beta2 = config.betas
        count = self.row_step[active] + 1
        first = self.exp_avg[active].lerp_(grad, 1 - beta1)
        second = self.exp_avg_sq[active].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        self.row_step[active], self.exp_avg[active], self.exp_avg_sq[active] = count, first, second
        # in float64: 1 - beta2 ** count loses five digits of float32 in the first steps
        bias1, bias2 = (1 - beta ** count.double() for beta in (beta1, beta2))
        denominator = second.sqrt().div_(bias2.sqrt().to(second.dtype)).add_(config.eps)
        self.rows[active] = self.rows[active] - (first / bias1.to(first.dtype) / denominator * lr).to(self.rows.dtype)
