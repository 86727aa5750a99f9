"""Exponential moving average of the towers' weights, which evaluation and export use in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Average of this rank's part of every trained parameter, float32: after every step
    average = decay * average + (1 - decay) * weight.

    Of bf16 towers the bf16 weights are averaged: their float32 copies are sharded over the data-parallel ranks.

    Args:
        towers: the model, with frozen parts frozen; the average starts from its present weights.
        decay: in (0, 1); the average remembers about 1 / (1 - decay) steps.

    Attributes:
        state: parameter name -> average.
    """

    def __init__(self, towers: nn.Module, decay: float) -> None:
        self.decay = decay
        trained = [p for p in towers.parameters() if p.requires_grad]
        self._weights = [p.detach() for p in trained]
        self._average = [weight.to(torch.float32, copy=True) for weight in self._weights]
        average = dict(zip(trained, self._average, strict=True))
        # As in the towers' own state: shared parameters by all their names.
        names = towers.named_parameters(remove_duplicate=False)
        self.state: dict[str, Tensor] = {name: average[p] for name, p in names if p.requires_grad}

    @property
    def note(self) -> str:
        """Note for the log."""
        return f"evaluation takes the average of the weights (train.ema_decay {self.decay})"

    def restart(self) -> None:
        """Restarts the average from the present weights."""
        torch._foreach_copy_(self._average, self._weights)

    def update(self) -> None:
        """Adds the weights of one more step."""
        torch._foreach_mul_(self._average, self.decay)
        torch._foreach_add_(self._average, self._weights, alpha=1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the towers' weights are the average."""
        kept = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._average)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, kept)
