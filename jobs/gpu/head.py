"""Step time and memory of the class head beside Partial FC's scheme, full softmax, and the limit by memory bandwidth.

python jobs/gpu/head.py OUT.json --classes 1000000 [--sides ours partial_fc_fused ...]

One side in memory at a time: one that does not fit costs its own row. World 1; d 512, batch 1,024, rate 0.1, AdamW,
CosFace.
"""

from __future__ import annotations

import gc
import itertools
import statistics
from typing import Any

import torch
import torch.distributed as dist

from harness.bench.gpu import Program, bandwidth, matrix_rate
from harness.bench.head import PHASES, SIDES, Setting, draw, make_side
from harness.bench.head_memory import PER_VALUE, HeadMemoryConfig, computed_mib
from harness.bench.ranks import MIB

MEASURED = ["ours_bf16_8bit", "partial_fc_fused", "ours", "ours_bf16", "full_softmax"]
COMPUTED = {
    "ours": "ours_fp32",
    "ours_bf16": "ours_fp32",
    "partial_fc_fused": "partial_fc_adamw",
    "full_softmax": "full_softmax_adamw",
}
# Bytes that a step must move for each entry of an active row: rows are read by forward, backward and update and written
# by it, their gradient is written and read, moments are read and written. With a master copy the update reads and
# writes that, and writes the row.
MOVED = {
    "ours": 4 * 4 + 2 * 4 + 2 * 8,
    "ours_bf16": 3 * 2 + 2 * 4 + 2 * 4 + 2 * 8,
    "ours_bf16_8bit": 4 * 2 + 2 * 4 + 2 * 2,
}


def measure(program: Program, name: str, setting: Setting, steps: int, rates: tuple[float, float]) -> float:
    """Adds the row of one side; its median step in seconds. `rates`: bytes and bf16 FLOPs a second that this device
    reaches.
    """
    cuda = program.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = program.synchronize()
    side = make_side(name, setting, program.device)
    side.begin()
    built, seconds = program.synchronize() - began, []
    for number in range(steps + 1):  # the first compiles
        embeddings, labels = draw(setting, number, program.device)
        stamps = [program.synchronize()]
        for _ in side.step(embeddings, labels, number):
            stamps.append(program.synchronize())
        seconds.append([later - earlier for earlier, later in itertools.pairwise(stamps)])
    middle = [statistics.median(phase) for phase in zip(*seconds[1:], strict=True)]
    step = statistics.median(map(sum, seconds[1:]))
    row: dict[str, Any] = {
        "side": name,
        "classes": setting.num_classes,
        "active_rows": side.active_rows,
        "step_ms": 1e3 * step,
    }
    row |= {f"{phase}_ms": 1e3 * value for phase, value in zip(PHASES, middle, strict=True)}
    entries = side.active_rows * setting.embedding_dim
    row["head_tflops"] = 10 * setting.batch * entries / sum(middle[:2]) / 1e12
    if name in MOVED:
        row["memory_limit_ms"] = 1e3 * MOVED[name] * entries / rates[0]
        row["matrix_limit_ms"] = 1e3 * 10 * setting.batch * entries / rates[1]
        row["by_memory_limit"] = row["step_ms"] / row["memory_limit_ms"]
    if cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    program.add(**row, first_step_s=sum(seconds[0]), built_s=built)
    return step


def main() -> None:
    """Entry point."""
    flags = {"classes": 1_000_000, "sides": MEASURED, "steps": 6}
    program = Program("gpu head", "The class head beside its peers.", flags)
    cuda = program.device.type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    given = program.given
    classes, width, batch, steps = (2000, 32, 32, 2) if program.tiny else (given.classes, 512, 1024, given.steps)
    setting = Setting(classes, width, batch, 0.1)
    rates = bandwidth(program.device), matrix_rate(program.device, torch.bfloat16 if cuda else torch.float32)
    program.add(side="device", bandwidth_gb_per_s=rates[0] / 1e9, matrix_tflops=rates[1] / 1e12)
    found = {}
    for name in given.sides:
        need = (
            computed_mib(COMPUTED.get(name, name), HeadMemoryConfig(embedding_dim=width, batch=batch), classes, 1) * MIB
        )
        assert name in SIDES and COMPUTED.get(name, name) in PER_VALUE
        free = torch.cuda.mem_get_info()[0] if cuda else float("inf")
        if need > 0.97 * free:
            gib = f"{need / 2**30:.0f} GiB are needed by computation, {free / 2**30:.0f} are free"
            program.add(side=name, classes=classes, skipped=gib)
            continue
        try:
            found[name] = measure(program, name, setting, steps, rates)
        except torch.OutOfMemoryError as error:
            program.add(side=name, classes=classes, skipped=f"out of memory: {str(error)[:150]}")
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    if {"ours_bf16_8bit", "partial_fc_fused"} <= found.keys():
        program.bar(
            "step_by_partial_fc_fused", found["ours_bf16_8bit"] / found["partial_fc_fused"], 0.25, at_least=False
        )
    for row in program.rows:
        if row.get("side") == "ours_bf16_8bit" and "by_memory_limit" in row:
            program.bar("ours_bf16_8bit_step_by_memory_limit", float(row["by_memory_limit"] or 0), 3.0, at_least=False)
    dist.destroy_process_group()
    program.exit()


if __name__ == "__main__":
    main()
