"""Triton kernels compiled for an absent GPU: registers, spills, shared memory, tensor-core products, occupancy."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from harness.bench.report import bench_main, finish
from harness.core.errors import UserError
from models.ranges import PositiveInt

MODULE = "harness.bench.kernels"
EXAMPLE = f"python -m {MODULE} --dtype bf16 --dim 512 --json kernels.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Compute capability -> limits of a multiprocessor (SM) and of a block (CUDA C++ Programming Guide, "Compute
# Capabilities").
SHARED_OF_PROCESSOR = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
RESERVED_SHARED = 1 << 10  # of every block, for the driver
REGISTERS_OF_PROCESSOR = 65536
WARPS_OF_PROCESSOR = 64
TENSOR_CORE = r"wgmma\.mma_async|\bmma\.sync|tcgen05\.mma"


def _cosine_lse(dtype: torch.dtype, d: int, filter_above: float = 1.0) -> None:
    from kernels.cosine_lse_triton import cosine_lse, cosine_lse_backward

    n, a = 256, 4096
    embeddings, table = torch.zeros(n, d), torch.zeros(2 * a, d, dtype=dtype)
    index, target, slope = torch.arange(a), torch.zeros(n, dtype=torch.int64), torch.zeros(n)
    cosine_lse(embeddings, table, index, target, 64.0, filter_above)
    cosine_lse_backward(embeddings, table, index, target, 64.0, slope, slope, slope, filter_above)


def _row_update(dtype: torch.dtype, d: int) -> None:
    from kernels.row_update import RowTable, row_state
    from kernels.row_update_triton import adamw_rows, decay_rows

    rows, active, one = torch.zeros(4, d, dtype=dtype), torch.arange(4), torch.ones(4, 1)
    for eight_bit, master in itertools.product((False, True), {False, dtype == torch.bfloat16}):
        # The key and the first class are as large as they may be.
        table = RowTable(rows, row_state(rows, eight_bit, master), key=1 << 60, first_class=1 << 40)
        adamw_rows(table, active, torch.ones(4, d), one, one, one, (0.9, 0.999), 1e-8)
        decay_rows(table, active, one)


# Module name -> function that calls its launchers on CPU tensors of a table of that type and width; a launch becomes a
# compilation.
LAUNCHES: dict[str, Callable[[torch.dtype, int], None]] = {
    "cosine_lse": _cosine_lse,
    "cosine_lse_filtered": functools.partial(_cosine_lse, filter_above=0.5),
    "row_update": _row_update,
}


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Compiles every kernel as its launcher does, for GPUs that may be absent, and reads the assembler's messages.

    Args:
        kernels: launchers to call (LAUNCHES).
        dtype: types of the table, fp32 or bf16.
        dim: entries of a vector.
        capability: compute capabilities: 80 (A100), 90 (H100, H200), 100 (B200).
    """

    kernels: tuple[str, ...] = tuple(LAUNCHES)
    dtype: tuple[str, ...] = ("fp32", "bf16")
    dim: tuple[PositiveInt, ...] = (256, 512, 768, 1024)
    capability: tuple[int, ...] = (90,)

    def __post_init__(self) -> None:
        for flag, values, known in (
            ("kernels", self.kernels, LAUNCHES),
            ("dtype", self.dtype, DTYPES),
            ("capability", self.capability, SHARED_OF_PROCESSOR),
        ):
            for value in values:
                if value not in known:
                    raise UserError(f"--{flag} has {value!r}", f"Known are {', '.join(map(str, known))}")


def compile_launches(launch: Callable[[], None], capability: int) -> list[dict[str, Any]]:
    """Runs `launch` with every start of a Triton kernel replaced by its compilation, as on a GPU of that capability.

    The arguments, their types, specialisations and options are those of the launch. Results of the launcher have no
    meaning. Does not work in Triton's interpreter.

    Returns:
        A flat row per kernel; equal launches of a kernel give one row.
    """
    rows: list[dict[str, Any]] = []
    with _compiling(capability, lambda kernel, log: rows.append(_row(kernel, log, capability))):
        launch()
    return rows


class _Driver:
    """The part of a GPU's driver that Triton uses before a launch. Each instance is a device of its own, because Triton
    caches compilations by device.
    """

    _number = itertools.count()

    def __init__(self, target: Any) -> None:
        self.target, self.device = target, next(self._number)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextlib.contextmanager
def _compiling(capability: int, seen: Callable[[Any, str], object]) -> Iterator[None]:
    """Inside, a launch compiles and calls seen(compiled kernel, the assembler's messages) instead, unless it equals an
    earlier one.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, so Triton compiles nothing", "Unset it")
    run = JITFunction.run

    def instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        if log.getvalue():
            seen(kernel, log.getvalue())

    active = driver._active
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
        try:
            driver.set_active(_Driver(GPUTarget("cuda", capability, 32)))
            JITFunction.run = instead
            yield
        finally:
            JITFunction.run, driver._active = run, active


def _row(kernel: Any, log: str, capability: int) -> dict[str, Any]:
    """Figures of a compiled kernel. tensor_core: number of tensor-core instructions; serialized: True if the assembler
    made asynchronous products wait for each other.
    """

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        assert found is not None, f"{pattern} in {log}"
        return int(found[1])

    registers, warps, shared = number(r"Used (\d+) registers"), kernel.metadata.num_warps, kernel.metadata.shared
    blocks = blocks_of_processor(capability, registers, warps, shared)
    return {
        "kernel": kernel.metadata.name.strip("_").removesuffix("_kernel"),
        "warps": warps,
        "stages": kernel.metadata.num_stages,
        "registers": registers,
        "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "shared_bytes": shared,
        "multiplies": "tt.dot" in kernel.asm["ttir"],
        "tensor_core": len(re.findall(TENSOR_CORE, kernel.asm["ptx"])),
        "serialized": "serialized" in log,
        "blocks_per_sm": blocks,
        "occupancy": blocks * warps / WARPS_OF_PROCESSOR,
    }


def _assembler(capability: int) -> str:
    """Version of the assembler that comes with Triton for that capability."""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(capability).version)


def blocks_of_processor(capability: int, registers: int, warps: int, shared: int) -> int:
    """Blocks resident on a multiprocessor; registers are allocated in units of 256 a warp, 8 a thread."""
    of_warp = 32 * -(-registers // 8) * 8
    by_registers = REGISTERS_OF_PROCESSOR // of_warp // warps
    by_shared = SHARED_OF_PROCESSOR[capability] // (-(-shared // 128) * 128 + RESERVED_SHARED)
    return min(by_registers, by_shared, WARPS_OF_PROCESSOR // warps, 32)


def run(config: KernelsConfig) -> dict[str, Any]:
    """Compiles, prints and returns the report (see `harness/bench/report.py`).

    Headline, per capability: bytes spilled by all kernels together, largest shared memory of a block, number of kernels
    that multiply without tensor cores.
    """
    rows: list[dict[str, Any]] = []
    cases = list(itertools.product(config.kernels, config.dtype, config.dim, config.capability))
    for name, dtype, d, capability in tqdm(cases, desc="compile", unit=" launches"):
        launch = functools.partial(LAUNCHES[name], DTYPES[dtype], d)
        case = {"launch": name, "dtype": dtype, "d": d, "sm": capability, "ptxas": _assembler(capability)}
        rows += [case | row for row in compile_launches(launch, capability)]
    headline: dict[str, float] = {}
    for capability in config.capability:
        of = [row for row in rows if row["sm"] == capability]
        headline |= {
            f"sm_{capability}_spill_bytes": sum(row["spill_bytes"] for row in of),
            f"sm_{capability}_shared_kib": max(row["shared_bytes"] for row in of) / 1024,
            f"sm_{capability}_without_tensor_cores": sum(row["multiplies"] and not row["tensor_core"] for row in of),
        }
    return finish(MODULE, config, headline, rows)


def main() -> int:
    """Entry point of `python -m harness.bench.kernels`."""
    return bench_main(MODULE, KernelsConfig, run, "Compilation of the Triton kernels for a GPU; needs none.", EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
