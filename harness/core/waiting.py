"""Waits for work of unbounded length on some ranks, without a collective whose timeout would end the run.

The ranks meet in the store of the process group. A rank that raises or hangs (`harness.core.watch`) ends the wait of
all others with an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from harness.core.errors import UserError

if TYPE_CHECKING:
    from harness.core.mesh import Mesh

T = TypeVar("T")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.5  # seconds between two looks at the store


def in_own_time(work: Callable[[], T], mesh: Mesh, what: str) -> T:
    """work() of this rank, returned after every rank has finished its own, however long that takes; collective.

    Args:
        work: may differ between ranks; must not call collectives.
        mesh: its watch bounds the silence of a rank, not the length of its work.
        what: the work in words, for an error: 'writing the documents'.

    Raises:
        UserError: work() of some rank raised one (raised on all), or a rank was silent for mesh.timeout_minutes.
        RuntimeError: work() of another rank raised another exception.
    """
    if mesh.world_size == 1:
        return work()
    place = _Place(mesh, what)
    with mesh.watch.doing(what):
        try:
            result = work()
        except BaseException as error:
            place.fail(error)
            raise
        place.finish()
        place.wait()
    return result


def on_first_rank(make: Callable[[], T], mesh: Mesh, what: str) -> T:
    """make() of rank 0 for every rank, however long it takes; collective. Raises as `in_own_time`."""
    made: list[Any] = [in_own_time(make if mesh.rank == 0 else lambda: None, mesh, what)]
    dist.broadcast_object_list(made)
    return made[0]


def of_all_ranks(work: Callable[[], T], mesh: Mesh, what: str) -> list[T]:
    """work() of every rank, in rank order, for every rank, however long it takes; collective. Raises as
    `in_own_time`.
    """
    made = in_own_time(work, mesh, what)
    parts: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(parts, made)
    return parts


class _Place:
    """This rank in one wait. Rank 0 watches all ranks, the others watch rank 0: few reads of the store at any number of
    ranks.
    """

    def __init__(self, mesh: Mesh, what: str) -> None:
        self.mesh, self.what = mesh, what
        self.store = dist.distributed_c10d._get_default_store()
        # Counted in the store, which lives as long as the process group: the n-th wait of one rank is that of all.
        self.key = f"waiting/{self.store.add(f'waiting/{mesh.rank}', 1)}"

    def finish(self) -> None:
        self.store.set(f"{self.key}/done/{self.mesh.rank}", "")

    def fail(self, error: BaseException) -> None:
        kind = "mistake" if isinstance(error, UserError) else "failure"
        text = str(error) if kind == "mistake" else f"rank {self.mesh.rank} failed in {self.what}: {error!r}"
        self.store.set(f"{self.key}/{kind}", text)

    def wait(self) -> None:
        """Returns when all ranks have finished: rank 0 sees it and tells the others."""
        missing = [f"done/{rank}" for rank in range(1, self.mesh.world_size)] if self.mesh.rank == 0 else ["all"]
        pause, watch = _FIRST_PAUSE, self.mesh.watch
        watch.waits = True
        while missing := [name for name in missing if not self.store.check([f"{self.key}/{name}"])]:
            self._raise_failure()
            if watch.lost:
                self.fail(watch.lost)
                raise watch.lost
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        watch.waits = False
        self._raise_failure()
        if self.mesh.rank == 0:
            self.store.set(f"{self.key}/all", "")

    def _raise_failure(self) -> None:
        for kind, error in (("mistake", UserError), ("failure", RuntimeError)):
            if self.store.check([f"{self.key}/{kind}"]):
                raise error(self.store.get(f"{self.key}/{kind}").decode())
