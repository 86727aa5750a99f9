"""Copies from the host to the device that wait neither for the copy nor for the device's queue."""

from __future__ import annotations

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; from the host by way of pinned memory, since a copy out of pageable memory waits for the
    device's queue.
    """
    if device.type != "cpu" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def places(mask: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns int64 [m] on `device` where `mask`, bool [n, k], is true. A mask on the host needs no wait."""
    rows, columns = mask.nonzero(as_tuple=True)
    return send(rows, device), send(columns, device)
