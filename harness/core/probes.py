"""Probes of the machine of a rank: arithmetic, memory, disk. Each gives a rate; a wrong result is a UserError."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.core.errors import UserError

MIB = 1 << 20
_REPEATS = 3  # of a measurement; the fastest counts, as the others shared the machine with something
_SIZE = {"cpu": 768, "cuda": 8192}  # rows of the matrices
_FILL = 0.8  # of a GPU's free memory that is written and read
_PATTERNS = (0x5A5A5A5A, -0x5A5A5A5B)  # every bit once 0 and once 1


def best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of a few calls, after one that is not counted."""
    work()
    best = float("inf")
    for _ in range(_REPEATS):
        _synchronize(device)
        began = time.perf_counter()
        work()
        _synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def arithmetic(device: torch.device) -> float:
    """TFLOP/s of a matrix product: in bfloat16 on a GPU, in float32 on a CPU.

    Its float32 result is compared with float64's. The numbers are small integers, so that every sum is exact in either,
    also in TF32, whatever the order.

    Raises:
        UserError: the results differ.
    """
    n = _SIZE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randint(-3, 4, (n, n), generator=generator, device=device).float() for _ in range(2))
    wrong = int(((a @ b).double() != a.double() @ b.double()).sum())
    if wrong:
        raise UserError(f"{wrong:,} of {n * n:,} numbers of a matrix product are wrong")
    if device.type == "cuda":
        a, b = a.bfloat16(), b.bfloat16()
    return 2 * n**3 / best_seconds(lambda: a @ b, device) / 1e12


def memory(device: torch.device, size: int) -> float:
    """GB/s of writing and reading `size` bytes of main memory, or most of a GPU's free memory in pieces of them.

    Raises:
        UserError: what is read is not what was written, or there is not so much memory.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    try:
        pieces = [
            torch.empty(size // 4, dtype=torch.int32, device=device) for _ in range(max(1, int(_FILL * free) // size))
        ]
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"{size / MIB:,.0f} MiB of memory cannot be allocated") from error
    for pattern in _PATTERNS:
        for piece in pieces:
            piece.fill_(pattern)
        wrong = sum(int((piece != pattern).sum()) for piece in pieces)
        if wrong:
            raise UserError(f"{wrong:,} words of memory do not hold what was written")
    own, other = pieces[0].chunk(2)
    return 2 * own.nbytes / best_seconds(lambda: other.copy_(own), device) / 1e9


def disk(folder: Path, size: int) -> tuple[float, float, float]:
    """GiB free below `folder`, which need not exist, and MB/s of writing and of reading a file of `size` bytes there.

    Raises:
        UserError: it cannot be written, or what is read is not what was written.
    """
    folder = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    data = os.urandom(MIB)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            began = time.perf_counter()
            for _ in range(size // MIB):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            wrote = time.perf_counter() - began
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
            file.seek(0)
            began = time.perf_counter()
            same = all(file.read(MIB) == data for _ in range(size // MIB))
            read = time.perf_counter() - began
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    if not same:
        raise UserError(f"{folder}: a file does not hold what was written")
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize / 2**30, size / wrote / 1e6, size / read / 1e6


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
