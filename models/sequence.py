"""Sequence parallelism: between the linear layers every tensor-parallel rank holds a range of the tokens.

Source: Korthikanti et al. 2022. Padding to any number of tokens and the sums of gradients are ours.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

# megatron-core's tracked random stream that agrees between tensor-parallel ranks, where torch's own is switched to one
# that differs.
COMMON_STREAM = "tensor-parallel-common-rng"


def padded(
    hidden: Tensor, mask: Tensor | None, rotary: Tensor | None, multiple: int
) -> tuple[Tensor, Tensor | int | None, Tensor | None]:
    """Pads hidden [s, b, h], mask bool [b, 1, 1 or s, s] and rotary angles [s, 1, 1, d]: s is rounded up to a multiple.

    No token attends to the padding: as keys it is cut off, not hidden. The mask keeps its columns; without a mask the
    number of visible keys takes its place (SdpaCore). As queries the padding attends to all tokens (zeros in the mask),
    so that its softmax stays finite.
    """
    tokens, missing = len(hidden), -len(hidden) % multiple
    if not missing:
        return hidden, mask, rotary
    if mask is not None and mask.shape[2] > 1:
        mask = F.pad(mask, (0, 0, 0, missing), value=False)
    if rotary is not None:
        rotary = F.pad(rotary, (0, 0, 0, 0, 0, 0, 0, missing))
    return F.pad(hidden, (0, 0, 0, 0, 0, missing)), tokens if mask is None else mask, rotary


def mark_partial(module: nn.Module) -> None:
    """Marks a parameter that its rank applies only to its own tokens; `sequence_parallel` is megatron-core's name."""
    for parameter in module.parameters(recurse=False):
        if not getattr(parameter, "tensor_model_parallel", False):
            parameter.sequence_parallel = True  # type: ignore[attr-defined]


def sum_partial_gradients(module: nn.Module, group: ProcessGroup) -> None:
    """Sums the gradients of marked parameters over the tensor-parallel `group`, in place; collective, once a step,
    after the last backward.

    Takes megatron-core's `main_grad` where it exists: the optimizer reads its buffer.
    """
    marked = [p for p in module.parameters() if getattr(p, "sequence_parallel", False) and p.requires_grad]
    found = [p.main_grad if hasattr(p, "main_grad") else p.grad for p in marked]
    gradients = [g for g in found if g is not None]
    if not gradients or group.size() == 1:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))
