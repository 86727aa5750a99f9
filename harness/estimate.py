"""`shelfmark estimate`: what a recipe needs at a layout, without running it: parameters, memory, FLOPs, bytes communicated, checkpoint size.

Parameters are counted on the plain twin, built without memory; everything else follows from shapes. Memory is what a step of training holds beside
the process itself (libraries, decoder) and evaluation; writing a checkpoint needs more, which is
a figure of its own. MB and GB are 10^6 and 10^9 bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from harness.arguments import check_figures, write_figures
from harness.bench.report import format_table
from harness.config import RunConfig, parse
from harness.data.order import ClassOrder
from harness.data.tokenizer import Tokenizer
from harness.errors import UserError
from harness.flops import PARTS, active_rows, step_parts
from harness.groups import below_top, freeze
from harness.methods import METHODS
from models.activation import GATED
from models.heads.class_parallel import ClassHeadConfig, rows_per_rank
from models.heads.row_optimizer import RowOptimizerConfig
from models.plain.transformer import PlainBuilder
from models.shape import TransformerShape
from models.vision import VisionConfig

EXAMPLE = (
    "shelfmark estimate --config jobs/recipes/oclear_grocery.yaml --world 8 --tensor-parallel 2 --num-classes 1000000"
)
FLAGS = {
    "world": "ranks (default: those of this process, or tensor_parallel)",
    "tensor-parallel": "as --mesh.tensor_parallel",
    "num-classes": "classes (default: the catalogue's)",
    "vocab-size": "word pieces of a text tower that gives none (default: the catalogue's)",
}
FP32 = 4
# Bytes for each trained number that the first rank of a copy needs beside all else while it writes a checkpoint: measured with megatron-core 0.16
# (weights and two moments in fp32, three times: gathered, cut by parameter, copied for the writer).
_SAVING = 36
# Names of the parameters in a transformer block, and of the word embedding, that tensor-parallel ranks share.
_SHARED = re.compile(
    r"(.*\.)?block\.layers\.\d+\.(self_attention\.linear_(qkv\.\w+|proj\.weight)|mlp\.linear_(fc1\.\w+|fc2\.weight))|.*\.?words\.weight"
)


@dataclass(frozen=True)
class Layout:
    """World size and how it is cut; what is computed again instead of kept (none, selective, full); cpu or cuda."""

    world: int
    tensor_parallel: int
    sequence_parallel: bool = False
    recompute: str = "none"
    device: str = "cpu"

    @property
    def data_parallel(self) -> int:
        """Ranks that bring different samples."""
        return self.world // self.tensor_parallel


@dataclass(frozen=True)
class Sizes:
    """What a recipe leaves to the catalogue."""

    num_classes: int
    vocab_size: int


@dataclass(frozen=True)
class Parameters:
    """Counts: of the towers as one copy and of what one rank holds of them, all and trained; of the class rows, all and on the first rank.

    reach_vision, reach_text: how many layers of a tower backward goes through, counted from the top; one more than there are where it reaches the
    embeddings, 0 where it goes through none.
    """

    towers: int
    towers_per_rank: int
    trained: int
    trained_per_rank: int
    largest_per_rank: int
    rows: int
    rows_per_rank: int
    reach_vision: int
    reach_text: int


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
    if config.method not in PARTS:
        raise UserError(f"there are no formulas for the method '{config.method}'", f"There are for {', '.join(PARTS)}")
    figures = figures_of(config, layout_of(config, world), sizes_of(config, given))
    print(table(figures))
    write_figures(json_file, figures)
    return figures


def layout_of(config: RunConfig, world: int) -> Layout:
    """The layout that a recipe asks for, over `world` ranks, on what this machine has: GPUs or a CPU."""
    mesh, device = config.mesh, "cuda" if torch.cuda.is_available() else "cpu"
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


def figures_of(config: RunConfig, layout: Layout, sizes: Sizes) -> dict[str, Any]:
    """All figures of `config` on `layout`; counts, bytes and FLOPs."""
    model = replace(
        config.model, text=replace(config.model.text, vocab_size=config.model.text.vocab_size or sizes.vocab_size)
    )
    config = replace(config, model=model)
    counted = parameters(config, layout, sizes)
    parts = step_parts(config, sizes.num_classes)
    memory = memory_per_rank(config, layout, sizes, counted)
    return {
        "world": layout.world,
        "tensor_parallel": layout.tensor_parallel,
        "device": layout.device,
        "num_classes": sizes.num_classes,
        "vocab_size": model.text.vocab_size,
        "parameters": counted.towers + counted.rows,
        "parameters_towers": counted.towers,
        "parameters_rows": counted.rows,
        "parameters_per_rank": counted.towers_per_rank + counted.rows_per_rank,
        "memory_per_rank": memory,
        "peak_memory_per_rank": sum(memory.values()),
        "saving_memory": float(_SAVING * counted.trained_per_rank),
        "flops_per_step": {name: {"forward": part.forward, "backward": part.backward} for name, part in parts.items()},
        "flops_per_step_total": sum(part.total for part in parts.values()),
        "sent_per_step_and_rank": sent(config, layout, counted),
        "checkpoint_bytes": checkpoint_bytes(config, sizes, counted),
    }


def parameters(config: RunConfig, layout: Layout, sizes: Sizes) -> Parameters:
    """Counts on the plain twin, built on the meta device."""
    with torch.device("meta"):
        towers = METHODS[config.method].towers(config.model, PlainBuilder())
    freeze(towers, config.optimizer.frozen)
    counts = []
    for name, p in towers.named_parameters():
        local = p.numel() // (layout.tensor_parallel if _SHARED.fullmatch(name) else 1)
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
        reach(towers.get_submodule("vision")),
        reach(towers.get_submodule("text")),
    )


def reach(tower: nn.Module) -> int:
    """See Parameters."""
    return max((below_top(name, tower) for name, p in tower.named_parameters() if p.requires_grad), default=0)


def memory_per_rank(config: RunConfig, layout: Layout, sizes: Sizes, counted: Parameters) -> dict[str, float]:
    """Bytes of the first rank at the peak of a step, by term."""
    size = FP32 if config.train.precision == "fp32" else 2
    per_row = row_bytes(config.head, config.optimizer.rows, config.model.embedding_dim)
    own_rows = counted.rows_per_rank // config.model.embedding_dim
    memory = {
        "weights": float(size * counted.towers_per_rank),
        "gradients": float(FP32 * counted.trained_per_rank),
        "optimizer_state": float((8 if size == FP32 else 12) * counted.trained_per_rank / layout.data_parallel),
        "average": float(FP32 * counted.trained_per_rank if config.train.ema_decay else 0),
        "class_rows": float(own_rows * per_row["rows"]),
        "row_state": float(own_rows * per_row["state"]),
    }
    activations, moments = _transient(config, layout, sizes, counted, size)
    peak = max(moments.values())
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


def checkpoint_bytes(config: RunConfig, sizes: Sizes, counted: Parameters) -> float:
    """Bytes of a checkpoint folder, without what does not grow with the model: the class map and the text files."""
    weights = FP32 if config.train.precision == "fp32" else 2
    per_row = row_bytes(config.head, config.optimizer.rows, config.model.embedding_dim)
    # AdamW's state holds the fp32 weights too, so that a run goes on exactly in either precision.
    average = FP32 if config.train.ema_decay else 0
    towers = weights * counted.towers + (3 * FP32 + average) * counted.trained
    return float(towers + sizes.num_classes * sum(per_row.values()))


def sent(config: RunConfig, layout: Layout, counted: Parameters) -> dict[str, float]:
    """Bytes that a rank sends in a step in a ring's algorithm: (n - 1) / n of the tensor, twice for an all-reduce."""
    size = FP32 if config.train.precision == "fp32" else 2
    dp, tp = layout.data_parallel, layout.tensor_parallel
    queries, documents = _samples(config)
    local = (queries + documents) / dp
    model = config.model
    # Two all-reduces of the tokens forward and two backward in each layer, one of the words.
    towers = ((model.vision, local * _tokens(model.vision), 0), (model.text, documents / dp * model.text.max_length, 1))
    # Sequence-parallel, each is a gather and a scatter, and backward gathers the inputs of two linear layers once more.
    passes = 10 if layout.sequence_parallel else 8
    hidden = sum(
        tokens * shape.hidden_size * (passes * shape.num_layers + 2 * words) for shape, tokens, words in towers
    )
    vectors = (queries + documents) * model.embedding_dim * FP32
    classifies = METHODS[config.method].classifies(model)
    return {
        "gradients": _ring(dp) * FP32 * counted.trained_per_rank,
        "weights": _ring(dp) * size * counted.trained_per_rank,
        "tensor_parallel": _ring(tp) * size * hidden,
        # embeddings to all ranks, their gradient back; of a class head also the sums over its shards
        "head": vectors * (_ring(dp) + 2 * _ring(layout.world if classifies else dp)),
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
    return f"{head}\n{format_table(rows)}"


def _transient(
    config: RunConfig, layout: Layout, sizes: Sizes, counted: Parameters, size: int
) -> tuple[float, dict[str, float]]:
    """Bytes that backward finds of one micro-batch, and all transient bytes at each moment of a step, these included.

    The towers' backward runs from the last to the first, and each lets go of what it kept: at a tower's turn there are its own activations, those of
    the towers before it, and its working memory.
    """
    model, cuda = config.model, layout.device == "cuda"
    queries, documents = _samples(config)
    pieces = layout.data_parallel * config.data.micro_batches
    images, texts = (-(-n // pieces) for n in (queries + documents, documents))
    vision, text = model.vision, model.text
    seen, words = _tokens(vision), text.max_length
    stem = stem_elements(vision) if counted.reach_vision > vision.num_layers else 0.0
    towers = (
        (
            size * images * (stem + block_elements(vision, seen, layout, size, counted.reach_vision)),
            _working(vision, seen, layout, size) * images * seen * size * min(1, counted.reach_vision),
        ),
        (
            size * texts * block_elements(text, words, layout, size, counted.reach_text),
            _working(text, words, layout, size) * texts * words * size * min(1, counted.reach_text),
        ),
        (size * (texts * fusion_elements(model) + images * vision.num_patches * vision.hidden_size), 0.0),
    )
    d = model.embedding_dim
    own = counted.rows_per_rank // d
    active = (
        active_rows(sizes.num_classes, config.head.sample_rate, queries + documents) * own / max(1, sizes.num_classes)
    )
    row_grad = FP32 * d * active
    tile = FP32 * min(active, config.head.tile) * (3 * d + (queries + documents) / config.data.micro_batches)
    kept, moments = 0.0, {}
    for name, (activations, working) in zip(("vision", "text", "fusion"), towers, strict=True):
        kept += activations
        moments[f"{name} backward"] = kept + working + row_grad
    moments["head"] = kept + row_grad + tile
    # gloo reduces a copy of the whole buffer
    moments["reduction"] = row_grad + (0.0 if cuda else FP32 * counted.trained_per_rank)
    # AdamW's denominators, of all parameters at once on a GPU
    at_once = counted.trained_per_rank if cuda else 2 * counted.largest_per_rank
    moments["update"] = row_grad + FP32 * at_once / layout.data_parallel
    return kept, moments


def _working(shape: TransformerShape, tokens: int, layout: Layout, size: int) -> float:
    """Numbers for a token that the backward of a layer holds: gradients of the MLP's inside and of the stream, and what it computes again."""
    once = 2 * shape.fc1_size / layout.tensor_parallel + 2 * shape.hidden_size
    again = {
        "none": 0.0,
        "selective": _maps(shape, tokens, layout),
        "full": _layer_elements(shape, tokens, layout, size),
    }
    return once + again[layout.recompute]


def block_elements(shape: TransformerShape, tokens: int, layout: Layout, size: int, reach: int) -> float:
    """Numbers of `size` bytes that a tower keeps of one sequence for its backward (reach: see Parameters), on one rank, up to the final norm."""
    layer = _layer_elements(shape, tokens, layout, size)
    if layout.recompute == "selective":
        layer -= _maps(shape, tokens, layout)
    h, ranges = shape.hidden_size, layout.tensor_parallel if layout.sequence_parallel else 1
    if layout.recompute == "full":
        layer = h / ranges
    kept = min(reach, shape.num_layers) * layer + h * (1 if shape.post_norm else 2) / ranges
    if (
        ranges > 1
    ):  # all of the input instead of a range of it, all of the output, and megatron-core's buffer of gathered tokens
        kept += h * (3 - 1 / ranges)
    if reach > shape.num_layers:
        kept += getattr(shape, "embedding_norm", False) * h + _mask(shape, layout, size)
    return tokens * kept


def _layer_elements(shape: TransformerShape, tokens: int, layout: Layout, size: int) -> float:
    """Numbers that one layer keeps of one of so many tokens.

    Inputs and outputs of two norms; queries, keys and values; the attention's result; the input of the activation and what it keeps.
    """
    h, tp = shape.hidden_size, layout.tensor_parallel
    mlp = (3 if shape.activation in ("quick_gelu", *GATED) else 2) * shape.mlp_size
    mlp += shape.mlp_size if shape.activation in GATED else 0
    stream = 4 * h + (2 * h if shape.layer_scale else 0) + 2 * _mask(shape, layout, size)
    inside = (
        4 * h + (2 * h if shape.qk_norm else 0) + (2 * h if getattr(shape, "positions", "") == "rotary" else 0) + mlp
    )
    return stream / (tp if layout.sequence_parallel else 1) + inside / tp + _maps(shape, tokens, layout)


def _maps(shape: TransformerShape, tokens: int, layout: Layout) -> float:
    """Numbers that attention keeps of one token as a map: none, but on a CPU, whose fast attention has no dropout, with one of those.

    Weights, mask and weights after dropout, and scaled copies of query and key.
    """
    if layout.device == "cuda" or not shape.attention_dropout:
        return 0.0
    return (3 * shape.num_attention_heads * tokens + 2 * shape.hidden_size) / layout.tensor_parallel


def _mask(shape: TransformerShape, layout: Layout, size: int) -> float:
    """Numbers of `size` bytes that one dropout keeps of one token: a factor each on a CPU, a byte each on a GPU."""
    if not shape.dropout:
        return 0.0
    return shape.hidden_size * (1 / size if layout.device == "cuda" else 1)


def stem_elements(config: VisionConfig) -> float:
    """Numbers that the stem keeps of one image for its backward, beside the image: of each convolution the norm's input and the activation."""
    total, side, before = 0.0, config.image_size, 3
    for stage, (width, blocks) in enumerate(zip(config.stem_channels, config.stem_blocks, strict=True)):
        total += 2 * before * side**2 if stage else 0
        side //= 2
        total += 4 * blocks * width * side**2
        before = width
    return total + (2 * before * side**2 if config.stem_channels else 0)


def fusion_elements(model: Any) -> float:
    """Numbers that OCLEAR's fusion keeps of one document: of its two contexts norms, keys, values and
    attention maps."""
    patches, h = model.vision.num_patches, model.vision.hidden_size
    maps = 2 * model.fusion_heads * model.concept_slots * (patches + model.text.max_length)
    return model.text.max_length * (2 * model.text.hidden_size + 2 * h) + patches * 3 * h + maps


def _images(config: RunConfig, layout: Layout, size: int) -> dict[str, float]:
    """The images of a step, and those read ahead, on the device that decodes."""
    count = sum(_samples(config)) / layout.data_parallel
    step = count * 3 * config.model.vision.image_size**2
    ahead = min(config.data.read_ahead * FP32 * step, max(config.data.read_ahead_bytes, FP32 * step))
    return {"images": size * step, "read_ahead": ahead}


def _samples(config: RunConfig) -> tuple[int, int]:
    """Queries and documents of one step over all ranks."""
    return METHODS[config.method].reads(config.model).samples(config.data)


def _tokens(config: VisionConfig) -> int:
    return config.num_prefix + config.num_patches


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _asked(flag: str, ask: Callable[[], int]) -> int:
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
