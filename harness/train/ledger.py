"""Ledger of a run: a checksum of the samples of all its steps, equal at any number of ranks and compared on resume."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness.core.errors import UserError
from harness.core.mesh import Mesh
from harness.data.loader import StepLoader

LEDGER_STEPS = 1000  # steps whose samples a resume draws again and compares
MODULUS = 2**64


class Ledger:
    """Sum of the ledgers of a run's steps (`StepData.ledger`), modulo 2**64.

    A checkpoint also stores the sum as it was LEDGER_STEPS steps earlier: the difference checks a resume without
    drawing the whole run again.

    Attributes:
        total: of all steps up to the last checkpoint, over all ranks.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.total = 0
        self._since = 0  # this rank's share since the last checkpoint
        # One entry for each of the last steps: this rank's share. Of steps before a resume dp rank 0 has the whole.
        self._last: deque[int] = deque(maxlen=LEDGER_STEPS)

    def restart(self) -> None:
        """Forgets all steps."""
        self.total = self._since = 0
        self._last.clear()

    def add(self, share: int) -> None:
        """Adds this rank's share of one step."""
        self._since += share
        self._last.append(share)

    def state(self, step: int) -> dict[str, Any]:
        """Brings `total` up to `step`, the number of finished steps, and returns it for state.json; collective over
        dp.
        """
        own = [number % MODULUS for number in (self._since, sum(self._last))]
        halves = [[number >> 32, number & 0xFFFFFFFF] for number in own]  # a sum of 64-bit words would not fit int64
        summed = torch.tensor(halves, dtype=torch.int64, device=self.mesh.device)
        dist.all_reduce(summed, group=self.mesh.dp)
        new, last = ((high << 32) + low for high, low in summed.tolist())
        self.total, self._since = (self.total + new) % MODULUS, 0
        before = {"step": step - len(self._last), "ledger": f"{(self.total - last) % MODULUS:016x}"}
        return {"ledger": f"{self.total:016x}", "ledger_before": before}

    def resume(self, state: dict[str, Any]) -> None:
        """Takes the total of a checkpoint's state.json."""
        self.total = int(state["ledger"], 16)

    def compare(self, checkpoint: Path, state: dict[str, Any], loader: StepLoader) -> list[str]:
        """Compares the samples of the last steps before `checkpoint` with those that the order gives now. Every rank
        draws all of them.

        Returns:
            Notes for the log.

        Raises:
            UserError: the order is not the one that was trained on.
        """
        before, step = state.get("ledger_before"), state["step"]
        if before is None:
            return [f"{checkpoint.name} was saved by an earlier version: its last samples are not compared"]
        ledgers = loader.ledgers(before["step"], step)
        if (int(before["ledger"], 16) + sum(ledgers)) % MODULUS != self.total:
            raise UserError(
                f"{checkpoint}: the samples of its steps {before['step']} to {step - 1} are not those that "
                f"{loader.config.catalogue} gives now: the order is not the one that was trained on",
                "Restore classes/ and the version of shelfmark that trained, or choose another --run-dir",
            )
        self._last.extend(ledgers if self.mesh.dp.rank() == 0 else [0] * len(ledgers))
        return []
