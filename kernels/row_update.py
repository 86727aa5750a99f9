"""AdamW on some rows of a table, in plain torch: the specification of `kernels.row_update_triton`. Source: ours.

Arithmetic is float32 (float64 for float64 rows), in the order written here. Two sums are fused multiply-adds, as in
torch's CPU kernels on a processor with FMA: first + weight * (grad - first), and second + (weight * grad) * grad.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.keyed import LARGE, mix, random_bits
from kernels.rounding import decode, encode, round_bf16

CHUNK = 1 << 18
"""Entries updated at a time on a CPU: their intermediate results fit its cache and do not raise the memory peak."""


class RowTable(NamedTuple):
    """Rows and their optimizer state. All tensors are contiguous, with one entry per row along dim 0.

    Args:
        rows: [n, d], float32 or bfloat16 (float64: only here).
        state: row_step int32 [n, 1], number of updates of a row; exp_avg and exp_avg_sq [n, d], or each as _codes
            uint8 [n, d] and _scales float32 [n, 1] (kernels.rounding); master float32 [n, d] where bfloat16 rows have
            one, else they are rounded stochastically.
        key: of stochastic rounding, well mixed; each update uses the key and the three after it.
        first_class: class id of the first row; random bits are keyed by class ids.
    """

    rows: Tensor
    state: dict[str, Tensor]
    key: int
    first_class: int


def row_state(rows: Tensor, eight_bit: bool, master: bool) -> dict[str, Tensor]:
    """RowTable.state of rows that were never updated."""
    n = len(rows)
    state = {"row_step": torch.zeros(n, 1, dtype=torch.int32, device=rows.device)}
    for name in ("exp_avg", "exp_avg_sq"):
        if eight_bit:
            state[f"{name}_codes"] = torch.zeros_like(rows, dtype=torch.uint8)
            state[f"{name}_scales"] = torch.ones(n, 1, device=rows.device)
        else:
            state[name] = torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
    if master:
        state["master"] = rows.float()
    return state


def decay_rows(table: RowTable, active: Tensor, factor: Tensor) -> None:
    """Multiplies `active` rows (int64 [a], each once) by `factor` [a, 1]."""
    for part in _parts(table, active):
        chunk = active[part]
        row = _read(table, chunk).mul_(factor[part])
        _write(table, chunk, row, use=0)


def adamw_rows(
    table: RowTable,
    active: Tensor,
    grad: Tensor,
    factor: Tensor | None,
    slope: Tensor,
    root: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Updates `active` rows and their moments by `grad`: row = row * factor + first * slope / (sqrt(second) / root +
    eps).

    Args:
        table: updated in place, but for row_step.
        active: int64 [a], each row once.
        grad: [a, d].
        factor: [a, 1], weight decay; None is 1.
        slope: [a, 1], the negative learning rate over the bias correction of the first moment.
        root: [a, 1], root of the bias correction of the second moment.
        betas: decay of the first and second moment.
        eps: added to the corrected root of the second moment.
    """
    for part in _parts(table, active):
        chunk, g = active[part], grad[part]
        bits = _bits(table, chunk, use=1) if "exp_avg_codes" in table.state else None
        first = _moment(table, "exp_avg", chunk).lerp_(g, 1 - betas[0])
        second = _moment(table, "exp_avg_sq", chunk).mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        _keep(table, "exp_avg", chunk, first, bits)
        _keep(table, "exp_avg_sq", chunk, second, None if bits is None else bits >> 16)
        denominator = second.sqrt_().div_(root[part]).add_(eps)
        row = _read(table, chunk)
        if factor is not None:
            row.mul_(factor[part])
        row.addcdiv_(first.mul_(slope[part]), denominator)
        _write(table, chunk, row, use=2)


def _parts(table: RowTable, active: Tensor) -> Iterator[slice]:
    """Parts of the active rows that are updated at a time.

    A part's intermediate results live until the next part has allocated its own: if they were freed first, a CPU would
    fetch new pages for each part.
    """
    entries = CHUNK if active.device.type == "cpu" else LARGE
    size = max(1, entries // table.rows.shape[1])
    return (slice(start, start + size) for start in range(0, len(active), size))


def _moment(table: RowTable, name: str, active: Tensor) -> Tensor:
    if name in table.state:
        return table.state[name].index_select(0, active)
    codes, scales = (table.state[f"{name}_{part}"].index_select(0, active) for part in ("codes", "scales"))
    return decode(codes, scales, signed=name == "exp_avg")


def _keep(table: RowTable, name: str, active: Tensor, value: Tensor, bits: Tensor | None) -> None:
    if bits is None:
        table.state[name].index_copy_(0, active, value)
        return
    codes, scales = encode(value, bits, signed=name == "exp_avg")
    table.state[f"{name}_codes"].index_copy_(0, active, codes)
    table.state[f"{name}_scales"].index_copy_(0, active, scales)


def _read(table: RowTable, active: Tensor) -> Tensor:
    """The rows in the type in which they are updated; a copy."""
    rows = table.state.get("master", table.rows).index_select(0, active)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _write(table: RowTable, active: Tensor, row: Tensor, use: int) -> None:
    """Stores updated rows; `use` tells apart the roundings of one update."""
    if "master" in table.state:
        table.state["master"].index_copy_(0, active, row)
    elif table.rows.dtype == torch.bfloat16:
        row = round_bf16(row, _bits(table, active, use))
    table.rows.index_copy_(0, active, row.to(table.rows.dtype))


def _bits(table: RowTable, active: Tensor, use: int) -> Tensor:
    """Random bits keyed by class and its number of updates: equal at every world size and after a resume."""
    updates = table.state["row_step"].index_select(0, active)[:, 0].long()
    keys = mix(mix(table.key + 3 * updates + use) ^ (active + table.first_class))
    return random_bits(keys, table.rows.shape[1])
