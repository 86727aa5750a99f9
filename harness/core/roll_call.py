"""Roll call: results of every rank without a collective, so that a rank that does not come is named."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from harness.core.errors import UserError
from harness.core.mesh import Mesh


class NoAnswer(UserError):
    """Somebody did not answer: nothing can be exchanged any more.

    Args:
        what: what had no answer.
        ranks: those that are silent; empty where it is not known who is at fault.
    """

    def __init__(self, what: str, ranks: tuple[int, ...] = ()) -> None:
        of = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
        super().__init__(f"{what}: no answer{of}")
        self.ranks = ranks


class RollCall:
    """Results meet in the store of the process group.

    Args:
        mesh: the ranks.
        patience: seconds in which work ends; the first rank waits twice as long, for ranks that wait for others.
    """

    def __init__(self, mesh: Mesh, patience: float) -> None:
        self.mesh, self.patience = mesh, patience
        self._store = dist.distributed_c10d._get_default_store()

    def results(self, stage: str, work: Callable[[], Any]) -> list[Any]:
        """Runs work() on every rank; its results, small and fit for JSON, in rank order on all ranks. A UserError of
        work() becomes {"error": text}.

        Raises:
            NoAnswer: on the first rank, where a rank is silent, or in an exchange had no answer. The other ranks then
                wait for its end.
        """
        answered = True
        try:
            own = work()
        except UserError as error:
            own, answered = {"error": str(error)}, not isinstance(error, NoAnswer)
        # Counted in the store, which lives as long as the process group: the n-th call of one rank is that of all.
        key = f"roll-call/{self._store.add(f'roll-call/{self.mesh.rank}', 1)}"
        self._store.set(f"{key}/{self.mesh.rank}", json.dumps([own, answered]))
        if self.mesh.rank == 0:
            self._store.set(f"{key}/all", json.dumps(self._collect(stage, key)))
        while not self._store.check([f"{key}/all"]):  # the watch ends this process with the first rank's
            time.sleep(0.01)
        found: list[Any] = json.loads(self._store.get(f"{key}/all"))
        return found

    def _collect(self, stage: str, key: str) -> list[Any]:
        end = time.monotonic() + 2 * self.patience
        found, silent, unanswered = [], [], []
        for rank in range(self.mesh.world_size):
            while not self._store.check([f"{key}/{rank}"]) and time.monotonic() < end:
                time.sleep(0.005)
            if not self._store.check([f"{key}/{rank}"]):
                silent.append(rank)
                continue
            own, answered = json.loads(self._store.get(f"{key}/{rank}"))
            found.append(own)
            unanswered += [] if answered else [own["error"]]
        if silent or unanswered:
            raise NoAnswer(stage, tuple(silent))
        return found
