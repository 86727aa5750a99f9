"""Memory of the class-parallel head on a GPU by classes and GPUs: computed term by term, and measured at one point."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import Any

from harness.bench.head import MB, Setting, measure_memory
from harness.bench.ranks import MIB, on_ranks
from harness.bench.report import bench_main, finish
from harness.core.errors import UserError
from models.ranges import PositiveInt, UnitIntervalAbove0

MODULE = "harness.bench.head_memory"
EXAMPLE = f"python -m {MODULE} --num-classes 1000000 --ranks 8 --json head_memory.json"
MILLIONS, GPUS = (1, 10, 29, 67, 100), (1, 8, 16, 64)

# Bytes per row and column: (kept for every row, more for an active one). Moments: AdamW keeps two, momentum one.
PER_VALUE = {
    "ours_fp32": (4 + 8, 4),
    "ours_bf16_8bit": (2 + 2, 4),  # bf16 rows without a master copy, two moments of a byte each
    "partial_fc_momentum": (4 + 4 + 4, 0),  # rows, dense gradient, momentum
    "partial_fc_adamw": (4 + 4 + 8, 0),
    "full_softmax_adamw": (4 + 4 + 8, 0),
}
# Bytes per row: an int32 counts its updates, a float64 holds the weight decay paid; 8-bit moments have two fp32 scales.
PER_ROW = {"ours_fp32": 12, "ours_bf16_8bit": 12 + 8}


@dataclass(frozen=True, kw_only=True)
class HeadMemoryConfig:
    """Computes a head's memory on a GPU, and measures ours with bf16 rows and 8-bit moments in ranks of this machine.

    Args:
        num_classes: classes of the measured point; half as many are measured too.
        embedding_dim: width of the embeddings, of the table too.
        ranks: processes that share the classes of the measured point; under torchrun its world size.
        batch: samples on one GPU, of the table too.
        sample_rate: share of the classes that serve as negatives in a step, of the table too.
    """

    num_classes: PositiveInt = 1_000_000
    embedding_dim: PositiveInt = 512
    ranks: PositiveInt = 8
    batch: PositiveInt = 64
    sample_rate: UnitIntervalAbove0 = 0.1

    def __post_init__(self) -> None:
        if self.num_classes < 2 * self.ranks:
            raise UserError(
                f"{self.num_classes} classes are too few for {self.ranks} ranks", "Take --num-classes larger"
            )


def run(config: HeadMemoryConfig) -> dict[str, Any]:
    """Measures, computes, prints and returns the report (see `harness/bench/report.py`).

    Headline, for a rank with its rows, divided by a million classes: `measured_…`, the peak while it makes the
    optimizer and runs three steps; `added_…`, the growth of that peak by the second half of the classes, free of
    constant working memory; `computed_…`, the formula.
    """
    halves = []
    for classes in (config.num_classes // 2, config.num_classes):
        point = Setting(classes, config.embedding_dim, config.ranks * config.batch, config.sample_rate)
        found = on_ranks(config.ranks, measure_memory, "ours_bf16_8bit", point)
        halves.append((classes / 1e6, (found["peak_mb"] + found["left_out_mb"]) * MB / MIB))
    (half, less), (millions, measured) = halves
    computed = computed_mib("ours_bf16_8bit", config, config.num_classes, config.ranks)
    rows: list[dict[str, Any]] = []
    for count, gpus in itertools.product(MILLIONS, GPUS):
        sides = {f"{side}_mib": computed_mib(side, config, count * 1e6, gpus) for side in PER_VALUE}
        rows.append({"kind": "computed", "million_classes": count, "gpus": gpus} | sides)
    rows += [
        {"kind": "measured", "million_classes": count, "gpus": config.ranks, "ours_bf16_8bit_mib": mib}
        for count, mib in halves
    ]
    headline = {
        "measured_mib_per_million_classes": measured / millions,
        "added_mib_per_million_classes": (measured - less) / (millions - half),
        "computed_mib_per_million_classes": computed / millions,
    }
    return finish(MODULE, config, headline, rows)


def computed_mib(side: str, config: HeadMemoryConfig, classes: float, gpus: int) -> float:
    """Computes the MiB of one of `gpus` that share `classes`.

    Counted: rows, moments and their scales, counters, the gradient (dense for the peers, of the active rows for ours),
    and for the peers the fp32 logits of the whole batch, once, although they hold several copies. Left out: memory that
    depends on the batch only, the optimizer's intermediate results, copies of the active rows, the towers.
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
