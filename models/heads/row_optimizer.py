"""AdamW that touches active rows only: an inactive row costs nothing, and catches up on its weight decay when it becomes active."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.keyed import mix, random_bits
from kernels.rounding import decode, encode, round_bf16
from models.heads.class_parallel import ClassParallelHead

CHUNK = 1 << 18
"""Entries updated at a time: what they need beside the state stays in a CPU's cache, and adds nothing to the peak of memory."""


@dataclass(frozen=True, kw_only=True)
class RowOptimizerConfig:
    """AdamW on the rows of the class-parallel head.

    Args:
        lr_factor: learning rate of the rows, relative to the towers'.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        state: the moments' format: fp32, or 8bit (a quarter of the memory).
        bf16_rows: how rows of head.row_dtype bf16 are updated: master keeps them in fp32 beside, stochastic rounds up or down at random.
    """

    lr_factor: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    state: str = "fp32"
    bf16_rows: str = "master"

    def errors(self, where: str) -> list[str]:
        """What is out of range, as sentences that name the key under `where`."""
        errors = []
        if self.state not in ("fp32", "8bit"):
            errors.append(f"{where}.state is '{self.state}'; it can be 'fp32' or '8bit'")
        if self.bf16_rows not in ("master", "stochastic"):
            errors.append(f"{where}.bf16_rows is '{self.bf16_rows}'; it can be 'master' or 'stochastic'")
        return errors


class RowAdamW:
    """Row-sparse AdamW. Source: ours (Loshchilov and Hutter 2019, per row).

    A row's moments and its bias correction advance only in steps where the row is active. Decoupled weight decay is due in every step:
    `log_decay` sums log(1 - lr * weight_decay) over the steps so far, each row remembers the sum up to which it was paid.

    Args:
        rows: [n, d], updated in place; float64 rows keep float64 moments.
        config: hyper-parameters.
        first_class: class id of the first row: with `seed` it keys stochastic rounding, which so does not depend on the number of ranks.
        seed: of stochastic rounding.
    """

    def __init__(self, rows: Tensor, config: RowOptimizerConfig, first_class: int = 0, seed: int = 0) -> None:
        self.rows, self.config, self.first_class, self.seed = rows, config, first_class, seed
        n, device = len(rows), rows.device
        self.log_decay = 0.0
        self._state = {
            "row_step": torch.zeros(n, 1, dtype=torch.int32, device=device),
            "paid": torch.zeros(n, 1, dtype=torch.float64, device=device),
        }
        if config.state == "8bit":
            for name in ("exp_avg", "exp_avg_sq"):
                self._state[f"{name}_codes"] = torch.zeros_like(rows, dtype=torch.uint8)
                self._state[f"{name}_scales"] = torch.ones(n, 1, device=device)
        else:
            for name in ("exp_avg", "exp_avg_sq"):
                self._state[name] = torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
        if rows.dtype == torch.bfloat16 and config.bf16_rows == "master":
            self._state["master"] = rows.float()

    @classmethod
    def for_head(cls, head: ClassParallelHead, config: RowOptimizerConfig) -> RowAdamW:
        """The optimizer of a head's rows."""
        return cls(head.rows, config, head.start, head.config.seed)

    def row_state(self) -> dict[str, Tensor]:
        """All that is kept per row, by name: each tensor has one entry per local row along dim 0. With `log_decay` it is the whole state."""
        return self._state

    def catch_up(self, active: Tensor) -> None:
        """Pays the weight decay that `active` rows (int64 [a], local) still owe; call before they are read."""
        if not self.config.weight_decay or self.log_decay == 0.0:
            return
        paid = self._state["paid"]
        for _, chunk in _chunks(active, self.rows.shape[1]):
            owed = torch.exp(self.log_decay - paid.index_select(0, chunk))
            row = self._read(chunk)
            self._write(chunk, row.mul_(owed.to(row.dtype)), use=0)
            paid[chunk] = self.log_decay

    def step(self, active: Tensor, grad: Tensor, lr: float) -> None:
        """One update of `active` rows by `grad` [a, d] at the towers' learning rate `lr`."""
        config, lr = self.config, lr * self.config.lr_factor
        if config.weight_decay:
            self.log_decay += math.log1p(-lr * config.weight_decay)
        beta1, beta2 = config.betas
        row_step, paid = self._state["row_step"], self._state["paid"]
        for part, chunk in _chunks(active, self.rows.shape[1]):
            g = grad[part]
            count = row_step.index_select(0, chunk) + 1
            bits = self._bits(chunk, use=1) if config.state == "8bit" else None
            first = self._moment("exp_avg", chunk).lerp_(g, 1 - beta1)
            second = self._moment("exp_avg_sq", chunk).mul_(beta2).addcmul_(g, g, value=1 - beta2)
            self._keep("exp_avg", chunk, first, bits)
            self._keep("exp_avg_sq", chunk, second, None if bits is None else bits >> 16)
            # in float64: 1 - beta2 ** count loses five digits of float32 in the first steps
            bias1, bias2 = (1 - beta ** count.double() for beta in (beta1, beta2))
            denominator = second.sqrt_().div_(bias2.sqrt().to(second.dtype)).add_(config.eps)
            row = self._read(chunk)
            if config.weight_decay:
                row.mul_(torch.exp(self.log_decay - paid.index_select(0, chunk)).to(row.dtype))
                paid[chunk] = self.log_decay
            row.addcdiv_(first.mul_((-lr / bias1).to(first.dtype)), denominator)
            self._write(chunk, row, use=2)
            row_step[chunk] = count

    def _moment(self, name: str, chunk: Tensor) -> Tensor:
        if name in self._state:
            return self._state[name].index_select(0, chunk)
        codes, scales = (self._state[f"{name}_{part}"].index_select(0, chunk) for part in ("codes", "scales"))
        return decode(codes, scales, signed=name == "exp_avg")

    def _keep(self, name: str, chunk: Tensor, value: Tensor, bits: Tensor | None) -> None:
        if bits is None:
            self._state[name].index_copy_(0, chunk, value)
            return
        codes, scales = encode(value, bits, signed=name == "exp_avg")
        self._state[f"{name}_codes"].index_copy_(0, chunk, codes)
        self._state[f"{name}_scales"].index_copy_(0, chunk, scales)

    def _read(self, chunk: Tensor) -> Tensor:
        """The rows in the type in which they are updated; a copy."""
        rows = self._state.get("master", self.rows).index_select(0, chunk)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def _write(self, chunk: Tensor, row: Tensor, use: int) -> None:
        """Stores updated rows; `use` tells apart the roundings of one update."""
        if "master" in self._state:
            self._state["master"].index_copy_(0, chunk, row)
        elif self.rows.dtype == torch.bfloat16:
            row = round_bf16(row, self._bits(chunk, use))
        self.rows.index_copy_(0, chunk, row.to(self.rows.dtype))

    def _bits(self, chunk: Tensor, use: int) -> Tensor:
        """Random bits keyed by class and by how often it was updated: the same at every world size, and after a resume."""
        classes = chunk + self.first_class
        updates = self._state["row_step"].index_select(0, chunk)[:, 0]
        key = mix(torch.tensor([self.seed], device=chunk.device)) + 3 * updates + use
        return random_bits(mix(mix(key) ^ classes), self.rows.shape[1])


def _chunks(active: Tensor, columns: int) -> Iterator[tuple[slice, Tensor]]:
    rows = max(1, CHUNK // columns)
    for start in range(0, len(active), rows):
        part = slice(start, start + rows)
        yield part, active[part]
