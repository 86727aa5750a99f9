"""Links between ranks: bandwidth of collectives and of pairs; results are checked, and every wait is bounded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.core.errors import UserError
from harness.core.mesh import Mesh
from harness.core.roll_call import NoAnswer

_REPEATS = 3


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """All pairs of `count` places in rounds (the circle method): in a round each place is in one pair at most."""
    places = [*range(count), *([-1] * (count % 2))]
    found = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        found.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        places.insert(1, places.pop())
    return found


class Links:
    """Exchanges between the ranks.

    Args:
        mesh: the ranks.
        patience: seconds that one exchange may take, and that a rank may come late to it.
    """

    def __init__(self, mesh: Mesh, patience: float) -> None:
        self.mesh, self.patience = mesh, patience

    def all_reduce(self, size: int, group: Any = None) -> float:
        """GB/s of the sum of `size` bytes over `group`, as a link of a ring carries them; collective."""
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        x = self._numbers(size, 0)
        expected = x * len(ranks) + sum(ranks)
        x += self.mesh.rank
        result = torch.empty_like(x)

        def start() -> list[dist.Work]:
            result.copy_(x)
            return [dist.all_reduce(result, group=group, async_op=True)]

        seconds = self._seconds(start, lambda: torch.equal(result, expected), "all_reduce")
        return 2 * (len(ranks) - 1) / len(ranks) * x.nbytes / seconds / 1e9

    def all_gather(self, size: int, group: Any = None) -> float:
        """As `all_reduce`, of a gather of `size` bytes in all."""
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        x = self._numbers(size // len(ranks), self.mesh.rank)
        result = x.new_empty(len(ranks) * len(x))
        expected = torch.cat([self._numbers(size // len(ranks), rank) for rank in ranks])

        def start() -> list[dist.Work]:
            return [dist.all_gather_into_tensor(result, x, group=group, async_op=True)]

        seconds = self._seconds(start, lambda: torch.equal(result, expected), "all_gather")
        return (len(ranks) - 1) / len(ranks) * result.nbytes / seconds / 1e9

    def exchange(self, size: int, peer: int) -> float:
        """GB/s, one way, of `size` bytes to rank `peer` and as many from it at once."""
        own, expected = self._numbers(size, self.mesh.rank), self._numbers(size, peer)
        got = torch.empty_like(own)

        def start() -> list[dist.Work]:
            return dist.batch_isend_irecv([dist.P2POp(dist.isend, own, peer), dist.P2POp(dist.irecv, got, peer)])

        return own.nbytes / self._seconds(start, lambda: torch.equal(got, expected), f"exchange with rank {peer}") / 1e9

    def _numbers(self, size: int, rank: int) -> Tensor:
        """float32 of `size` bytes, at least one; sums of them over a million ranks are exact."""
        return torch.arange(max(1, size // 4), device=self.mesh.device).remainder_(13).float() + rank

    def _seconds(self, start: Callable[[], Sequence[dist.Work]], is_right: Callable[[], bool], what: str) -> float:
        """Seconds of the fastest of a few exchanges, after one that makes the connections.

        Raises:
            NoAnswer: no end within `patience`.
            UserError: a wrong result.
        """
        best, right = float("inf"), True
        for _ in range(1 + _REPEATS):
            self.mesh.synchronize()
            began = time.perf_counter()
            self._wait(start(), what)
            best = min(best, time.perf_counter() - began)
            right = is_right() and right  # told at the end: the other side counts on every repeat
        if not right:
            raise UserError(f"{what}: wrong result")
        return best

    def _wait(self, works: Sequence[dist.Work], what: str) -> None:
        end = time.monotonic() + self.patience
        try:
            for work in works:
                if self.mesh.device.type == "cpu":
                    work.wait(timedelta(seconds=max(0.001, end - time.monotonic())))
                while not work.is_completed() and self.mesh.device.type == "cuda":  # wait() does not wait for a GPU
                    if time.monotonic() > end:
                        raise RuntimeError("timeout")
        except RuntimeError as error:
            raise NoAnswer(what) from error
