"""`shelfmark estimate`: Say what a recipe needs: parameters, memory, FLOPs, bytes; without running it.

Parameters, activations and traffic are those of a dry run (harness/train/dry_run.py), which also refuses a layout that
does not fit. Whatever has one number for each parameter or class row follows from their counts. Memory is that of a
training step beside the process itself (libraries, decoder) and evaluation; writing a checkpoint needs more, a figure
of its own. Texts are taken to be as long as their towers allow (for FLOPs see --text-length). MB and GB are 10^6 and
10^9 bytes. Of a recipe with stages the figures are those of the stage that needs most of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from harness.core.cli import check_figures, write_figures
from harness.core.errors import UserError
from harness.core.tables import format_table
from harness.data.order import ClassOrder
from harness.text.catalogue_facts import prepared
from harness.text.tokenizer import Tokenizer
from harness.train.config import RunConfig, build, check, parsed
from harness.train.dry_run import DryRun, dry_run, samples
from harness.train.flops import Work, active_rows, step_parts, with_length
from harness.train.param_groups import freeze
from harness.train.stages import Stage, stages_of
from models.heads.class_parallel import ClassHeadConfig, rows_per_rank
from models.heads.row_optimizer import RowOptimizerConfig
from models.plain.transformer import PlainBuilder
from models.ranges import NonNegativeInt
from models.registry import METHODS

T = TypeVar("T")
EXAMPLE = (
    "shelfmark estimate --config jobs/recipes/oclear_small.yaml --world 8 --tensor-parallel 2 --num-classes 1000000"
)
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """Says what a recipe needs, without running it.

    Args:
        world: ranks; 0: those of this process, or tensor_parallel.
        tensor_parallel: as mesh.tensor_parallel; 0: that.
        num_classes: classes; 0: the recipe's, else the catalogue's.
        vocab_size: word pieces of a text tower that gives none; 0: the catalogue's.
        text_length: tokens of a document's text that FLOPs count; 0: model.text.max_length, the most.
    """

    world: NonNegativeInt = 0
    tensor_parallel: NonNegativeInt = 0
    num_classes: NonNegativeInt = 0
    vocab_size: NonNegativeInt = 0
    text_length: NonNegativeInt = 0


def main(argv: list[str]) -> dict[str, Any]:
    """Parses a recipe with the options of EstimateConfig and overrides, prints the table, writes --json, and returns
    the figures.

    Raises:
        UserError: as `harness.train.config.parse`, a layout that does not fit, or a number that only the missing
            catalogue knows.
    """
    values = parsed(argv, EstimateConfig, "shelfmark estimate", EXAMPLE)
    asked = EstimateConfig(**{name: getattr(values, name) for name in vars(EstimateConfig())})
    config, tp = build(values), asked.tensor_parallel
    config = replace(config, mesh=replace(config.mesh, tensor_parallel=tp or config.mesh.tensor_parallel))
    world = asked.world or int(os.environ.get("WORLD_SIZE", "0")) or tp or 1
    check(config, world)
    check_figures(values.json)
    figures = figures_of(*with_sizes(config, asked), world, asked.text_length)
    print(table(figures))
    write_figures(values.json, figures)
    return figures


def with_sizes(config: RunConfig, asked: EstimateConfig) -> tuple[RunConfig, int]:
    """The recipe with its vocabulary and keyword table, and its classes: those that are asked for, else the recipe's,
    else the catalogue's.

    Raises:
        UserError: none of them says.
    """
    data, model = config.data, config.model
    vocab = model.text.vocab_size or asked.vocab_size
    classifies = any(stage.classifies for stage in stages_of(config))
    classes = (asked.num_classes or config.head.num_classes) if classifies else -1
    if not classes:
        classes = _told("--num-classes", lambda: ClassOrder.open(data.catalogue, config.seed).num_classes)
    if not vocab:
        vocab = _told("--vocab-size", lambda: Tokenizer.load(data.catalogue).vocab_size)
    unknown = [name for name in METHODS[config.method].catalogue_sizes if not getattr(model, name)]
    if unknown:
        model = _told(f"--model.{unknown[0]}", lambda: prepared(config.method, model, data.catalogue))
    return replace(config, model=replace(model, text=replace(model.text, vocab_size=vocab))), max(0, classes)


def figures_of(config: RunConfig, num_classes: int, world: int, text_length: int = 0) -> dict[str, Any]:
    """All figures of `config` on `world` ranks: counts, bytes and FLOPs, these with texts of `text_length` tokens (0:
    of the most).

    On GPUs, whatever this machine has, unless mesh.device is cpu.
    """
    model, cuda = config.model, config.mesh.device != "cpu"
    length = min(text_length or model.text.max_length, model.text.max_length)
    stages = [_of_stage(stage, num_classes, world, length) for stage in stages_of(config)]
    largest = max(stages, key=lambda found: sum(found.memory.values()))
    slowest = max(stages, key=lambda found: found.flops)
    run, memory, parts = largest.run, largest.memory, slowest.parts
    towers, trained = parameters(config)
    own = min(num_classes, rows_per_rank(num_classes, world))
    figures: dict[str, Any] = {
        "world": world,
        "tensor_parallel": config.mesh.tensor_parallel,
        "device": "cuda" if cuda else "cpu",
        "num_classes": num_classes,
        "vocab_size": model.text.vocab_size,
        "text_length": length,
        "parameters": towers + num_classes * model.embedding_dim,
        "parameters_towers": towers,
        "parameters_rows": num_classes * model.embedding_dim,
        "parameters_per_rank": run.parameters + own * model.embedding_dim,
        "memory_per_rank": memory,
        "peak_memory_per_rank": sum(memory.values()),
        "flops_per_step": {name: asdict(part) for name, part in parts.items()},
        "flops_per_step_total": slowest.flops,
        "sent_per_step_and_rank": max((found.sent for found in stages), key=lambda sent: sum(sent.values())),
        "checkpoint_bytes": (saved := checkpoint_bytes(config, num_classes, towers, trained, run.bank)),
        "saving_memory": saved / world if config.train.checkpoint_async else 0.0,
    }
    if config.train.stages:
        figures["stages"] = [
            {
                "steps": found.stage.end - found.stage.first,
                "peak_memory_per_rank": sum(found.memory.values()),
                "flops_per_step_total": found.flops,
            }
            for found in stages
        ]
    return figures


@dataclass(frozen=True)
class _StageFigures:
    """Figures that differ between the stages of a run."""

    stage: Stage
    run: DryRun
    memory: dict[str, float]
    parts: dict[str, Work]
    sent: dict[str, float]

    @property
    def flops(self) -> float:
        """Of a step."""
        return sum(part.total for part in self.parts.values())


def _of_stage(stage: Stage, num_classes: int, world: int, length: int) -> _StageFigures:
    """Dry runs of a stage with texts of `length` tokens for its FLOPs.

    Raises:
        UserError: they fail.
    """
    config, held = stage.config, () if stage.settings is None else stage.settings.frozen
    active = active_rows(num_classes, config.head.sample_rate, sum(samples(config))) if stage.classifies else 0.0
    try:
        run = dry_run(config, world, active, config.mesh.device != "cpu", held)
    except UserError:
        raise
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"a dry run of this recipe on {world} rank(s) fails: {why}", "A real one would too") from error
    own = min(num_classes, rows_per_rank(num_classes, world))
    memory = memory_per_rank(config, world, own, active * own / max(1, num_classes), run)
    parts = step_parts(with_length(config, "text", length), num_classes, held)
    return _StageFigures(stage, run, memory, parts, sent(config, world, run))


def parameters(config: RunConfig) -> tuple[int, int]:
    """Numbers of the towers as one copy: all of them, and those that are trained."""
    with torch.device("meta"):
        towers = METHODS[config.method].towers(config.model, PlainBuilder())
    freeze(towers, config.optimizer.frozen)
    counts = [(p.numel(), p.numel() * p.requires_grad) for p in towers.parameters()]
    return sum(count for count, _ in counts), sum(count for _, count in counts)


def memory_per_rank(config: RunConfig, world: int, own: int, active: float, run: DryRun) -> dict[str, float]:
    """Bytes of the first rank at the peak of a step, by term; it has `own` class rows, of which `active` take part."""
    size, ranks, cuda = number_bytes(config), world // config.mesh.tensor_parallel, config.mesh.device != "cpu"
    per_row = row_bytes(config.head, config.optimizer.rows, config.model.embedding_dim)
    # What else the peak may be, beside the rows' gradients: gloo reduces a copy of the whole buffer; AdamW's
    # denominators, on a GPU all at once.
    reduced = 0 if cuda else FP32 * run.trained
    denominators = FP32 * (run.trained if cuda else 2 * run.largest) / ranks
    peak = max(run.peak, FP32 * config.model.embedding_dim * active + max(reduced, denominators))
    # The images of a step, and those read ahead, on the device that decodes; tensor-parallel ranks share the reading.
    images = sum(samples(config)) / ranks * 3 * config.data.preprocess.image_size**2
    read = FP32 * images / config.mesh.tensor_parallel
    return {
        "weights": float(size * run.parameters),
        "gradients": float(FP32 * run.trained),
        "optimizer_state": float((8 if size == FP32 else 12) * run.trained / ranks),
        "average": float(FP32 * run.trained if config.train.ema_decay else 0),
        "class_rows": float(own * per_row["rows"]),
        "row_state": float(own * per_row["state"]),
        "memory_bank": float(run.bank),
        "images": size * images,
        "read_ahead": min(config.data.read_ahead * read, max(config.data.read_ahead_bytes, read)),
        "activations": float(run.kept),
        "working": float(peak - run.kept),  # of the moment of the peak, which may be one without activations
    }


def row_bytes(head: ClassHeadConfig, rows: RowOptimizerConfig, width: int) -> dict[str, int]:
    """Bytes of one class row and of what its optimizer keeps of it."""
    size = FP32 if head.row_dtype == "fp32" else 2
    moments = 2 * width + 2 * FP32 if rows.state == "8bit" else 2 * FP32 * width
    master = FP32 * width if size == 2 and rows.bf16_rows == "master" else 0
    # an int32 counts updates, a float64 the weight decay paid
    return {"rows": size * width, "state": moments + master + 12}


def checkpoint_bytes(config: RunConfig, num_classes: int, towers: int, trained: int, bank: int) -> float:
    """Bytes of a checkpoint folder, without what does not grow with the model: the class map and the text files."""
    per_row = row_bytes(config.head, config.optimizer.rows, config.model.embedding_dim)
    # AdamW's state holds the fp32 weights too, so that a run goes on exactly in either precision.
    average = FP32 if config.train.ema_decay else 0
    return float(
        number_bytes(config) * towers + (3 * FP32 + average) * trained + num_classes * sum(per_row.values()) + bank
    )


def sent(config: RunConfig, world: int, run: DryRun) -> dict[str, float]:
    """Bytes that a rank sends in a step in a ring's algorithm: (n - 1) / n of the tensor, twice for an all-reduce."""
    ranks = world // config.mesh.tensor_parallel
    ring = (ranks - 1) / ranks
    return {
        "gradients": ring * FP32 * run.trained,
        "weights": ring * number_bytes(config) * run.trained,
        "tensor_parallel": float(run.sent["megatron"]),
        "head": float(run.sent["models"]),
    }


def table(figures: Mapping[str, Any]) -> str:
    """The figures as a reader wants them."""

    def terms(title: str, key: str) -> dict[str, str]:
        return {f"{title}: {name.replace('_', ' ')}": _bytes(size) for name, size in figures[key].items()}

    said = {
        "parameters: towers": f"{figures['parameters_towers']:,}",
        "parameters: class rows": f"{figures['parameters_rows']:,}",
        "parameters of a rank": f"{figures['parameters_per_rank']:,}",
        **terms("memory of a rank", "memory_per_rank"),
        "memory of a rank: peak of a step": _bytes(figures["peak_memory_per_rank"]),
        "main memory of a rank for a checkpoint in the background": _bytes(figures["saving_memory"]),
    }
    for name, part in figures["flops_per_step"].items():
        said[f"FLOPs of a step: {name}"] = f"{sum(part.values()) / 1e9:,.3f} G"
    for number, stage in enumerate(figures.get("stages", []), 1):
        said[f"stage {number}: steps"] = f"{stage['steps']:,}"
        said[f"stage {number}: peak of a step, memory of a rank"] = _bytes(stage["peak_memory_per_rank"])
        said[f"stage {number}: FLOPs of a step, all ranks"] = f"{stage['flops_per_step_total'] / 1e9:,.3f} G"
    said |= {
        "FLOPs of a step, all ranks": f"{figures['flops_per_step_total'] / 1e9:,.3f} G",
        **terms("sent by a rank in a step", "sent_per_step_and_rank"),
        "checkpoint": _bytes(figures["checkpoint_bytes"]),
    }
    head = (
        f"{figures['world']} rank(s) on {figures['device']}, tensor_parallel {figures['tensor_parallel']}, "
        f"{figures['num_classes']:,} classes, {figures['vocab_size']:,} word pieces, "
        f"FLOPs with texts of {figures['text_length']} tokens"
    )
    return f"{head}\n{format_table([{'what': what, 'figure': figure} for what, figure in said.items()])}"


def number_bytes(config: RunConfig) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.train.precision == "bf16" else FP32


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _told(flag: str, ask: Callable[[], T]) -> T:
    """Facts of the catalogue; without one the error names the flag that gives them instead."""
    try:
        return ask()
    except UserError as error:
        raise UserError(str(error), f"Or give {flag}") from error
