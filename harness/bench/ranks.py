"""Fresh ranks for a measurement, and meters for peak memory and communicated bytes."""

from __future__ import annotations

import ctypes
import functools
import gc
import inspect
import itertools
import multiprocessing
import os
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness.core.errors import UserError

TIMEOUT = timedelta(minutes=30)
MIB = 1 << 20
# Imported once and not in every rank. torch's first optimizer would import torch._dynamo: 180 MB that no measurement
# should count.
PRELOAD = ["harness.bench.report", "models.heads.row_optimizer", "torch._dynamo", __name__]
_number = itertools.count()


def on_ranks(ranks: int, job: Callable[..., Any], *args: Any) -> Any:
    """Runs job(device, *args) in fresh processes that form one process group, free of traces of earlier measurements.

    Under torchrun every rank starts one process, otherwise this process starts them all. They use NCCL if every process
    of the machine has a GPU of its own, else gloo on the CPU with the cores shared equally.

    Args:
        ranks: size of the group; under torchrun its world size.
        job: a module-level function.
        args: its arguments after the device.

    Returns:
        Result of the first process of this machine.

    Raises:
        UserError: torchrun started another number of ranks, or a rank was killed.
        RuntimeError: the job raised; contains its traceback.
    """
    outside = "RANK" in os.environ
    if outside and int(os.environ["WORLD_SIZE"]) != ranks:
        raise UserError(f"--ranks is {ranks}, but torchrun started {os.environ['WORLD_SIZE']}", "Give the same number")
    host = os.environ["MASTER_ADDR"] if outside else "127.0.0.1"
    store = None if outside else dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    port = int(os.environ["MASTER_PORT"]) if store is None else store.port
    prefix = f"measurement-{next(_number)}"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    places = [(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]))] if outside else [(r, r) for r in range(ranks)]

    context = multiprocessing.get_context("forkserver")  # no thread of ours is forked
    context.set_forkserver_preload(PRELOAD)
    pipes, processes = [], []
    for rank, local in places:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_serve, args=(theirs, host, port, prefix, rank, ranks, local, here, job, args), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        results = [_receive(pipe) for pipe in pipes]
        return results[0]
    finally:
        for process in processes:
            process.kill()
            process.join()


def is_first() -> bool:
    """True in the one process that prints."""
    return os.environ.get("RANK", "0") == "0"


def _receive(pipe: Connection) -> Any:
    try:
        failure, result = pipe.recv()
    except EOFError:
        raise UserError("A rank was killed, probably because memory ran out", "Take a smaller --num-classes") from None
    if failure:
        raise RuntimeError(f"a rank failed:\n{failure}")
    return result


def _serve(
    pipe: Connection,
    host: str,
    port: int,
    prefix: str,
    rank: int,
    ranks: int,
    local: int,
    here: int,
    job: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of torch, about its own names
    try:
        cuda = torch.cuda.is_available() and here <= torch.cuda.device_count()
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
        store = dist.PrefixStore(prefix, dist.TCPStore(host, port, is_master=False))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
        result = job(device, *args)
        dist.barrier()
        pipe.send((None, result))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((traceback.format_exc(), None))


def available_memory() -> int:
    """Bytes of main memory available to programs (Linux)."""
    return _kilobytes("/proc/meminfo", "MemAvailable")


class Memory:
    """Bytes that this process holds: resident memory on a CPU (Linux), torch's allocations on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> int:
        """Releases free memory, resets the peak, and returns the bytes held now."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _kilobytes("/proc/self/status", "VmRSS")

    def peak(self) -> int:
        """Largest number of bytes held at a time since start()."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _kilobytes("/proc/self/status", "VmHWM")


class Stages:
    """Peak memory and time of a measurement's stages, on the CPU.

    Attributes:
        rows: a row for each stage, the same on every rank: the most memory that a rank held, and this rank's seconds.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._memory = Memory(torch.device("cpu"))

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Does `work` on every rank as the stage `name`; returns what it makes."""
        self._memory.start()
        started = time.perf_counter()
        made = work()
        peak = torch.tensor(self._memory.peak() / MIB)
        dist.barrier()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        self.rows.append({"stage": name, "peak_mib": float(peak), "seconds": round(time.perf_counter() - started, 1)})
        return made


def _kilobytes(file: str, key: str) -> int:
    """Value of `key` in a file of /proc, in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path(file).read_text())
    assert found is not None
    return 1024 * int(found[1])


# collective -> (argument whose bytes count, passes of these bytes through a rank in a ring)
_COLLECTIVES = {
    "all_reduce": ("tensor", 2),
    "reduce": ("tensor", 1),
    "broadcast": ("tensor", 1),
    "all_gather": ("tensor_list", 1),
    "all_gather_into_tensor": ("output_tensor", 1),
    "reduce_scatter_tensor": ("input", 1),
    "all_to_all_single": ("input", 1),
}


class Traffic:
    """Bytes that an average rank sends in the collectives called through torch.distributed inside `counted()`.

    Counted for a ring over n ranks: (n - 1) / n of the whole tensor, twice for an all-reduce. A backend may send more.
    """

    def __init__(self) -> None:
        self.bytes = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts inside the block."""
        real = {name: getattr(dist, name) for name in _COLLECTIVES}
        try:
            for name, collective in real.items():
                setattr(dist, name, self._counting(collective, *_COLLECTIVES[name]))
            yield
        finally:
            for name, collective in real.items():
                setattr(dist, name, collective)

    def _counting(self, collective: Callable[..., Any], argument: str, passes: int) -> Callable[..., Any]:
        signature = inspect.signature(collective)

        @functools.wraps(collective)
        def counting(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            tensors = given[argument] if isinstance(given[argument], list) else [given[argument]]
            ranks = dist.get_world_size(given.get("group"))
            self.bytes += passes * (ranks - 1) / ranks * sum(tensor.nbytes for tensor in tensors)
            return collective(*args, **kwargs)

        return counting
