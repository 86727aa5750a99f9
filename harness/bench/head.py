"""Time, memory and traffic of a step of the class-parallel head, beside full softmax and Partial FC."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from tqdm import tqdm

from harness.bench.baselines import PartialFC
from harness.bench.ranks import Memory, Traffic, available_memory, on_ranks
from harness.bench.report import bench_main, finish, spread
from harness.core.errors import UserError
from models.heads.class_parallel import ClassHeadConfig, ClassParallelHead
from models.heads.row_optimizer import RowAdamW, RowOptimizerConfig
from models.ranges import OpenUnitInterval, PositiveInt

MODULE = "harness.bench.head"
EXAMPLE = f"python -m {MODULE} --num-classes 1000000 --embedding-dim 256 --ranks 2 --pairs 5 --json head.json"
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2  # torch's defaults of AdamW; its betas and eps are ours too
PHASES = ("forward", "backward", "update")
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Times two sides at a time in the same ranks, in alternating order; measures each side's memory in its own ranks.

    There are two settings: --batch at --sample-rate, and a quarter of the batch at a fifth of the rate. Both sides of a
    round get the same embeddings and labels. All sides use AdamW with torch's defaults and CosFace (margin 0.4, scale
    64), on fp32 rows.

    Args:
        num_classes: number of classes; the loss's memory is also measured at a quarter of it, our step also at four
            times as many.
        embedding_dim: width of the embeddings.
        ranks: processes that share the classes; under torchrun its world size.
        batch: samples of all ranks together.
        sample_rate: share of the classes that serve as negatives in a step.
        pairs: timed rounds, after one warm-up round.
        partial_fc: InsightFace's partial_fc_v2.py, to measure it too; it is imported and run, so give only a file that
            you trust.
    """

    num_classes: PositiveInt = 100_000
    embedding_dim: PositiveInt = 256
    ranks: PositiveInt = 2
    batch: PositiveInt = 256
    sample_rate: OpenUnitInterval = 0.1
    pairs: PositiveInt = 5
    partial_fc: str = ""

    def __post_init__(self) -> None:
        if self.num_classes % self.ranks:
            raise UserError(f"--num-classes {self.num_classes} does not divide by --ranks {self.ranks}")
        if self.batch % (4 * self.ranks):
            raise UserError(f"--batch {self.batch} is not a multiple of four times --ranks {self.ranks}")
        if self.partial_fc:
            _insightface_class(self.partial_fc)


@dataclass(frozen=True)
class Setting:
    """Sizes of one side's work; `batch` counts all ranks' samples."""

    num_classes: int
    embedding_dim: int
    batch: int
    sample_rate: float
    partial_fc: str = ""


class Side(Protocol):
    """A head with its optimizer. The constructor makes the rows, `begin` the optimizer."""

    rows: Tensor
    active_rows: int

    def begin(self) -> None:
        """Makes the optimizer."""

    def step(self, embeddings: Tensor, labels: Tensor, number: int) -> Iterator[None]:
        """Runs one step; yields at the end of each of PHASES."""


class Ours:
    """The class-parallel head and its row optimizer.

    Args:
        setting: sizes.
        device: device of the rows.
        head: further fields of ClassHeadConfig.
        optimizer: further fields of RowOptimizerConfig.
    """

    def __init__(
        self,
        setting: Setting,
        device: torch.device,
        head: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
    ) -> None:
        config = ClassHeadConfig(
            num_classes=setting.num_classes,
            embedding_dim=setting.embedding_dim,
            sample_rate=setting.sample_rate,
            **(head or {}),
        )
        self.head = ClassParallelHead(config, _world(), _world(), device)
        self.rows, self.active_rows = self.head.rows, 0
        self.optimizer_config = RowOptimizerConfig(weight_decay=WEIGHT_DECAY, **(optimizer or {}))

    def begin(self) -> None:
        """Makes the optimizer."""
        self.optimizer = RowAdamW.for_head(self.head, self.optimizer_config)

    def step(self, embeddings: Tensor, labels: Tensor, number: int) -> Iterator[None]:
        """Runs one step; yields at the end of each of PHASES."""
        active = self.head.begin_step(labels, step=number)
        self.active_rows = len(active)
        self.optimizer.catch_up(active)
        loss, _ = self.head(embeddings, labels)
        yield
        loss.backward()
        yield
        self.optimizer.step(*self.head.row_grad, LEARNING_RATE)
        self.head.end_step()
        yield


class Dense:
    """A head whose rows are a parameter, with torch's AdamW.

    Args:
        setting: sizes.
        device: device of the rows.
        full: full softmax, ignoring the setting's sample_rate.
        adamw: torch.optim.AdamW's foreach and fused.
    """

    def __init__(self, setting: Setting, device: torch.device, full: bool = False, **adamw: Any) -> None:
        head, sample_rate = ClassHeadConfig(), 1.0 if full else setting.sample_rate
        start = dist.get_rank() * setting.num_classes // dist.get_world_size()
        stop = (dist.get_rank() + 1) * setting.num_classes // dist.get_world_size()
        rows = torch.empty(stop - start, setting.embedding_dim, device=device).normal_(std=head.init_std)
        self.head: torch.nn.Module = PartialFC(rows, start, head.margin, float(head.scale), sample_rate, _world())
        self.rows, self.adamw = rows, adamw
        self.active_rows = int(sample_rate * len(rows))

    def begin(self) -> None:
        """Makes the optimizer."""
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **self.adamw
        )

    def step(self, embeddings: Tensor, labels: Tensor, number: int) -> Iterator[None]:
        """Runs one step; yields at the end of each of PHASES."""
        loss = self.head(embeddings, labels)
        yield
        loss.backward()
        yield
        self.optimizer.step()
        self.optimizer.zero_grad()
        yield


class InsightFace(Dense):
    """Version 2 of InsightFace's Partial FC, from the user's file."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        head = ClassHeadConfig()
        self.on_cpu, self.adamw = device.type == "cpu", {"foreach": False, "fused": False}

        def cosface(logits: Tensor, labels: Tensor) -> Tensor:
            row = torch.nonzero(labels[:, 0] != -1)[:, 0]
            logits[row, labels[row, 0]] -= head.margin[2]
            return logits.mul_(float(head.scale))

        module = _insightface_class(setting.partial_fc)(
            cosface, setting.embedding_dim, setting.num_classes, setting.sample_rate, False
        )
        self.head, self.active_rows = module.to(device), module.num_sample
        self.rows = module.weight.detach()

    def step(self, embeddings: Tensor, labels: Tensor, number: int) -> Iterator[None]:
        """One step; yields at the end of each of PHASES. Its labels are changed in place, so it gets a copy."""
        with _cuda_stays_here() if self.on_cpu else nullcontext():
            yield from super().step(embeddings, labels.clone(), number)


SIDES: dict[str, Callable[[Setting, torch.device], Side]] = {
    "ours": Ours,
    "ours_8bit": partial(Ours, optimizer={"state": "8bit"}),
    "ours_bf16": partial(Ours, head={"row_dtype": "bf16"}),
    "ours_bf16_8bit": partial(Ours, head={"row_dtype": "bf16"}, optimizer={"state": "8bit", "bf16_rows": "stochastic"}),
    "partial_fc": partial(Dense, foreach=False, fused=False),
    "partial_fc_foreach": partial(Dense, foreach=True, fused=False),
    "partial_fc_fused": partial(Dense, foreach=False, fused=True),
    "full_softmax": partial(Dense, full=True, foreach=False, fused=False),
    "insightface": InsightFace,
}


def run(config: HeadConfig) -> dict[str, Any]:
    """Measures, prints and returns the report (see `harness/bench/report.py`).

    Rows name the measure (time, memory or loss memory), the side and the setting. Times are medians over the rounds of
    the slowest rank's; memory is the peak beyond the rows, of the rank that needs most (1 MB = 10^6 bytes); sent_mb is
    defined in harness/bench/ranks.py.

    Headline:
        time_vs_X: median over the rounds of our step's time divided by that of X, with least and largest; `_small`: the
            same at a quarter of the batch and a fifth of the rate.
        time_4m_over_1m: our step's time at four times the classes and a quarter of the rate, divided by that at the
            given classes and rate.
        memory_vs_X: our peak beyond the rows divided by that of X.
        loss_memory_growth: peak of forward and backward at rate 1.0 beyond rows and row gradient, divided by that at a
            quarter of the classes.
    """
    # four copies of 5 x the classes for their growth, or full softmax with its logits beside ours, in fp32
    need = 4 * config.num_classes * max(17 * config.embedding_dim, 9 * config.embedding_dim + 3 * config.batch)
    free = available_memory()
    if not torch.cuda.is_available() and need > free:
        raise UserError(
            f"{config.num_classes} classes need about {need / 2**30:.0f} GiB, {free / 2**30:.0f} are free",
            "Take a smaller --num-classes",
        )
    main = Setting(config.num_classes, config.embedding_dim, config.batch, config.sample_rate, config.partial_fc)
    small = replace(main, batch=config.batch // 4, sample_rate=config.sample_rate / 5)
    larger = replace(main, num_classes=4 * config.num_classes, sample_rate=config.sample_rate / 4)
    others = ["partial_fc_foreach", "partial_fc_fused", "full_softmax"] + ["insightface"] * bool(config.partial_fc)
    times = {
        "time_vs_partial_fc": ("ours", main, "partial_fc", main),
        "time_vs_partial_fc_small": ("ours", small, "partial_fc", small),
        **{f"time_vs_{other}": ("ours", main, other, main) for other in others},
        "time_4m_over_1m": ("ours", larger, "ours", main),
    }
    rows: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    sides = ["ours", "ours_8bit", "partial_fc", *others]
    losses = [replace(main, num_classes=count, sample_rate=1.0) for count in (main.num_classes // 4, main.num_classes)]
    with tqdm(total=len(times) + len(sides) + len(losses), desc="head", unit=" measurements") as progress:
        for key, pair in times.items():
            two, ratios = on_ranks(config.ranks, measure_times, *pair, config.pairs)
            rows += two
            headline |= spread(key, ratios)
            progress.update()
        peak = {}
        for side in sides:
            rows.append(on_ranks(config.ranks, measure_memory, side, main))
            peak[side] = rows[-1]["peak_mb"]
            progress.update()
        for other in sides[2:]:
            headline[f"memory_vs_{other}"] = peak["ours"] / peak[other]
        headline["memory_vs_partial_fc_8bit"] = peak["ours_8bit"] / peak["partial_fc"]
        for setting in losses:
            rows.append(on_ranks(config.ranks, measure_loss_memory, setting))
            progress.update()
        headline["loss_memory_growth"] = rows[-1]["peak_mb"] / rows[-2]["peak_mb"]
    return finish(MODULE, config, headline, rows)


def measure_times(
    device: torch.device, first: str, first_setting: Setting, second: str, second_setting: Setting, pairs: int
) -> tuple[list[dict[str, Any]], list[float]]:
    """Times two sides that step in turn in these ranks; returns their rows and the ratio of their times in each
    round.
    """
    torch.manual_seed(dist.get_rank())
    settings = (first_setting, second_setting)
    sides = [make_side(name, setting, device) for name, setting in zip((first, second), settings, strict=True)]
    for side in sides:
        side.begin()
    seconds = torch.zeros(pairs, 2, len(PHASES), dtype=torch.float64)
    facts = torch.zeros(2, 2, dtype=torch.float64)  # active rows and bytes of each side
    for number in range(pairs + 1):
        # The first side alternates, so that a machine that slows down favours none.
        for which in (0, 1) if number % 2 else (1, 0):
            embeddings, labels = draw(settings[which], number, device)
            traffic = Traffic()
            if number == 0:
                with traffic.counted():
                    _phases(sides[which].step(embeddings, labels, number), device)
                facts[which, 1] = traffic.bytes
            else:
                seconds[number - 1, which] = _phases(sides[which].step(embeddings, labels, number), device)
            facts[which, 0] = sides[which].active_rows
    steps = seconds.sum(-1)
    dist.all_reduce(steps, dist.ReduceOp.MAX)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(facts)
    rows = []
    for which, name in enumerate((first, second)):
        row = _row("time", name, settings[which])
        row |= {"beside": (second, first)[which], "active_rows": int(facts[which, 0])}
        row["step_ms"] = 1000 * steps[:, which].median().item()
        for place, phase in enumerate(PHASES):
            row[f"{phase}_ms"] = 1000 * seconds[:, which, place].median().item()
        rows.append(row | {"sent_mb": facts[which, 1].item() / dist.get_world_size() / MB})
    return rows, (steps[:, 0] / steps[:, 1]).tolist()


def _phases(step: Iterator[None], device: torch.device) -> Tensor:
    """Seconds of each of PHASES, started when all ranks are ready."""
    stamps: list[float] = []
    dist.barrier()
    for _ in (None, *PHASES):
        if stamps:
            next(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        stamps.append(time.perf_counter())
    return torch.tensor(stamps, dtype=torch.float64).diff()


def measure_memory(device: torch.device, name: str, setting: Setting, steps: int = 3) -> dict[str, Any]:
    """Measures one side's peak memory beyond its rows, while it makes its optimizer and runs `steps` steps."""
    memory = Memory(device)
    before = _warm(memory, name, setting)
    side = make_side(name, setting, device)
    memory.start()
    side.begin()
    for number in range(steps):
        for _ in side.step(*draw(setting, number, device), number):
            pass
    return _row("memory", name, setting) | _peak(memory.peak() - before, side.rows.nbytes)


def measure_loss_memory(device: torch.device, setting: Setting) -> dict[str, Any]:
    """Measures the peak memory of our forward and backward beyond the rows and their gradient."""
    memory = Memory(device)
    before = _warm(memory, "ours", setting)
    side = Ours(setting, device)
    memory.start()
    for number in range(2):
        embeddings, labels = draw(setting, number, device)
        side.head.begin_step(labels, step=number)
        side.head(embeddings, labels)[0].backward()
        counted = side.rows.nbytes + side.head.row_grad[1].nbytes
        side.head.end_step()
    return _row("loss memory", "ours", setting) | _peak(memory.peak() - before, counted)


def _warm(memory: Memory, name: str, setting: Setting) -> int:
    """Runs a step of a small head, so that libraries load their code and buffers; returns the bytes held then."""
    setting = replace(setting, num_classes=256 * dist.get_world_size())
    side = make_side(name, setting, memory.device)
    side.begin()
    for _ in side.step(*draw(setting, 0, memory.device), 0):
        pass
    del side
    return memory.start()


def _peak(found: int, counted: int) -> dict[str, float]:
    """Largest `found - counted` and `counted` bytes of all ranks."""
    bytes_ = torch.tensor([found - counted, counted])
    dist.all_reduce(bytes_, dist.ReduceOp.MAX)
    return {"peak_mb": bytes_[0].item() / MB, "left_out_mb": bytes_[1].item() / MB}


def make_side(name: str, setting: Setting, device: torch.device) -> Side:
    """Makes the side of that name, without its optimizer."""
    return SIDES[name](setting, device)


def draw(setting: Setting, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draws this rank's embeddings and labels of round `number`, the same for every side."""
    generator = torch.Generator().manual_seed(number * 1_000_003 + dist.get_rank())
    count = setting.batch // dist.get_world_size()
    embeddings = torch.randn(count, setting.embedding_dim, generator=generator)
    labels = torch.randint(setting.num_classes, (count,), generator=generator)
    return embeddings.to(device).requires_grad_(), labels.to(device)


def _row(measure: str, side: str, setting: Setting) -> dict[str, Any]:
    rate = 1.0 if side == "full_softmax" else setting.sample_rate
    sizes = {"classes": setting.num_classes, "batch": setting.batch, "rate": rate, "ranks": dist.get_world_size()}
    return {"measure": measure, "side": side, **sizes}


def _world() -> ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _insightface_class(path: str) -> Any:
    """Imports PartialFC_V2 from the file at `path`.

    Raises:
        UserError: there is no such file, or it does not define it.
    """
    spec = importlib.util.spec_from_file_location("users_partial_fc", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise UserError(f"--partial-fc {path} is not a Python file", "Give InsightFace's partial_fc_v2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "PartialFC_V2"):
        raise UserError(f"--partial-fc {path} does not define PartialFC_V2", "Give InsightFace's partial_fc_v2.py")
    return module.PartialFC_V2


@contextmanager
def _cuda_stays_here() -> Iterator[None]:
    """Makes Tensor.cuda() return the tensor itself: the file calls it without a check for a GPU."""
    cuda = torch.Tensor.cuda
    try:
        torch.Tensor.cuda = lambda self, *_: self  # type: ignore[method-assign]
        yield
    finally:
        torch.Tensor.cuda = cuda  # type: ignore[method-assign]


def main() -> int:
    """Entry point of `python -m harness.bench.head`."""
    return bench_main(
        MODULE, HeadConfig, run, "Step time, memory and traffic of the class head beside its peers.", EXAMPLE
    )


if __name__ == "__main__":
    sys.exit(main())
