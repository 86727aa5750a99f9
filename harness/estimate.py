"""`shelfmark estimate`: what a recipe needs at a layout, without running it: parameters, memory, FLOPs, bytes communicated, checkpoint size.

Parameters are counted on the plain twin, built without memory; everything else follows from shapes. Memory is what a step of training holds beside
the process itself (libraries, decoder) and evaluation; writing a checkpoint needs more, which is
a figure of its own. Texts are taken to be as long as their towers allow (for FLOPs see --text-length). MB and GB are 10^6 and 10^9 bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from harness.arguments import check_figures, write_figures
from harness.bench.report import format_table
from harness.config import RunConfig, parse
from harness.data.order import ClassOrder
from harness.data.tokenizer import Tokenizer
from harness.errors import UserError
from harness.flops import active_rows, step_parts, with_length
from harness.groups import freeze
from harness.methods import METHODS, with_keywords
from harness.passes import (
    FP32,
    Layout,
    Step,
    block_elements,
    number_bytes,
    per_rank,
    reaches,
    samples,
    step_of,
    working,
)
from models.heads.class_parallel import ClassHeadConfig, rows_per_rank
from models.heads.row_optimizer import RowOptimizerConfig
from models.plain.transformer import PlainBuilder

T = TypeVar("T")
EXAMPLE = (
    "shelfmark estimate --config jobs/recipes/oclear_grocery.yaml --world 8 --tensor-parallel 2 --num-classes 1000000"
)
FLAGS = {
    "world": "ranks (default: those of this process, or tensor_parallel)",
    "tensor-parallel": "as --mesh.tensor_parallel",
    "num-classes": "classes (default: the catalogue's)",
    "vocab-size": "word pieces of a text tower that gives none (default: the catalogue's)",
    "text-length": "tokens of a document's text that FLOPs count (default: model.text.max_length, the most)",
}
# Bytes for each trained number that the first rank of a copy needs beside all else while it writes a checkpoint: measured with megatron-core 0.16
# (weights and two moments in fp32, three times: gathered, cut by parameter, copied for the writer).
_SAVING = 36
# Names of the parameters in a transformer block that tensor-parallel ranks share, as they do word embeddings.
_SHARED = re.compile(
    r"(.*\.)?block\.layers\.\d+\.(self_attention\.linear_(qkv\.\w+|proj\.weight)|mlp\.linear_(fc1\.\w+|fc2\.weight))"
)


@dataclass(frozen=True)
class Sizes:
    """What a recipe leaves to the catalogue."""

    num_classes: int
    vocab_size: int


@dataclass(frozen=True)
class Parameters:
    """Counts: of the towers as one copy and of what one rank holds of them, all and trained; of the class rows, all and on the first rank.

    reach: of each tower, see harness.passes.reaches.
    """

    towers: int
    towers_per_rank: int
    trained: int
    trained_per_rank: int
    largest_per_rank: int
    rows: int
    rows_per_rank: int
    reach: dict[str, int]


def estimate(argv: list[str]) -> dict[str, Any]:
    """Parses a recipe with FLAGS and overrides, prints the table, writes --json, and returns the figures.

    Raises:
        UserError: as `harness.config.parse`, a layout that does not divide, or a number that only the missing catalogue knows.
    """
    given, rest = _own_flags(argv)
    if "--help" in rest or "-h" in rest:
        print(f"usage: shelfmark estimate --config RECIPE [options]\n\nexample: {EXAMPLE}\n")
        print("\n".join(f"  --{name:<18}{sentence}" for name, sentence in FLAGS.items()))
        print("  and every option of `shelfmark train --help`")
        return {}
    if "tensor-parallel" in given:
        rest += ["--mesh.tensor_parallel", str(given["tensor-parallel"])]
    world = given.get("world", int(os.environ.get("WORLD_SIZE", "0")) or given.get("tensor-parallel", 1))
    config, json_file = parse(rest, world)
    check_figures(json_file)
    config = with_table(config)
    figures = figures_of(config, layout_of(config, world), sizes_of(config, given), given.get("text-length", 0))
    print(table(figures))
    write_figures(json_file, figures)
    return figures


def layout_of(config: RunConfig, world: int) -> Layout:
    """The layout that a recipe asks for, over `world` ranks: on GPUs, whatever this machine has, unless mesh.device is cpu."""
    mesh = config.mesh
    device = "cpu" if mesh.device == "cpu" else "cuda"
    return Layout(world, mesh.tensor_parallel, mesh.sequence_parallel, mesh.recompute, device)


def sizes_of(config: RunConfig, given: Mapping[str, int]) -> Sizes:
    """Classes and vocabulary: the given ones, else the recipe's, else the catalogue's.

    Raises:
        UserError: none of them says.
    """
    classifies = METHODS[config.method].classifies(config.model)
    classes = given.get("num-classes", config.head.num_classes)
    vocab = config.model.text.vocab_size or given.get("vocab-size", 0)
    if not classes and classifies:
        classes = _asked("--num-classes", lambda: ClassOrder.open(config.data.catalogue, config.seed).num_classes)
    if not vocab:
        vocab = _asked("--vocab-size", lambda: Tokenizer.load(config.data.catalogue).vocab_size)
    return Sizes(classes if classifies else 0, vocab)


def with_table(config: RunConfig) -> RunConfig:
    """With the size of the catalogue's keyword table, where the method has one and the recipe does not say how large it is.

    Raises:
        UserError: the catalogue does not say either.
    """
    if getattr(config.model, "num_keywords", None) != 0:
        return config
    model = _asked("--model.num_keywords", lambda: with_keywords(config.method, config.model, config.data.catalogue))
    return replace(config, model=model)


def figures_of(config: RunConfig, layout: Layout, sizes: Sizes, text_length: int = 0) -> dict[str, Any]:
    """All figures of `config` on `layout`; counts, bytes and FLOPs, these with texts of `text_length` tokens (0: of the most)."""
    model = replace(
        config.model, text=replace(config.model.text, vocab_size=config.model.text.vocab_size or sizes.vocab_size)
    )
    config = replace(config, model=model)
    step = step_of(config, layout)
    counted = parameters(config, layout, sizes, step)
    length = min(text_length or model.text.max_length, model.text.max_length)
    parts = step_parts(with_length(config, "text", length), sizes.num_classes)
    memory = memory_per_rank(config, layout, sizes, counted, step)
    return {
        "world": layout.world,
        "tensor_parallel": layout.tensor_parallel,
        "device": layout.device,
        "num_classes": sizes.num_classes,
        "vocab_size": model.text.vocab_size,
        "text_length": length,
        "parameters": counted.towers + counted.rows,
        "parameters_towers": counted.towers,
        "parameters_rows": counted.rows,
        "parameters_per_rank": counted.towers_per_rank + counted.rows_per_rank,
        "memory_per_rank": memory,
        "peak_memory_per_rank": sum(memory.values()),
        "saving_memory": float(_SAVING * counted.trained_per_rank),
        "flops_per_step": {name: {"forward": part.forward, "backward": part.backward} for name, part in parts.items()},
        "flops_per_step_total": sum(part.total for part in parts.values()),
        "sent_per_step_and_rank": sent(config, layout, counted, step),
        "checkpoint_bytes": checkpoint_bytes(config, sizes, counted, step),
    }


def parameters(config: RunConfig, layout: Layout, sizes: Sizes, step: Step) -> Parameters:
    """Counts on the plain twin, built on the meta device."""
    with torch.device("meta"):
        towers = METHODS[config.method].towers(config.model, PlainBuilder())
    freeze(towers, config.optimizer.frozen)
    counts = []
    words = {f"{name}.weight" for name, module in towers.named_modules() if isinstance(module, nn.Embedding)}
    for name, p in towers.named_parameters():
        local = p.numel() // (layout.tensor_parallel if name in words or _SHARED.fullmatch(name) else 1)
        counts.append((p.numel(), local, p.numel() * p.requires_grad, local * p.requires_grad))
    whole, of_rank, trained, trained_of_rank = (sum(column) for column in zip(*counts, strict=True))
    largest = max(count[3] for count in counts)
    d, classes = config.model.embedding_dim, sizes.num_classes
    own = min(classes, rows_per_rank(classes, layout.world))
    return Parameters(
        whole,
        of_rank,
        trained,
        trained_of_rank,
        largest,
        classes * d,
        own * d,
        reaches(step.passes, towers),
    )


def memory_per_rank(
    config: RunConfig, layout: Layout, sizes: Sizes, counted: Parameters, step: Step
) -> dict[str, float]:
    """Bytes of the first rank at the peak of a step, by term."""
    size = number_bytes(config)
    per_row = row_bytes(config.head, config.optimizer.rows, config.model.embedding_dim)
    own_rows = counted.rows_per_rank // config.model.embedding_dim
    memory = {
        "weights": float(size * counted.towers_per_rank),
        "gradients": float(FP32 * counted.trained_per_rank),
        "optimizer_state": float((8 if size == FP32 else 12) * counted.trained_per_rank / layout.data_parallel),
        "average": float(FP32 * counted.trained_per_rank if config.train.ema_decay else 0),
        "class_rows": float(own_rows * per_row["rows"]),
        "row_state": float(own_rows * per_row["state"]),
        "memory_bank": step.bank,
    }
    activations, peak = _transient(config, layout, sizes, counted, step)
    # Beyond the activations: what else the moment of the peak holds, which may be one without them.
    return memory | _images(config, layout, size) | {"activations": activations, "working": peak - activations}


def row_bytes(head: ClassHeadConfig, rows: RowOptimizerConfig, width: int) -> dict[str, int]:
    """Bytes of one class row and of what its optimizer keeps of it."""
    size = FP32 if head.row_dtype == "fp32" else 2
    moments = 2 * width + 2 * FP32 if rows.state == "8bit" else 2 * FP32 * width
    master = FP32 * width if size == 2 and rows.bf16_rows == "master" else 0
    return {
        "rows": size * width,
        "state": moments + master + 12,
    }  # an int32 counts updates, a float64 the weight decay paid


def checkpoint_bytes(config: RunConfig, sizes: Sizes, counted: Parameters, step: Step) -> float:
    """Bytes of a checkpoint folder, without what does not grow with the model: the class map and the text files."""
    per_row = row_bytes(config.head, config.optimizer.rows, config.model.embedding_dim)
    # AdamW's state holds the fp32 weights too, so that a run goes on exactly in either precision.
    average = FP32 if config.train.ema_decay else 0
    towers = number_bytes(config) * counted.towers + (3 * FP32 + average) * counted.trained
    return float(towers + sizes.num_classes * sum(per_row.values()) + step.bank)


def sent(config: RunConfig, layout: Layout, counted: Parameters, step: Step) -> dict[str, float]:
    """Bytes that a rank sends in a step in a ring's algorithm: (n - 1) / n of the tensor, twice for an all-reduce."""
    size, dp, tp = number_bytes(config), layout.data_parallel, layout.tensor_parallel
    # Two all-reduces of the tokens forward and two backward in each layer, one of the words.
    # Sequence-parallel, each is a gather and a scatter, and backward gathers the inputs of two linear layers once more.
    per_layer = 10 if layout.sequence_parallel else 8
    hidden = sum(
        one.sequences / dp * one.tokens * one.shape.hidden_size * per_layer * one.shape.num_layers
        + one.sequences / dp * one.word_tokens * one.shape.hidden_size * 2
        for one in step.passes
    )
    # Embeddings to all ranks, their gradient back to their own. Those of a class head travel in their own type, and tensor-parallel ranks, which
    # have the same samples but other rows, add up their parts.
    classifies = METHODS[config.method].classifies(config.model)
    forth, copies = (size / FP32, 2 * _ring(tp) / dp) if classifies else (1.0, 0.0)
    return {
        "gradients": _ring(dp) * FP32 * counted.trained_per_rank,
        "weights": _ring(dp) * size * counted.trained_per_rank,
        "tensor_parallel": _ring(tp) * size * hidden,
        "head": step.gathered * ((forth + 1) * _ring(dp) + copies) + step.labels * _ring(dp),
    }


def table(figures: Mapping[str, Any]) -> str:
    """The figures as a reader wants them."""
    rows: list[dict[str, Any]] = [
        {"what": "parameters: towers", "figure": f"{figures['parameters_towers']:,}"},
        {"what": "parameters: class rows", "figure": f"{figures['parameters_rows']:,}"},
        {"what": "parameters of a rank", "figure": f"{figures['parameters_per_rank']:,}"},
    ]
    rows += [
        {"what": f"memory of a rank: {k.replace('_', ' ')}", "figure": _bytes(v)}
        for k, v in figures["memory_per_rank"].items()
    ]
    rows.append({"what": "memory of a rank: peak of a step", "figure": _bytes(figures["peak_memory_per_rank"])})
    rows.append(
        {"what": "main memory of the first rank while it saves, beside", "figure": _bytes(figures["saving_memory"])}
    )
    rows += [
        {"what": f"FLOPs of a step: {name}", "figure": f"{(part['forward'] + part['backward']) / 1e9:,.3f} G"}
        for name, part in figures["flops_per_step"].items()
    ]
    total = f"{figures['flops_per_step_total'] / 1e9:,.3f} G"
    rows.append({"what": "FLOPs of a step, all ranks", "figure": total})
    rows += [
        {"what": f"sent by a rank in a step: {k.replace('_', ' ')}", "figure": _bytes(v)}
        for k, v in figures["sent_per_step_and_rank"].items()
    ]
    rows.append({"what": "checkpoint", "figure": _bytes(figures["checkpoint_bytes"])})
    ranks = f"{figures['world']} rank(s) on {figures['device']}, tensor_parallel {figures['tensor_parallel']}"
    head = f"{ranks}, {figures['num_classes']:,} classes, {figures['vocab_size']:,} word pieces"
    head += f", FLOPs with texts of {figures['text_length']} tokens"
    return f"{head}\n{format_table(rows)}"


def _transient(config: RunConfig, layout: Layout, sizes: Sizes, counted: Parameters, step: Step) -> tuple[float, float]:
    """Bytes that backward finds of one micro-batch, and all transient bytes at the peak of a step, these included.

    Backward runs through the passes from the last to the first, and each lets go of what it kept: at a pass's turn there are its own activations,
    those of the passes before it, and its working memory.
    """
    size, d = number_bytes(config), config.model.embedding_dim
    own, samples_of_step = counted.rows_per_rank // d, sum(samples(config))
    active = active_rows(sizes.num_classes, config.head.sample_rate, samples_of_step) * own / max(1, sizes.num_classes)
    row_grad = FP32 * d * active
    kept, moments = 0.0, []
    for one in step.passes:
        count, reach = per_rank(one.sequences, config, layout), counted.reach[one.tower]
        before = one.before if reach > one.shape.num_layers else 0.0
        kept += size * count * (before + block_elements(one.shape, one.tokens, layout, size, reach))
        moments.append(kept + working(one.shape, one.tokens, layout, size) * count * one.tokens * size * min(1, reach))
        for behind in one.behind:
            kept += behind.kept
            moments.append(kept + behind.working)
    tile = FP32 * min(active, config.head.tile) * (3 * d + samples_of_step / config.data.micro_batches)
    moments.append(kept + tile)
    # gloo reduces a copy of the whole buffer
    cuda = layout.device == "cuda"
    moments.append(0.0 if cuda else FP32 * counted.trained_per_rank)
    # AdamW's denominators, of all parameters at once on a GPU
    at_once = counted.trained_per_rank if cuda else 2 * counted.largest_per_rank
    moments.append(FP32 * at_once / layout.data_parallel)
    return kept, row_grad + max(moments)


def _images(config: RunConfig, layout: Layout, size: int) -> dict[str, float]:
    """The images of a step, and those read ahead, on the device that decodes; tensor-parallel ranks share the reading."""
    count = sum(samples(config)) / layout.data_parallel
    step = count * 3 * config.model.vision.image_size**2
    own = FP32 * step / layout.tensor_parallel
    ahead = min(config.data.read_ahead * own, max(config.data.read_ahead_bytes, own))
    return {"images": size * step, "read_ahead": ahead}


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _asked(flag: str, ask: Callable[[], T]) -> T:
    """What the catalogue says; without one the error names the flag that says it instead."""
    try:
        return ask()
    except UserError as error:
        raise UserError(str(error), f"Or give {flag}") from error


def _own_flags(argv: list[str]) -> tuple[dict[str, int], list[str]]:
    """The values of FLAGS, and the other arguments."""
    given: dict[str, int] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("_", "-")
        if not (flag.startswith("--") and name in FLAGS):
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"--{name} is '{value}'", "It must be a whole number of at least 1")
        given[name] = int(value)
    return given, rest
