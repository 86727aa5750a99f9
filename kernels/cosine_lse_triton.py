"""Fused Triton kernels of `kernels.cosine_lse`: the same results without a [samples, rows] matrix or a copy of the
gathered rows in memory.

Four kernels: lengths of the rows; the forward, over (block of samples, split of the rows); the gradient of the
embeddings, over the same kind of grid; the gradient of the rows, a program per block of them. Both gradients recompute
the cosines: at least 10 n a d operations, where 6 n a d do with all logits in memory. Torch combines the splits'
partial results in a fixed order, nothing is added atomically: equal inputs give equal bits.

A float32 table multiplies to about float32's precision, a bfloat16 one in bfloat16 (embeddings and coefficients are
rounded to it); sums are float32 in both. On a GPU bfloat16 is the choice: several times fewer operations of a tensor
core. Triton decides when it is first imported whether it compiles or, with TRITON_INTERPRET=1, interprets. Import this
module only where a kernel will run: it needs triton. Recomputing tiles in the backward is FlashAttention's idea (arXiv
2205.14135) and, over classes, Cut Cross-Entropy's (arXiv 2411.09009), which gives the full log-sum-exp where a margin
needs that of the negatives.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.cosine_lse import NO_TARGET, CosineLse

PRECISION = tl.constexpr("tf32x3")
"""Precision of float32 products. On tensor cores: the three largest of the four products of high and low parts of 11
significant bits each. A single product (tf32) is far beyond the tests' error bound (`tests/kernel_error.py`). The
interpreter multiplies in float32.
"""
PROGRAMS = 512
"""Target number of programs (blocks of samples x splits): about 4 rounds of 132 processors. A constant, so that results
do not depend on the device's size.
"""
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_TINY = tl.constexpr(1e-12)  # least length of a row, as in F.normalize
_NO_TARGET = tl.constexpr(NO_TARGET)


class Blocks(NamedTuple):
    """Shape of one program's work.

    In the forward `owned` and `looped` are samples and rows; in a gradient `owned` vectors get one, from `looped`
    others at a time. Powers of two.
    """

    owned: int
    looped: int
    inner: int  # entries of a vector per step of an inner product; a gradient over whole vectors loads owned ones once
    width: int  # entries of a gradient that one program holds: above it the cosines are computed once per part
    num_warps: int
    num_stages: int


# (type, largest d) -> blocks. Chosen so that nothing spills where Triton 3.7 compiles for sm_90 (`python -m
# harness.bench.kernels`, docs/benchmarks/kernels.md); not tuned on a GPU yet. In float32 all kernels have one `inner`:
# a tensor core sums every inner product in the same order whatever the tile around it, so gradients see the cosines
# that the log-sum-exp saw (but for the order of the two small products of tf32x3). A bfloat16 coefficient is rounded
# more coarsely than that.
_Table = dict[tuple[torch.dtype, float], Blocks]
_FORWARD: _Table = {
    (torch.bfloat16, inf): Blocks(128, 128, 64, 0, 8, 3),
    (torch.float32, inf): Blocks(128, 64, 16, 0, 8, 3),
}
_EMBEDDINGS: _Table = {
    (torch.bfloat16, 256): Blocks(128, 32, 256, 256, 8, 2),
    (torch.bfloat16, 512): Blocks(64, 32, 512, 512, 8, 2),
    (torch.bfloat16, inf): Blocks(64, 64, 64, 256, 8, 2),
    (torch.float32, inf): Blocks(128, 32, 16, 128, 8, 1),
}
_ROWS: _Table = {
    (torch.bfloat16, 256): Blocks(128, 32, 256, 256, 8, 2),
    (torch.bfloat16, 512): Blocks(128, 32, 512, 256, 8, 2),
    (torch.bfloat16, inf): Blocks(64, 64, 64, 256, 8, 2),
    (torch.float32, inf): Blocks(128, 32, 16, 128, 8, 1),
}


def _blocks(table: _Table, dtype: torch.dtype, d: int) -> Blocks:
    """The entry of the type and width, not wider than vectors of d entries need; tl.dot wants at least 16.

    Whole vectors need the shared memory of sm_90 and sm_100, and rows that loads of 16 bytes may start at; else it is
    the last entry of the type.
    """
    large = _INTERPRETED or triton.runtime.driver.active.get_current_target().arch // 10 in (9, 10)
    whole = large and d % 16 == 0
    blocks = next(b for (kind, most), b in table.items() if kind == dtype and (d <= most if whole else most == inf))
    least = max(16, triton.next_power_of_2(d))
    return blocks._replace(inner=min(blocks.inner, least), width=min(blocks.width, least))


@triton.jit
def _dot(a, b, total):
    """total + a b. The interpreter would multiply the bit patterns of bfloat16: there operands are widened, which is
    exact.

    (It also truncates where a GPU rounds to bfloat16, so its errors are the larger ones.)
    """
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _row_pointers(table, index, stride, position, inside):
    """Pointers to the table's rows at these positions in `index` (None: the rows themselves). int64: a table may have
    more than 2^31 entries.
    """
    row = position.to(tl.int64)
    if index is not None:
        row = tl.load(index + position, mask=inside, other=0)
    return table + row * stride


@triton.jit
def _inner_products(
    left, left_inside, right, right_inside, D: tl.constexpr, M: tl.constexpr, L: tl.constexpr, K: tl.constexpr
):
    """Inner products [M, L] of the vectors of D entries at the pointers left [M] and right [L]; 0 outside."""
    total = tl.zeros((M, L), tl.float32)
    for start in range(0, D, K):
        entry = start + tl.arange(0, K)
        exists = entry < D
        a = tl.load(left[:, None] + entry[None, :], mask=left_inside[:, None] & exists[None, :], other=0.0)
        b = tl.load(right[None, :] + entry[:, None], mask=right_inside[None, :] & exists[:, None], other=0.0)
        total = _dot(a, b, total)
    return total


@triton.jit
def _vectors(pointers, inside, entry, D: tl.constexpr):
    """Entries [W] of the vectors of D entries that the pointers [M] point to: [M, W]; 0 outside."""
    return tl.load(pointers[:, None] + entry[None, :], mask=inside[:, None] & (entry < D)[None, :], other=0.0)


@triton.jit
def _negatives(cosine, own, inside, filter_above, FILTER: tl.constexpr):
    """Cosines with targets, filtered negatives and what lies past the last row at -inf."""
    hidden = own | (inside == 0)
    if FILTER:
        hidden = hidden | (cosine > filter_above)
    return tl.where(hidden, float("-inf"), cosine)


@triton.jit
def _coefficients(cosine, own, inside, log_sum, slope, target_slope, scale, filter_above, FILTER: tl.constexpr):
    """Gradient with respect to the cosines; arguments per sample or per row broadcast over the other axis."""
    negative = _negatives(cosine, own, inside, filter_above, FILTER)
    return tl.where(own, target_slope, slope * tl.exp(scale * negative - log_sum))


@triton.jit(do_not_specialize=["a"])
def _inverse_length_kernel(
    table, index, inverse_length, a, stride, D: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr
):
    """1 / length of each active row [a]."""
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = position < a
    row = _row_pointers(table, index, stride, position, inside)
    square = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, K):
        entry = start + tl.arange(0, K)
        x = tl.load(row[:, None] + entry[None, :], mask=inside[:, None] & (entry < D)[None, :], other=0.0).to(
            tl.float32
        )
        square += tl.sum(x * x, axis=1)
    tl.store(inverse_length + position, 1.0 / tl.maximum(tl.sqrt_rn(square), _TINY), mask=inside)


@triton.jit(do_not_specialize=["n", "a", "rows_per_split"])
def _forward_kernel(
    embeddings, table, index, inverse_length, target, largest_out, sum_out,
    n, a, stride, rows_per_split, scale, filter_above,
    D: tl.constexpr, SAMPLES: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    """Of one split, per sample: the largest negative cosine and the sum of exp(scale * (cosine - largest)), both
    [splits, n].
    """
    sample = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    here = sample < n
    left = embeddings + sample.to(tl.int64) * D
    own = tl.load(target + sample, mask=here, other=_NO_TARGET)
    largest = tl.full((SAMPLES,), float("-inf"), tl.float32)
    total = tl.zeros((SAMPLES,), tl.float32)
    first = tl.program_id(1) * rows_per_split
    for start in range(first, tl.minimum(first + rows_per_split, a), ROWS):
        position = start + tl.arange(0, ROWS)
        inside = position < a
        right = _row_pointers(table, index, stride, position, inside)
        cosine = _inner_products(left, here, right, inside, D, SAMPLES, ROWS, K)
        cosine *= tl.load(inverse_length + position, mask=inside, other=0.0)[None, :]
        negative = _negatives(cosine, own[:, None] == position[None, :], inside[None, :], filter_above, FILTER)
        higher = tl.maximum(largest, tl.max(negative, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no negative so far: exp(-inf - 0) = 0, not nan
        total = total * tl.exp(scale * (largest - base)) + tl.sum(tl.exp(scale * (negative - base[:, None])), axis=1)
        largest = higher
    out = tl.program_id(1).to(tl.int64) * n + sample
    tl.store(largest_out + out, largest, mask=here)
    tl.store(sum_out + out, total, mask=here)


@triton.jit(do_not_specialize=["n", "a", "rows_per_split"])
def _embeddings_gradient_kernel(
    embeddings, table, index, inverse_length, target, lse, grad_lse, grad_target, out,
    n, a, stride, rows_per_split, scale, filter_above,
    D: tl.constexpr, SAMPLES: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, W: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    """Entries [W] of the gradients of a block of samples, from one split of the rows: out [splits, n, D]."""
    sample = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    here = sample < n
    left = embeddings + sample.to(tl.int64) * D
    own = tl.load(target + sample, mask=here, other=_NO_TARGET)
    log_sum = tl.load(lse + sample, mask=here, other=0.0)
    slope = scale * tl.load(grad_lse + sample, mask=here, other=0.0)
    target_slope = tl.load(grad_target + sample, mask=here, other=0.0)
    entry = tl.program_id(2) * W + tl.arange(0, W)
    WHOLE: tl.constexpr = K >= D
    if WHOLE:
        mine = _vectors(left, here, tl.arange(0, K), D)
    gradient = tl.zeros((SAMPLES, W), tl.float32)
    first = tl.program_id(1) * rows_per_split
    for start in range(first, tl.minimum(first + rows_per_split, a), ROWS):
        position = start + tl.arange(0, ROWS)
        inside = position < a
        right = _row_pointers(table, index, stride, position, inside)
        inverse = tl.load(inverse_length + position, mask=inside, other=0.0)[None, :]
        if WHOLE:
            others = _vectors(right, inside, tl.arange(0, K), D)
            cosine = _dot(mine, tl.trans(others), tl.zeros((SAMPLES, ROWS), tl.float32))
        else:
            cosine = _inner_products(left, here, right, inside, D, SAMPLES, ROWS, K)
        cosine *= inverse
        coefficient = _coefficients(
            cosine, own[:, None] == position[None, :], inside[None, :],
            log_sum[:, None], slope[:, None], target_slope[:, None], scale, filter_above, FILTER,
        )  # fmt: skip
        if not WHOLE or W < D:
            others = _vectors(right, inside, entry, D)
        gradient = _dot((coefficient * inverse).to(table.dtype.element_ty), others, gradient)
    to = out + (tl.program_id(1).to(tl.int64) * n + sample)[:, None] * D + entry[None, :]
    tl.store(to, gradient, mask=here[:, None] & (entry < D)[None, :])


@triton.jit(do_not_specialize=["n", "a"])
def _rows_gradient_kernel(
    embeddings, table, index, inverse_length, target, lse, grad_lse, grad_target, out,
    n, a, stride, scale, filter_above,
    D: tl.constexpr, ROWS: tl.constexpr, SAMPLES: tl.constexpr, K: tl.constexpr, W: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    """Entries [W] of the gradients of a block of rows, from all samples: out [a, D]."""
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = position < a
    left = _row_pointers(table, index, stride, position, inside)
    inverse = tl.load(inverse_length + position, mask=inside, other=0.0)
    entry = tl.program_id(1) * W + tl.arange(0, W)
    WHOLE: tl.constexpr = K >= D
    if WHOLE:
        mine = _vectors(left, inside, tl.arange(0, K), D)
    gradient = tl.zeros((ROWS, W), tl.float32)  # with respect to the unit rows, over the rows' lengths
    along = tl.zeros((ROWS,), tl.float32)  # its part along the row: needs no other entries than the cosines
    for start in range(0, n, SAMPLES):
        sample = start + tl.arange(0, SAMPLES)
        here = sample < n
        right = embeddings + sample.to(tl.int64) * D
        own = tl.load(target + sample, mask=here, other=_NO_TARGET)
        log_sum = tl.load(lse + sample, mask=here, other=0.0)
        slope = scale * tl.load(grad_lse + sample, mask=here, other=0.0)
        target_slope = tl.load(grad_target + sample, mask=here, other=0.0)
        if WHOLE:
            others = _vectors(right, here, tl.arange(0, K), D)
            cosine = _dot(mine, tl.trans(others), tl.zeros((ROWS, SAMPLES), tl.float32))
        else:
            cosine = _inner_products(left, inside, right, here, D, ROWS, SAMPLES, K)
        cosine *= inverse[:, None]
        coefficient = _coefficients(
            cosine, own[None, :] == position[:, None], inside[:, None],
            log_sum[None, :], slope[None, :], target_slope[None, :], scale, filter_above, FILTER,
        )  # fmt: skip
        coefficient = (coefficient * inverse[:, None]).to(table.dtype.element_ty)
        along += tl.sum(coefficient.to(tl.float32) * cosine, axis=1)
        if not WHOLE or W < D:
            others = _vectors(right, here, entry, D)
        gradient = _dot(coefficient, others, gradient)
    # Loaded again for its last use: kept since the loop, the row would occupy registers.
    mask = inside[:, None] & (entry < D)[None, :]
    row = tl.load(left[:, None] + entry[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    gradient -= (along * inverse)[:, None] * row
    tl.store(out + position.to(tl.int64)[:, None] * D + entry[None, :], gradient, mask=mask)


def _inverse_length(table: Tensor, index: Tensor | None, a: int) -> Tensor:
    """Inverse lengths of the active rows: float32 [a]."""
    d = table.shape[1]
    inverse_length = torch.empty(a, device=table.device)
    rows, inner = 32, min(128, triton.next_power_of_2(d))
    _inverse_length_kernel[(triton.cdiv(a, rows),)](table, index, inverse_length, a, table.stride(0), d, rows, inner)
    return inverse_length


def _splits(n: int, a: int, samples: int, rows: int) -> tuple[int, int]:
    """(splits, rows of each but the last) so that blocks of samples x splits come near PROGRAMS."""
    blocks = triton.cdiv(a, rows)
    wanted = min(blocks, max(1, PROGRAMS // triton.cdiv(n, samples)))
    each = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, each), each * rows


def _active(embeddings: Tensor, table: Tensor, index: Tensor | None) -> int:
    """Number of active rows; checks the kernels' assumptions."""
    if embeddings.dtype != torch.float32 or table.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(
            "the kernel takes float32 embeddings and a float32 or bfloat16 table, "
            f"got {embeddings.dtype}, {table.dtype}"
        )
    if table.stride(1) != 1 or (index is not None and not index.is_contiguous()):
        raise ValueError("the rows of the table, and the index, must be contiguous")
    return len(table) if index is None else len(index)


def cosine_lse(
    embeddings: Tensor,
    table: Tensor,
    index: Tensor | None,
    target: Tensor,
    scale: float,
    filter_above: float = 1.0,
    tile: int = 0,
) -> CosineLse:
    """`kernels.cosine_lse.cosine_lse` in one kernel. Needs 4 bytes per row and 8 per sample and split beside its
    results.

    Args:
        embeddings: float32 [n, d], unit length.
        table: float32 or bfloat16 [N, d], the shard's rows.
        index: int64 [a], the active rows of the table; None for all. a may be 0.
        target: int64 [n], position of each sample's class in `index`, NO_TARGET where this shard does not hold it.
        scale: factor on the cosines, positive.
        filter_above: negatives with a larger cosine are left out (1.0: none).
        tile: of the twin; ignored, the kernel has its own block sizes.

    Raises:
        TypeError, ValueError: another type, or a table whose rows are not contiguous.
    """
    a, (n, d) = _active(embeddings, table, index), embeddings.shape
    if n == 0 or a == 0:
        nothing = embeddings.new_full((n,), float("-inf"))
        return CosineLse(nothing, nothing.clone(), embeddings.new_zeros(n))
    blocks = _blocks(_FORWARD, table.dtype, d)
    splits, rows_per_split = _splits(n, a, blocks.owned, blocks.looped)
    largest, sums = embeddings.new_empty(2, splits, n)
    _forward_kernel[(triton.cdiv(n, blocks.owned), splits)](
        embeddings.to(table.dtype).contiguous(), table, index, _inverse_length(table, index, a), target.int(),
        largest, sums,
        n, a, table.stride(0), rows_per_split, scale, filter_above,
        d, blocks.owned, blocks.looped, blocks.inner, filter_above < 1.0,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip
    peak = largest.amax(0)
    base = torch.where(peak == float("-inf"), 0.0, peak)
    lse = scale * base + (sums * torch.exp(scale * (largest - base))).sum(0).log()
    position = target.clamp_min(0)
    own = table[position if index is None else index[position]].float()
    cosine = (embeddings * F.normalize(own, dim=-1)).sum(-1)
    return CosineLse(lse, peak, torch.where(target != NO_TARGET, cosine, 0.0))


def cosine_lse_backward(
    embeddings: Tensor,
    table: Tensor,
    index: Tensor | None,
    target: Tensor,
    scale: float,
    lse: Tensor,
    grad_lse: Tensor,
    grad_target: Tensor,
    filter_above: float = 1.0,
    tile: int = 0,
) -> tuple[Tensor, Tensor]:
    """`kernels.cosine_lse.cosine_lse_backward` in two kernels.

    Needs 4 bytes per row and 4 d per sample and split beside its results.

    Args:
        embeddings, table, index, target, scale, filter_above, tile: as in `cosine_lse`.
        lse: [n], the log-sum-exp over *all* shards.
        grad_lse: [n], gradient with respect to that log-sum-exp.
        grad_target: [n], gradient with respect to the target cosine (used where this shard holds the target).

    Returns:
        (this shard's part of the gradient of the unit embeddings, float32 [n, d], gradient of the active rows, float32
        [a, d]).
    """
    a, (n, d) = _active(embeddings, table, index), embeddings.shape
    if n == 0 or a == 0:
        return torch.zeros_like(embeddings), embeddings.new_zeros(a, d)
    shared = (
        embeddings.to(table.dtype).contiguous(), table, index, _inverse_length(table, index, a), target.int(),
        torch.where(lse.isfinite(), lse, 0.0),  # no negatives anywhere: their terms are exp(-inf) = 0, not nan
        grad_lse.contiguous(), grad_target.contiguous(),
    )  # fmt: skip

    def shape(blocks: Blocks) -> dict[str, int]:
        names = {"D": d, "K": blocks.inner, "W": blocks.width, "FILTER": filter_above < 1.0}
        return names | {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}

    blocks = _blocks(_EMBEDDINGS, table.dtype, d)
    splits, rows_per_split = _splits(n, a, blocks.owned, blocks.looped)
    parts = embeddings.new_empty(splits, n, d)
    _embeddings_gradient_kernel[(triton.cdiv(n, blocks.owned), splits, triton.cdiv(d, blocks.width))](
        *shared, parts, n, a, table.stride(0), rows_per_split, scale, filter_above,
        SAMPLES=blocks.owned, ROWS=blocks.looped, **shape(blocks),
    )  # fmt: skip
    blocks = _blocks(_ROWS, table.dtype, d)
    grad_rows = embeddings.new_empty(a, d)
    _rows_gradient_kernel[(triton.cdiv(a, blocks.owned), triton.cdiv(d, blocks.width))](
        *shared, grad_rows, n, a, table.stride(0), scale, filter_above,
        ROWS=blocks.owned, SAMPLES=blocks.looped, **shape(blocks),
    )  # fmt: skip
    return parts.sum(0), grad_rows
