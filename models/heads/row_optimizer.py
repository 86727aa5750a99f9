"""AdamW that touches active rows only: an inactive row costs nothing, and catches up on its weight decay when it
becomes active.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kernels import row_update as twin
from kernels.keyed import mix
from kernels.row_update import RowTable, row_state
from models.heads.class_parallel import ClassParallelHead
from models.ranges import NonNegativeFloat, UnitIntervalBelow1


@dataclass(frozen=True, kw_only=True)
class RowOptimizerConfig:
    """AdamW on the rows of the class-parallel head.

    Args:
        lr_factor: learning rate of the rows, relative to the towers'.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        state: the moments' format: fp32, or 8bit (a quarter of the memory).
        bf16_rows: how rows of head.row_dtype bf16 are updated: master keeps them in fp32 beside, stochastic rounds up
            or down at random.
    """

    lr_factor: NonNegativeFloat = 1.0
    betas: tuple[UnitIntervalBelow1, UnitIntervalBelow1] = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    state: Literal["fp32", "8bit"] = "fp32"
    bf16_rows: Literal["master", "stochastic"] = "master"


class RowAdamW:
    """Row-sparse AdamW. Source: ours (Loshchilov and Hutter 2019, per row).

    A row's moments and its bias correction advance only in steps where the row is active. Decoupled weight decay is due
    in every step: `log_decay` sums log(1 - lr * weight_decay) over the steps so far, each row remembers the sum up to
    which it was paid.

    Args:
        rows: [n, d], updated in place; float64 rows keep float64 moments.
        config: hyper-parameters.
        first_class: class id of the first row: with `seed` it keys stochastic rounding, which so does not depend on the
            number of ranks.
        seed: of stochastic rounding.
    """

    def __init__(self, rows: Tensor, config: RowOptimizerConfig, first_class: int = 0, seed: int = 0) -> None:
        self.config, self.log_decay = config, 0.0
        master = rows.dtype == torch.bfloat16 and config.bf16_rows == "master"
        state = row_state(rows, config.state == "8bit", master)
        state["paid"] = torch.zeros(len(rows), 1, dtype=torch.float64, device=rows.device)
        self._table = RowTable(rows, state, int(mix(torch.tensor([seed]))), first_class)
        self._dtype = torch.promote_types(rows.dtype, torch.float32)  # in which rows are updated

    @classmethod
    def for_head(cls, head: ClassParallelHead, config: RowOptimizerConfig) -> RowAdamW:
        """The optimizer of a head's rows."""
        return cls(head.rows, config, head.start, head.config.seed)

    def row_state(self) -> dict[str, Tensor]:
        """State per row by name: each tensor has one entry per local row along dim 0. With `log_decay` it is the whole
        state.
        """
        return self._table.state

    def restart(self) -> None:
        """Begins the state of all rows again, as they are; they owe no weight decay."""
        for name, tensor in self._table.state.items():
            if name == "master":
                tensor.copy_(self._table.rows)
            else:  # as kernels.row_update.row_state
                tensor.fill_(self.log_decay if name == "paid" else name.endswith("_scales"))

    def catch_up(self, active: Tensor) -> None:
        """Pays the weight decay that `active` rows (int64 [a], local) still owe; call before they are read."""
        if not self.config.weight_decay or self.log_decay == 0.0:
            return
        _kernel(self._table.rows).decay_rows(self._table, active, self._pay(active))

    def step(self, active: Tensor, grad: Tensor, lr: float) -> None:
        """One update of `active` rows by `grad` [a, d] at the towers' learning rate `lr`."""
        config, lr = self.config, lr * self.config.lr_factor
        if config.weight_decay:
            self.log_decay += math.log1p(-lr * config.weight_decay)
        row_step = self._table.state["row_step"]
        count = row_step.index_select(0, active) + 1
        # in float64: 1 - beta2 ** count loses five digits of float32 in the first steps
        bias1, bias2 = (1 - beta ** count.double() for beta in config.betas)
        slope, root = (-lr / bias1).to(self._dtype), bias2.sqrt().to(self._dtype)
        factor = self._pay(active) if config.weight_decay else None
        kernel = _kernel(self._table.rows)
        kernel.adamw_rows(self._table, active, grad, factor, slope, root, config.betas, config.eps)
        row_step.index_copy_(0, active, count)

    def _pay(self, active: Tensor) -> Tensor:
        """The factor [a, 1] by which rows pay the weight decay that they owe; marks it as paid."""
        paid = self._table.state["paid"]
        factor = torch.exp(self.log_decay - paid.index_select(0, active)).to(self._dtype)
        paid.index_fill_(0, active, self.log_decay)
        return factor


def _kernel(rows: Tensor) -> Any:
    """The module that updates these rows: Triton's on a GPU, but for float64, else the torch twin."""
    if rows.is_cuda and rows.dtype != torch.float64:
        from kernels import row_update_triton  # torch for CUDA brings triton; elsewhere it may be missing

        return row_update_triton
    return twin
