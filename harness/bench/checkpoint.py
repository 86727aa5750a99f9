"""Saving and loading a large class head beside a bare torch.distributed.checkpoint, and training beside a save."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from harness.bench.head import MB, Ours, Setting, draw
from harness.bench.ranks import Memory, available_memory, on_ranks
from harness.bench.report import bench_main, finish, spread
from harness.core.errors import UserError
from harness.core.mesh import Mesh, MeshConfig
from harness.core.waiting import gather_objects
from harness.train import checkpoint, checkpoint_files
from harness.train.checkpoint_tensors import head_state
from models.ranges import NonNegativeInt, PositiveInt, UnitIntervalAbove0

MODULE = "harness.bench.checkpoint"
EXAMPLE = f"python -m {MODULE} --num-classes 1000000 --ranks 2 --pairs 1 --json checkpoint.json"
STATE = {"ledger": "0" * 16, "world_size": 1, "order_id": "", "config": {}}
PARTS = ("save", "resume", "dcp_save", "dcp_load")
NAMES = ("ours", "bare", "later")  # folders


@dataclass(frozen=True, kw_only=True)
class CheckpointBenchConfig:
    """Saves and loads the same tensors in turn, by the harness (flushed, with checksums) and by
    torch.distributed.checkpoint only, in one run of ranks and in alternating order; then takes steps of the head
    without and with a save in the background.

    Args:
        num_classes: number of classes; rows and both moments are fp32.
        embedding_dim: width of the rows.
        ranks: processes that share the classes; under torchrun its world size.
        pairs: timed rounds, after one warm-up round.
        steps: between two saves in the background; 0: they are not measured.
        batch: samples of a step, of all ranks together.
        sample_rate: share of the classes that serve as negatives in a step.
        cold: load from the disk, not from the machine's cache, as after a restart on another machine.
        folder: where checkpoints are written and deleted again; the folder for temporary files by default.
    """

    num_classes: PositiveInt = 4_000_000
    embedding_dim: PositiveInt = 128
    ranks: PositiveInt = 4
    pairs: PositiveInt = 3
    steps: NonNegativeInt = 50
    batch: PositiveInt = 64
    sample_rate: UnitIntervalAbove0 = 0.1
    cold: bool = False
    folder: Path | None = None

    def __post_init__(self) -> None:
        size, free = self.num_classes * (12 * self.embedding_dim + 12), available_memory()
        if not torch.cuda.is_available() and 2 * size > free:
            raise UserError(
                f"{self.num_classes} classes are {size / 1e9:.1f} GB of tensors, and as much again while they are "
                f"copied; {free / 1e9:.1f} GB of memory are free",
                "Take a smaller --num-classes",
            )


def run(config: CheckpointBenchConfig) -> dict[str, Any]:
    """Measures, prints and returns the report (see `harness/bench/report.py`).

    Rows: of each round the seconds of each part, by the clock and of all CPUs; of each rank its share of the tensors
    and, of each part, the most memory that it held beyond what it held before.

    Headline:
        save_vs_dcp, resume_vs_dcp: seconds of ours divided by theirs, median with least and largest; `_cpu_`: of all
            CPUs, which other work on the machine hardly changes.
        background_cost: seconds of the steps with a save in the background divided by those without, less 1.
        PART_beyond_mb: of the rank that needs most; `background`: of the steps with a save beyond those without.
        background_budget_mb: what a run prints for it.
        share_mb, gb: tensors of the largest share, and of all ranks.
    """
    with tempfile.TemporaryDirectory(prefix="shelfmark-bench-", dir=config.folder) as folder:
        rounds, ranks = on_ranks(config.ranks, _measure, config, Path(folder))
    headline: dict[str, float] = {}

    def compare(name: str, ours: str, theirs: str, less: float = 0.0) -> None:
        headline.update(spread(name, [row[ours] / row[theirs] - less for row in rounds]))

    compare("save_vs_dcp", "save_s", "dcp_save_s")
    compare("resume_vs_dcp", "resume_s", "dcp_load_s")
    compare("save_cpu_vs_dcp", "save_cpu_s", "dcp_save_cpu_s")
    compare("resume_cpu_vs_dcp", "resume_cpu_s", "dcp_load_cpu_s")
    for part in PARTS:
        headline[f"{part}_beyond_mb"] = max(row[f"{part}_mb"] for row in ranks)
    if config.steps:
        compare("background_cost", "saving_steps_s", "steps_s", 1.0)
        compare("background_cpu_cost", "saving_steps_cpu_s", "steps_cpu_s", 1.0)
        headline["background_beyond_mb"] = max(row["saving_steps_mb"] - row["steps_mb"] for row in ranks)
        headline["background_budget_mb"] = max(row["budget_mb"] for row in ranks)
    gigabytes = sum(row["share_mb"] for row in ranks) / 1e3
    for part in ("save", "resume"):
        headline[f"{part}_gb_per_s"] = gigabytes / statistics.median(row[f"{part}_s"] for row in rounds)
    headline |= {"share_mb": max(row["share_mb"] for row in ranks), "gb": gigabytes}
    return finish(MODULE, config, headline, [*rounds, *ranks])


def _measure(
    device: torch.device, config: CheckpointBenchConfig, folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """On every rank: a row for each timed round, and one for each rank."""
    mesh, memory = Mesh(MeshConfig(device="cuda" if device.type == "cuda" else "cpu")), Memory(device)
    setting = Setting(config.num_classes, config.embedding_dim, config.batch, config.sample_rate)
    side = Ours(setting, device)
    side.begin()
    head, rows = side.head, side.optimizer
    for tensor in rows.row_state().values():
        tensor.fill_(1)  # untouched zeros take no memory
    parts = checkpoint.Trainable(nn.Linear(1, 1, device=device), head, None, rows)
    norm, share = head.rows.norm(), sum(x.nbytes for x in (head.rows, *rows.row_state().values()))
    classes, keep = folder / "classes.parquet", checkpoint_files.Keep(1)
    if mesh.rank == 0:
        pq.write_table(pa.table({"class_id": pa.array([0]), "class_key": ["0"]}), classes)
    mesh.barrier()
    gc.freeze()  # what the libraries made needs no look before each measurement
    rounds: list[dict[str, Any]] = []
    peaks: dict[str, float] = {}
    numbers, budget = itertools.count(), 0

    def timed(part: str, work: Callable[[], Any]) -> None:
        if config.cold and mesh.rank == 0:
            _forget(folder)
        held = memory.start()
        mesh.barrier()
        started, used = time.perf_counter(), time.process_time()
        work()
        mesh.synchronize()
        used = time.process_time() - used
        mesh.barrier()
        rounds[-1][f"{part}_s"] = time.perf_counter() - started
        rounds[-1][f"{part}_cpu_s"] = sum(gather_objects(used))
        peaks[f"{part}_mb"] = max(peaks.get(f"{part}_mb", 0.0), (memory.peak() - held) / MB)

    def save(name: str, background: bool) -> checkpoint.Save:
        return checkpoint.Save(folder / name, 1, parts, STATE, classes, mesh, keep, background)

    def load(part: str, work: Callable[[], Any]) -> None:
        head.rows.zero_()
        timed(part, work)
        if not torch.isclose(head.rows.norm(), norm):
            raise RuntimeError(f"{part} gave other rows than were saved")

    def resume() -> None:
        path, _ = checkpoint_files.newest(folder / NAMES[0], mesh, head=False)
        assert path is not None, "what was saved is whole"
        checkpoint.load(path, parts, mesh)

    def ours() -> None:
        timed("save", lambda: save(NAMES[0], False).finish())
        load("resume", resume)

    def bare() -> None:
        timed("dcp_save", lambda: dcp.save(head_state(head, rows, mesh), checkpoint_id=folder / NAMES[1]))
        load("dcp_load", lambda: dcp.load(head_state(head, rows, mesh), checkpoint_id=folder / NAMES[1]))

    def steps(background: bool) -> None:
        nonlocal budget
        pending = save(NAMES[2], True) if background else None
        for number in itertools.islice(numbers, config.steps):
            for _ in side.step(*draw(setting, number, device), number):
                pass
        if pending is not None:
            budget = pending.bytes
            pending.finish()

    for number in range(config.pairs + 1):
        if number == 1:  # after the warm-up
            rounds.clear()
            peaks.clear()
        rounds.append({"round": number})
        norm = head.rows.norm()
        for part in (ours, bare) if number % 2 else (bare, ours):
            part()
            _clear(folder, mesh)
        if config.steps:
            timed("steps", lambda: steps(False))
            timed("saving_steps", lambda: steps(True))
            _clear(folder, mesh)
    own = {"rank": mesh.rank, "share_mb": share / MB, **peaks}
    return rounds, gather_objects(own | {"budget_mb": budget / MB} if config.steps else own)


def _forget(folder: Path) -> None:
    """Takes all files under `folder`, which are on the disk, out of the machine's cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _clear(folder: Path, mesh: Mesh) -> None:
    """Deletes the checkpoints, so that no round writes over an earlier one."""
    if mesh.rank == 0:
        for name in NAMES:
            shutil.rmtree(folder / name, ignore_errors=True)
    mesh.barrier()


def main() -> int:
    """Entry point of `python -m harness.bench.checkpoint`."""
    return bench_main(
        MODULE, CheckpointBenchConfig, run, "Saving and loading a head beside torch.distributed.checkpoint.", EXAMPLE
    )


if __name__ == "__main__":
    sys.exit(main())
