"""Memory of the class-parallel head on a GPU by classes and GPUs: computed term by term, and measured at one point."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from harness.bench.head import MB, Setting, measure_memory
from harness.bench.ranks import is_first, on_ranks
from harness.bench.report import bench_main, command_line, make_report, print_report
from harness.core.errors import UserError

MODULE = "harness.bench.head_memory"
EXAMPLE = f"python -m {MODULE} --num-classes 1000000 --ranks 8 --json head_memory.json"
MIB = 2**20
MILLIONS, GPUS = (1, 10, 29, 67, 100), (1, 8, 16, 64)

# Bytes per row and column: (kept for every row, more for an active one). Moments: AdamW keeps two, momentum one.
PER_VALUE = {
    "ours_fp32": (4 + 8, 4),
    "ours_bf16_8bit": (2 + 2, 4),  # bf16 rows without a master copy, two moments of a byte each
    "partial_fc_momentum": (4 + 4 + 4, 0),  # rows, dense gradient, momentum
    "partial_fc_adamw": (4 + 4 + 8, 0),
    "full_softmax_adamw": (4 + 4 + 8, 0),
}
# Bytes per row: an int32 counts its updates, a float64 says which weight decay was paid; 8-bit moments have two fp32
# scales.
PER_ROW = {"ours_fp32": 12, "ours_bf16_8bit": 12 + 8}


@dataclass(frozen=True, kw_only=True)
class HeadMemoryConfig:
    """Computes a head's memory on a GPU, and measures ours with bf16 rows and 8-bit moments in ranks of this machine.

    Args:
        num_classes: classes of the measured point; it is measured at half as many too.
        embedding_dim: width of the embeddings, of the table too.
        ranks: processes that share the classes of the measured point; under torchrun its world size.
        batch: samples on one GPU, of the table too.
        sample_rate: share of the classes that serve as negatives in a step, of the table too.
    """

    num_classes: int = 1_000_000
    embedding_dim: int = 512
    ranks: int = 8
    batch: int = 64
    sample_rate: float = 0.1

    def __post_init__(self) -> None:
        for name in ("num_classes", "embedding_dim", "ranks", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}", "It must be at least 1")
        if self.num_classes < 2 * self.ranks:
            raise UserError(
                f"{self.num_classes} classes are too few for {self.ranks} ranks", "Take --num-classes larger"
            )
        if not 0 < self.sample_rate <= 1:
            raise UserError(f"--sample-rate is {self.sample_rate}", "It must lie in (0, 1]")


def run(config: HeadMemoryConfig) -> dict[str, Any]:
    """Measures, computes, prints and returns the report (see `harness/bench/report.py`).

    Headline, of a rank with its rows, by a million classes: `measured_…`, the peak in making the optimizer and in three
    steps; `added_…`, what the second half of the classes added to it, without the working memory that does not grow;
    `computed_…`, what the formula gives.
    """
    halves = []
    for classes in (config.num_classes // 2, config.num_classes):
        point = Setting(classes, config.embedding_dim, config.ranks * config.batch, config.sample_rate)
        found = on_ranks(config.ranks, measure_memory, "ours_bf16_8bit", point)
        halves.append((classes / 1e6, (found["peak_mb"] + found["left_out_mb"]) * MB / MIB))
    (half, less), (millions, measured) = halves
    computed = computed_mib("ours_bf16_8bit", config, config.num_classes, config.ranks)
    rows: list[dict[str, Any]] = [
        {"kind": "computed", "million_classes": count, "gpus": gpus}
        | {f"{side}_mib": computed_mib(side, config, count * 1e6, gpus) for side in PER_VALUE}
        for count in MILLIONS
        for gpus in GPUS
    ]
    rows += [
        {"kind": "measured", "million_classes": count, "gpus": config.ranks, "ours_bf16_8bit_mib": mib}
        for count, mib in halves
    ]
    headline = {
        "measured_mib_per_million_classes": measured / millions,
        "added_mib_per_million_classes": (measured - less) / (millions - half),
        "computed_mib_per_million_classes": computed / millions,
    }
    report = make_report("head_memory", command_line(MODULE, config), headline, rows)
    if is_first():
        print_report(report)
    return report


def computed_mib(side: str, config: HeadMemoryConfig, classes: float, gpus: int) -> float:
    """MiB on one of `gpus` that share `classes`.

    Counted: rows, moments and their scales, counters, the gradient (dense for the peers, of the active rows in ours),
    and for the peers the fp32 logits of the whole batch, once, though they hold them more often. Left out: what depends
    on the batch alone, the optimizer's intermediate results, copies of the active rows, the towers.
    """
    own = classes / gpus
    always, active = PER_VALUE[side]
    total = own * (config.embedding_dim * (always + config.sample_rate * active) + PER_ROW.get(side, 0))
    if side not in PER_ROW:
        columns = own if side == "full_softmax_adamw" else own * config.sample_rate
        total += 4 * config.batch * gpus * columns
    return total / MIB


def main() -> int:
    """Entry point of `python -m harness.bench.head_memory`."""
    return bench_main(MODULE, HeadMemoryConfig, run, "Memory of the class head by classes and GPUs.", EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
