"""Numbers in fewer bits: stochastic rounding to bf16, and the moments of AdamW in 8 bits a value. Source: ours.

The 8-bit code is float32 with its low bits rounded off, relative to a power of two above the row's largest magnitude:
16 steps an octave over 16 octaves for values that are never negative, 8 an octave and a sign for the others. Rounding
is stochastic: an average that moves by 0.1 % a step would never leave a code 6 % wide. The scale is a power of two so
that a value which does not change is on the grid again after every change of scale, and takes no new error. Blocks are
rows: a class's state can be addressed, moved and dropped by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ONE = 0x3F800000  # 1.0 as int32
_LOW16 = 0xFFFF
_SIGN = 128


def round_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """float32 x to bfloat16, up or down so that the mean is x; the low 16 of the random `bits` (int32, same shape)
    decide.
    """
    return ((x.view(torch.int32) + (bits & _LOW16)) & ~_LOW16).view(torch.float32).to(torch.bfloat16)


def encode(x: Tensor, bits: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 x [n, d] in 8 bits.

    Args:
        x: values; without `signed` none is negative, and none but 0 itself becomes 0.
        bits: int32 [n, d], of which the low 16 are random.
        signed: keep the sign, at half the resolution.

    Returns:
        (codes uint8 [n, d], scales float32 [n, 1], powers of two).
    """
    shift, top = _format(signed)
    magnitude = x.abs()
    scale = _power_above(magnitude.amax(1, keepdim=True))
    code = (magnitude / scale).view(torch.int32)
    code += (bits & _LOW16) << (shift - 16)
    code >>= shift
    code -= (_ONE >> shift) - top
    if signed:
        return (code.clamp_(0, top) | ((x.view(torch.int32) >> 24) & _SIGN)).to(torch.uint8), scale
    return code.clamp_(1, top).masked_fill_(x == 0, 0).to(torch.uint8), scale


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """float32 [n, d] of what `encode` returned."""
    shift, top = _format(signed)
    code = codes.to(torch.int32)
    magnitude = code & ~_SIGN if signed else code
    bits = (magnitude + ((_ONE >> shift) - top)) << shift
    if signed:
        bits |= (code & _SIGN) << 24  # float32's sign bit
    return bits.view(torch.float32).masked_fill_(magnitude == 0, 0).mul_(scales)


def _power_above(x: Tensor) -> Tensor:
    """The least power of two above x >= 0 (1 above 0, 2^127 at most), float32: by its bits, which are the same on every
    device.
    """
    bits = x.view(torch.int32)
    normal = ((bits >> 23) + 1).clamp_max_(254) << 23
    subnormal = 1 << (((bits.to(torch.float32).view(torch.int32) >> 23) - 126) & 31)  # the number of its bits
    power = torch.where(bits < 1 << 23, subnormal, normal).masked_fill_(bits == 0, _ONE)
    return power.view(torch.float32)


def _format(signed: bool) -> tuple[int, int]:
    """(low bits of float32 that are rounded off, code of 1.0)."""
    return (20, 127) if signed else (19, 255)
