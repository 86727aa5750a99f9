"""Exchange of Python objects between ranks, and waits for work of unbounded length, which no collective's timeout ends.

The ranks meet in the store of the process group. A rank that raises or stands still (`harness.core.watch`) ends the
wait of all others with an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from harness.core.errors import UserError

if TYPE_CHECKING:
    from harness.core.mesh import Mesh

T = TypeVar("T")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.5  # seconds between two looks at the store


def gather_objects(own: T, group: ProcessGroup | None = None) -> list[T]:
    """Gathers a small picklable object of every rank of `group` (None: the world), in rank order; collective."""
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, own, group=group)
    return parts


def in_own_time(work: Callable[[], T], mesh: Mesh, what: str) -> T:
    """Runs work() and returns its result once every rank has finished its own, however long that takes; collective.

    Args:
        work: may differ between ranks, and takes part in no collective.
        mesh: its watch bounds the silence of a rank, not the length of its work.
        what: the work in words, for an error: 'writing the documents'.

    Raises:
        UserError: work() of some rank raised one: raised on all; or a rank was not heard of for mesh.timeout_minutes.
        RuntimeError: work() of another rank raised something else.
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
    """Runs make() on rank 0 and gives its result to every rank; collective. Raises what `in_own_time` does."""
    made: list[Any] = [in_own_time(make if mesh.rank == 0 else lambda: None, mesh, what)]
    dist.broadcast_object_list(made)
    return made[0]


def of_all_ranks(work: Callable[[], T], mesh: Mesh, what: str) -> list[T]:
    """Runs work() on every rank and gives all results, in rank order, to every rank; collective. Raises what
    `in_own_time` does.
    """
    return gather_objects(in_own_time(work, mesh, what))


class _Place:
    """State of this rank in one wait. Rank 0 watches all ranks, the others watch rank 0, so that a look at the store
    costs few reads at any number of ranks.
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
        """Returns when all ranks have finished; rank 0 sees it and tells the others."""
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
