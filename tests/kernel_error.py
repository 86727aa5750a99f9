"""Error bound of the fused kernel against float64, for the GPU's test and for the CPU's, which tries it on emulated
arithmetic.

    python -m tests.kernel_error --n 1024 --a 20000 --d 512 --seeds 3

prints error over bound of tf32x3, of a single tf32 product and of bfloat16, emulated. Needs no more than torch.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cosine_lse as twin
from kernels.cosine_lse import NO_TARGET, CosineLse

SCALE = 64.0
NAMES = ("lse", "max_cosine", "target_cosine", "grad_embeddings", "grad_rows")
AWAY = 1e-5  # no cosine is closer to the filter's threshold: on which side it falls must not hang on a rounding
Product = Callable[[Tensor, Tensor], Tensor]


class Inputs(NamedTuple):
    """Arguments of `cosine_lse` and its backward; the embeddings are exact in the table's type."""

    unit: Tensor
    table: Tensor
    index: Tensor
    target: Tensor
    slopes: Tensor
    filter_above: float


def draw(n: int, a: int, d: int, dtype: torch.dtype, filter_above: float, seed: int, device: Any = "cpu") -> Inputs:
    """Random inputs with half of the rows active; embeddings with a cosine close to `filter_above` are drawn again."""
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(2 * a, d, generator=g).to(device, dtype)
    index = torch.randperm(2 * a, generator=g)[:a].sort().values.to(device)
    rows = F.normalize(table[index].double(), dim=-1)
    unit = torch.empty(n, d, device=device)
    again = torch.arange(n, device=device)
    while len(again):
        drawn = F.normalize(torch.randn(len(again), d, generator=g), dim=-1).to(device, dtype).float()
        unit[again] = drawn
        again = again[((drawn.double() @ rows.T - filter_above).abs() < AWAY).any(1)]
    target = torch.randint(-1, a, (n,), generator=g).to(device)
    return Inputs(unit, table, index, target, torch.rand(2, n, generator=g).to(device), filter_above)


def results(module: Any, x: Inputs, kind: torch.dtype = torch.float32) -> list[Tensor]:
    """NAMES by `module`'s two functions, with embeddings of type `kind`."""
    table = x.table.double() if kind == torch.float64 else x.table
    given = (x.unit.to(kind), table, x.index, x.target, SCALE)
    part = module.cosine_lse(*given, x.filter_above)
    slopes = x.slopes.to(kind)
    return [*part, *module.cosine_lse_backward(*given, part.lse, slopes[0], -slopes[1], x.filter_above)]


def error_over_bound(module: Any, x: Inputs) -> dict[str, float]:
    """Name -> error of `module` over what it may be, both as Frobenius norms against float64; inf where another entry
    is finite.

    The bound: twice the float32 twin's error, and of the result 2^-20, some roundings to 24 bits; of gradients 2^-18,
        for a cosine's rounding counts
    SCALE times in a coefficient. A bfloat16 table's coefficients are rounded to 8 bits: there 2^-7 of a gradient.
    """
    found, plain, exact = results(module, x), results(twin, x), results(twin, x, torch.float64)
    gradients = 2**-7 if x.table.dtype == torch.bfloat16 else 2**-18
    ratio = {}
    for name, ours, near, truth in zip(NAMES, found, plain, exact, strict=True):
        finite = truth.isfinite()
        rounding = gradients if name.startswith("grad") else 2**-20
        error, allowed = ((y.double() - truth)[finite].norm() for y in (ours, near))
        bound = 2 * float(allowed) + rounding * float(truth[finite].norm())
        ratio[name] = float(error) / bound if bound else float(error > 0)
        if not torch.equal(ours.isfinite(), finite):
            ratio[name] = math.inf
    return ratio


def tf32(x: Tensor) -> Tensor:
    """x rounded to 11 significant bits, half away from zero: cvt.rna.tf32.f32."""
    return ((x.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def truncated(x: Tensor) -> Tensor:
    """Float64 to float32, towards zero, like a tensor core's sums (Fasi et al. 2021, doi:10.7717/peerj-cs.330)."""
    near = x.float()
    return torch.where(near.double().abs() > x.abs(), near.nextafter(torch.zeros_like(near)), near)


def tensor_core(a: Tensor, b: Tensor, total: Tensor, step: int) -> Tensor:
    """total + a b, exact within `step` entries and truncated after each: what one instruction after the other does."""
    for k in range(0, a.shape[1], step):
        total = truncated(total.double() + a[:, k : k + step].double() @ b[k : k + step].double())
    return total


def tf32x3(a: Tensor, b: Tensor, block: int = 16) -> Tensor:
    """a b as Triton multiplies float32 by tf32x3, a float32 sum over blocks of `block` entries.

    Tensor cores see no more than 11 bits of the low parts: they cut off the rest.
    """
    high = [tf32(x) for x in (a, b)]
    low = [
        ((x - h).view(torch.int32) & ~((1 << 13) - 1)).view(torch.float32) for x, h in zip((a, b), high, strict=True)
    ]
    total = a.new_zeros(a.shape[0], b.shape[1])
    for k in range(0, a.shape[1], block):
        s = slice(k, k + block)
        part = tensor_core(low[0][:, s], high[1][s], torch.zeros_like(total), 8)
        part = tensor_core(high[0][:, s], low[1][s], part, 8)
        total += tensor_core(high[0][:, s], high[1][s], part, 8)
    return total


def one_tf32(a: Tensor, b: Tensor) -> Tensor:
    """a b by a single product of operands of 11 bits: what the kernel must not do."""
    return (tf32(a).double() @ tf32(b).double()).float()


def bfloat16(a: Tensor, b: Tensor) -> Tensor:
    """a b of operands that are exact in bfloat16, by instructions of 16 entries."""
    return tensor_core(a, b, a.new_zeros(a.shape[0], b.shape[1]), 16)


PRODUCTS: dict[str, Product] = {"tf32x3": tf32x3, "tf32": one_tf32, "bf16": bfloat16}


class Emulated:
    """The kernel's arithmetic in plain torch: `product` where it multiplies, operands in the table's type, everything
    else in float32.
    """

    def __init__(self, product: Product, last: int | None = None) -> None:
        """`last`: how many of the active rows it sees, for a kernel that is wrong."""
        self.product, self.last = product, last

    def _cosines(self, unit: Tensor, table: Tensor, index: Tensor, target: Tensor, filter_above: float) -> Any:
        rows = table[index].float()
        inverse = 1 / rows.norm(dim=1)
        cosine = self.product(unit.to(table.dtype).float(), rows.T.contiguous()) * inverse
        own = target[:, None] == torch.arange(len(rows))
        hidden = own | (cosine > (filter_above if filter_above < 1 else math.inf))
        hidden[:, slice(len(rows), None) if self.last is None else slice(self.last, None)] = True
        return rows, inverse, cosine, own, cosine.masked_fill(hidden, -math.inf)

    def cosine_lse(
        self, unit: Tensor, table: Tensor, index: Tensor, target: Tensor, scale: float, filter_above: float
    ) -> CosineLse:
        rows, _, _, _, negative = self._cosines(unit, table, index, target, filter_above)
        largest = negative.amax(1)
        base = torch.where(largest.isfinite(), largest, 0.0)
        lse = scale * base + torch.exp(scale * (negative - base[:, None])).sum(1).log()
        own = (unit * F.normalize(rows[target.clamp_min(0)], dim=-1)).sum(1)
        return CosineLse(lse, largest, torch.where(target != NO_TARGET, own, 0.0))

    def cosine_lse_backward(
        self,
        unit: Tensor,
        table: Tensor,
        index: Tensor,
        target: Tensor,
        scale: float,
        lse: Tensor,
        grad_lse: Tensor,
        grad_target: Tensor,
        filter_above: float,
    ) -> tuple[Tensor, Tensor]:
        rows, inverse, cosine, own, negative = self._cosines(unit, table, index, target, filter_above)
        lse = torch.where(lse.isfinite(), lse, 0.0)[:, None]
        coefficient = (scale * grad_lse)[:, None] * torch.exp(scale * negative - lse)
        coefficient = torch.where(own, grad_target[:, None], coefficient) * inverse
        coefficient = coefficient.to(table.dtype).float()
        along = (coefficient * cosine).sum(0) * inverse
        grad = self.product(coefficient.T.contiguous(), unit.to(table.dtype).float()) - along[:, None] * rows
        return self.product(coefficient, rows), grad


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in {"n": 300, "a": 5000, "d": 256, "seeds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--products", nargs="*", default=list(PRODUCTS), choices=list(PRODUCTS))
    given = parser.parse_args()
    for name in given.products:
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        for filter_above in (1.0, 0.1):
            worst = dict.fromkeys(NAMES, 0.0)
            for seed in range(given.seeds):
                x = draw(given.n, given.a, given.d, dtype, filter_above, seed)
                for key, value in error_over_bound(Emulated(PRODUCTS[name]), x).items():
                    worst[key] = max(worst[key], value)
            figures = "  ".join(f"{key} {value:.3g}" for key, value in worst.items())
            print(f"{name:6s} filter_above {filter_above}  worst of {given.seeds}: {figures}", flush=True)


if __name__ == "__main__":
    main()
