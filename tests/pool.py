"""Persistent gloo ranks for the tests: starting a rank costs seconds, so one pool per world size runs many checks.

`ranks(3).run(check, *args)` calls check(*args) on ranks 0..2 at once and returns their results in rank order. A check
is a module-level function; inside, `layout(tp)` gives a Mesh. A check that raises on any rank, or hangs, fails the test
and replaces the pool.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

TIMEOUT = 240.0
KEPT = 6  # ranks of all pools


class Ranks:
    """Processes 0..world_size-1 of one gloo world."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["harness.train.trainer", "harness.commands.evaluate", "tests.pool"])
        self.world_size = world_size
        self.folder = tempfile.TemporaryDirectory(prefix="shelfmark-pool-")
        self.pipes, self.processes, self.checks = [], [], 0
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, theirs))
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, check: Callable[..., Any], *args: Any) -> list[Any]:
        """check(*args) on every rank; raises AssertionError with the first failing rank's traceback."""
        self.checks += 1
        for pipe in self.pipes:
            pipe.send((f"{self.folder.name}/{self.checks}", check, args))
        results: list[Any] = []
        failures: list[str] = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(20.0 if failures else TIMEOUT):
                failures.append(f"rank {rank} of {self.world_size} hangs in {check.__name__}")
                continue
            ok, value = pipe.recv()
            results.append(value)
            if not ok:
                failures.append(f"rank {rank} of {self.world_size}:\n{value}")
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return results

    def stop(self) -> None:
        """Kills the ranks; the next that asks for such a pool gets a new one."""
        for key in [key for key, pool in _pools.items() if pool is self]:
            del _pools[key]
        for process in self.processes:
            process.kill()


def ranks(world_size: int, purpose: str = "") -> Ranks:
    """The pool of that world size; one of its own for a purpose that changes its processes for good.

    A rank holds half a gigabyte and more: pools that were used longest ago end where there are more than KEPT ranks.
    """
    key = (world_size, purpose)
    pool = _pools[key] = _pools.pop(key, None) or Ranks(world_size)
    while len(_pools) > 1 and sum(size for size, _ in _pools) > KEPT:
        next(iter(_pools.values())).stop()
    return pool


_pools: dict[tuple[int, str], Ranks] = {}  # the last used at the end


@atexit.register
def _stop_all() -> None:
    for pool in [*_pools.values()]:
        pool.stop()


@contextmanager
def layout(tensor_parallel: int = 1) -> Iterator[Any]:
    """Inside a check: a Mesh over all ranks of the pool."""
    import torch.distributed as dist

    from harness.core.mesh import Mesh, MeshConfig

    if _world and not dist.is_initialized():  # a second layout in the same check
        _join()
    mesh = Mesh(MeshConfig(tensor_parallel=tensor_parallel))
    try:
        yield mesh
    finally:
        mesh.close()


_world: dict[str, Any] = {}  # in a rank of a pool: how to join the next process group


def _join(backend: str = "gloo") -> None:
    import torch.distributed as dist

    _world["joined"] += 1
    file = f"file://{_world['rendezvous']}-{_world['joined']}"
    dist.init_process_group(backend, init_method=file, rank=_world["rank"], world_size=_world["world_size"])


def _serve(rank: int, world_size: int, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    from harness.core.mesh import quiet_libraries

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    quiet_libraries()
    while True:
        try:
            rendezvous, check, args = pipe.recv()
        except EOFError:
            return
        # Every check gets a world of its own: groups that stayed would keep hundreds of gloo threads awake.
        _world.update(rendezvous=rendezvous, joined=0, rank=rank, world_size=world_size)
        _join()
        try:
            pipe.send((True, check(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()
