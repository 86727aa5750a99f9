"""`kernels.row_update` as one Triton kernel: a program gathers a row with its moments, updates, rounds and scatters
them. Source: ours.

Bit-equal to its twin given the same factors: FMA where the twin has it and nowhere else, divisions and roots rounded to
nearest, the same integer arithmetic for random bits and codes. One difference is the processor's: torch's roots on a
CPU may be MKL's, whose last bit is not always the nearest. Each entry is read and written once, in one launch for any
number of rows.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.keyed import column_keys
from kernels.row_update import RowTable

ENTRIES = 8
"""Entries of a row that one thread holds."""


def decay_rows(table: RowTable, active: Tensor, factor: Tensor) -> None:
    """`kernels.row_update.decay_rows`."""
    _launch(table, active, factor)


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
    """`kernels.row_update.adamw_rows`.

    Raises:
        TypeError: rows that are neither float32 nor bfloat16, or a gradient that is not float32.
        ValueError: rows that are not contiguous.
    """
    _launch(table, active, factor, grad.contiguous(), slope, root, betas, eps)


def _launch(
    table: RowTable,
    active: Tensor,
    factor: Tensor | None,
    grad: Tensor | None = None,
    slope: Tensor | None = None,
    root: Tensor | None = None,
    betas: tuple[float, float] = (0.0, 0.0),
    eps: float = 0.0,
) -> None:
    """One launch for all active rows; without a gradient it only multiplies them by `factor`."""
    rows, state = table.rows, table.state
    if rows.dtype not in (torch.float32, torch.bfloat16) or (grad is not None and grad.dtype != torch.float32):
        raise TypeError(f"the kernel takes float32 or bfloat16 rows and a float32 gradient, not {rows.dtype}")
    if not rows.is_contiguous():
        raise ValueError("rows must be contiguous")
    if not len(active):
        return
    d = rows.shape[1]
    block = triton.next_power_of_2(d)
    eight_bit = "exp_avg_codes" in state
    first, second = (state[f"{name}_codes" if eight_bit else name] for name in ("exp_avg", "exp_avg_sq"))
    scales = (state[f"{name}_scales"] if eight_bit else None for name in ("exp_avg", "exp_avg_sq"))
    _row_update_kernel[(len(active),)](
        rows, state.get("master"), first, second, *scales, state["row_step"], active.contiguous(),
        grad, factor, slope, root,
        _columns(d, rows.device), table.key, table.first_class, 1 - betas[0], betas[1], 1 - betas[1], eps,
        d, block, rows.dtype == torch.bfloat16 and "master" not in state,
        num_warps=min(16, max(1, block // (32 * ENTRIES))), enable_fp_fusion=False,
    )  # fmt: skip


@functools.cache
def _columns(d: int, device: torch.device) -> Tensor:
    return column_keys(d, device)


@triton.jit
def _row_update_kernel(
    rows, master, first_moments, second_moments, first_scales, second_scales, row_step, active, grads, factors, slopes,
    roots, columns, key, first_class, first_weight, second_decay, second_weight, eps,
    d: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(active + place)
    column = tl.arange(0, BLOCK)
    inside = column < d
    here = row * d + column
    if STOCHASTIC or first_scales is not None:
        update_key = key + 3 * tl.load(row_step + row).to(tl.int64)
        class_id = row + first_class
        column_key = tl.load(columns + column, mask=inside, other=0)

    if master is not None:
        x = tl.load(master + here, mask=inside, other=0.0)
    else:
        x = tl.load(rows + here, mask=inside, other=0.0).to(tl.float32)
    if factors is not None:
        x = x * tl.load(factors + place)

    if grads is not None:
        grad = tl.load(grads + place * d + column, mask=inside, other=0.0)
        first = tl.load(first_moments + here, mask=inside, other=0)
        second = tl.load(second_moments + here, mask=inside, other=0)
        if first_scales is not None:
            first = _decode(first, tl.load(first_scales + row), True)
            second = _decode(second, tl.load(second_scales + row), False)
        near = first_weight < 0.5  # torch's lerp starts from the nearer end
        first = tl.fma(tl.where(near, first_weight, first_weight - 1.0), grad - first, tl.where(near, first, grad))
        second = tl.fma(second_weight * grad, grad, second * second_decay)
        if first_scales is not None:
            bits = _random_bits(update_key + 1, class_id, column_key)
            first_codes, first_scale = _encode(first, bits, True)
            second_codes, second_scale = _encode(second, bits >> 16, False)
            tl.store(first_moments + here, first_codes, mask=inside)
            tl.store(second_moments + here, second_codes, mask=inside)
            tl.store(first_scales + row, first_scale)
            tl.store(second_scales + row, second_scale)
        else:
            tl.store(first_moments + here, first, mask=inside)
            tl.store(second_moments + here, second, mask=inside)
        denominator = tl.div_rn(tl.sqrt_rn(second), tl.load(roots + place)) + eps
        x = x + tl.div_rn(first * tl.load(slopes + place), denominator)

    if master is not None:
        tl.store(master + here, x, mask=inside)
    if rows.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        if STOCHASTIC:
            noise = _random_bits(update_key + (0 if grads is None else 2), class_id, column_key) & 0xFFFF
        else:
            noise = 0x7FFF + ((bits >> 16) & 1)  # to nearest, to even: written out, as the interpreter's cast cuts off
        rounded = ((bits + noise) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x != x, x, rounded)  # a nan with all bits set would come out as a number
    tl.store(rows + here, x.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def _mix(x):
    """`kernels.keyed.mix`."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return (x ^ ((x >> 31) & 0x1FFFFFFFF)) & 0x3FFFFFFFFFFFFFFF


@triton.jit
def _random_bits(key, class_id, column_key):
    """`kernels.keyed.random_bits` of the key that the class has in this use."""
    bits = (_mix(_mix(key) ^ class_id).to(tl.int32) ^ column_key) * 0x2C1B3C6D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * 0x297A2D39
    return bits ^ ((bits >> 12) & 0xFFFFF)


@triton.jit
def _decode(codes, scale, SIGNED: tl.constexpr):
    """`kernels.rounding.decode` of one row."""
    SHIFT: tl.constexpr = 20 if SIGNED else 19
    LOWEST: tl.constexpr = (0x3F800000 >> SHIFT) - (127 if SIGNED else 255)
    code = codes.to(tl.int32)
    magnitude = code & (127 if SIGNED else 255)
    bits = (magnitude + LOWEST) << SHIFT
    if SIGNED:
        bits |= (code & 128) << 24
    return tl.where(magnitude == 0, 0.0, bits.to(tl.float32, bitcast=True)) * scale


@triton.jit
def _encode(x, noise, SIGNED: tl.constexpr):
    """`kernels.rounding.encode` of one row: (codes, scale)."""
    SHIFT: tl.constexpr = 20 if SIGNED else 19
    TOP: tl.constexpr = 127 if SIGNED else 255
    LOWEST: tl.constexpr = (0x3F800000 >> SHIFT) - TOP
    magnitude = tl.abs(x)
    largest = tl.max(magnitude, 0).to(tl.int32, bitcast=True)
    subnormal = 1 << (((largest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126) & 31)
    normal = tl.minimum((largest >> 23) + 1, 254) << 23
    scale = tl.where(largest == 0, 0x3F800000, tl.where(largest < 0x800000, subnormal, normal)).to(
        tl.float32, bitcast=True
    )
    lift = tl.where(scale < 2.0**-100, 2.0**64, 1.0)  # the inverse of a subnormal scale overflows float32
    code = (magnitude * lift * tl.div_rn(1.0, scale * lift)).to(tl.int32, bitcast=True) + (
        (noise & 0xFFFF) << (SHIFT - 16)
    )
    code = tl.minimum((code >> SHIFT) - LOWEST, TOP)
    if SIGNED:
        code = tl.maximum(code, 0) | ((x.to(tl.int32, bitcast=True) >> 24) & 128)
    else:
        code = tl.where(x == 0.0, 0, tl.maximum(code, 1))
    return code.to(tl.uint8), scale
