"""Stragglers: ranks that hold the others up, named in the log."""

from __future__ import annotations

import os
import socket
import statistics

from harness.core.mesh import Mesh
from harness.core.waiting import gather_objects
from harness.train.run_log import RunLog
from harness.train.throughput import StepClock

SLOW = 1.5  # times the median of all ranks' own seconds
LEAST = 0.05  # seconds beyond the median
IN_A_ROW = 3  # lines of the log in which a rank is slow before it is named: a hiccup is not news
AGAIN = 20  # lines of the log after which it is named again


class Stragglers:
    """Compares the ranks' own seconds of the steps that end in a line of the log: the time of a step without the waits
    for other ranks. Ranks that share one copy of the towers (tensor parallelism) are slow together.

    Args:
        mesh: the ranks; collective.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.rank = mesh.rank
        self.nodes = gather_objects(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
        self._slow = [0] * len(self.nodes)  # lines in a row

    def own(self, clock: StepClock) -> list[list[float]]:
        """[world, 2]: own seconds and those of waiting for data in this rank's row, by its `clock`; 0 in the others: to
        be summed over the ranks.
        """
        rows = [[0.0, 0.0] for _ in self.nodes]
        if clock.exact:
            rows[self.rank] = [sum(clock.seconds.values()) - clock.waited, clock.seconds.get("data", 0.0)]
        return rows

    def tell(self, step: int, rows: list[list[float]], log: RunLog) -> None:
        """Names slow ranks in the log; `rows`: the sum of `own` over the ranks."""
        median = statistics.median(own for own, _ in rows)
        for rank, (own, data) in enumerate(rows):
            self._slow[rank] = self._slow[rank] + 1 if own > max(SLOW * median, median + LEAST) else 0
            if self._slow[rank] % AGAIN == IN_A_ROW:
                log.say(
                    f"step {step}: rank {rank} on {self.nodes[rank]} holds the others up: {own:.2f} s of its own in a "
                    f"step, {data:.2f} s of them waiting for data; the median rank {median:.2f} s"
                )
