"""What a method's step passes through its transformers, and what each pass keeps for its backward; for `shelfmark estimate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from harness.config import RunConfig
from harness.flops import masked, vision_tokens
from harness.groups import below_top
from harness.methods import METHODS
from models.activation import GATED
from models.heads.contrastive import ContrastiveConfig
from models.item import ItemConfig
from models.make import MakeConfig
from models.oclear import OclearConfig
from models.shape import TransformerShape
from models.vision import VisionConfig

FP32 = 4
_ID = 8  # bytes of a label


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


class Behind(NamedTuple):
    """Bytes on one rank, of one micro-batch, of what follows a pass: kept for backward, and at work beside that."""

    kept: float
    working: float = 0.0


@dataclass(frozen=True)
class Pass:
    """One pass through a transformer.

    Args:
        tower: name of the module that has it; empty: the towers themselves.
        shape: the transformer.
        tokens: of one sequence.
        sequences: of a step, over all ranks.
        word_tokens: those of them that are looked up words.
        before: numbers that are kept of one sequence by what leads to the transformer, if that is trained.
        inputs: towers whose outputs it takes: where one of them is trained, backward goes through all of it.
        behind: what follows before the next pass.
    """

    tower: str
    shape: TransformerShape
    tokens: int
    sequences: int
    word_tokens: int = 0
    before: float = 0.0
    inputs: tuple[str, ...] = ()
    behind: tuple[Behind, ...] = ()


@dataclass(frozen=True)
class Step:
    """What a step of a method does, beside its class head.

    Args:
        passes: in forward order.
        gathered: bytes of the embeddings that all ranks gather and whose gradients come back, of all ranks together.
        labels: bytes that all ranks gather without gradients.
        bank: bytes of the memory banks.
    """

    passes: tuple[Pass, ...]
    gathered: float
    labels: float = 0.0
    bank: float = 0.0


def step_of(config: RunConfig, layout: Layout) -> Step:
    """The step of the recipe's method."""
    return _STEPS[config.method](config.model, config, layout)


def samples(config: RunConfig) -> tuple[int, int]:
    """Query photos and documents of one step over all ranks."""
    return METHODS[config.method].reads(config.model).samples(config.data)


def number_bytes(config: RunConfig) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.train.precision == "bf16" else FP32


def per_rank(count: int, config: RunConfig, layout: Layout) -> int:
    """Of `count` samples those of one micro-batch of one rank."""
    return -(-count // (layout.data_parallel * config.data.micro_batches))


def _oclear(model: OclearConfig, config: RunConfig, layout: Layout) -> Step:
    queries, documents = samples(config)
    images, texts = (per_rank(n, config, layout) for n in (queries + documents, documents))
    vision, text, size = model.vision, model.text, number_bytes(config)
    fusion = texts * fusion_elements(model) + images * vision.num_patches * vision.hidden_size
    return Step(
        (
            Pass("vision", vision, vision_tokens(vision), queries + documents, before=stem_elements(vision)),
            Pass("text", text, text.max_length, documents, text.max_length, behind=(Behind(size * fusion),)),
        ),
        gathered=(queries + documents) * model.embedding_dim * FP32,
    )


def _make(model: MakeConfig, config: RunConfig, layout: Layout) -> Step:
    """A fusion pass keeps copies of its inputs in their place; a second one, of one of them beside the first's."""
    products, size, use, d = config.data.documents_per_step, number_bytes(config), model.weights, model.embedding_dim
    own, everyone, k = per_rank(products, config, layout), products / config.data.micro_batches, model.mpm_patches
    vision, text, fusion = model.vision, model.text, model.fusion
    label = _ID * (2 + 2 * model.product_keywords)
    related = 2 * model.product_keywords + 9 if model.related_keywords else 0
    banks = (2 if model.qic.symmetric else 1) if model.memory_bank else 0
    seen = Pass("vision", vision, vision_tokens(vision), products, before=stem_elements(vision))
    titles = Pass("text", text, text.max_length, products, text.max_length)
    tokens = 1 + text.max_length + vision.num_patches
    fused = Pass("fusion", fusion, tokens, products, inputs=("text", "vision"))
    passes = [Pass("query_text", model.query, model.query.max_length, products, model.query.max_length), seen, titles]
    behind = []
    if use.qic:
        behind.append(_contrast(model.qic, own, everyone + model.memory_bank, d, related))
    if use.query_image:
        behind.append(_contrast(model.qic, own, everyone, d, related))
    vectors = 2 * products * len(behind)
    gathered = FP32 * d * vectors + (size * d * products if use.qim else 0.0)
    labels = (label + FP32) * (vectors + (products if use.qim else 0)) + banks * products * (FP32 * d + label + FP32)
    if use.keywords:
        behind.append(_words(own, 0, d, model.num_keywords, size))
    passes.append(replace(fused, behind=tuple(behind)))
    if use.mlm:
        words, _ = masked(config.data.masking, text.max_length, vision.num_patches)
        head = _words(own * words, 4 * fusion.hidden_size, fusion.hidden_size, text.vocab_size, size)
        passes += [] if model.hide_words else [titles]
        passes += [replace(fused, before=vision.num_patches * vision.hidden_size, behind=(head,))]
    if use.mpm:
        image = 3 * vision.image_size**2
        compared = _contrast(model.mpm, own * k, everyone * k, d, 0)
        compared = Behind(compared.kept, max(compared.working, 3 * FP32 * own * image))
        passes += [
            replace(seen, before=seen.before + image),
            replace(fused, before=text.max_length * text.hidden_size, behind=(compared,)),
        ]
        gathered, labels = gathered + 2 * products * k * d * FP32, labels + 2 * products * k * (_ID + FP32)
    bank = banks * (model.memory_bank * (FP32 * d + label) + _ID)
    return Step(tuple(passes), gathered, labels, bank)


def _item(model: ItemConfig, config: RunConfig, layout: Layout) -> Step:
    products, size, use, h = config.data.documents_per_step, number_bytes(config), model.weights, model.embedding_dim
    own, text, vision = per_rank(products, config, layout), model.text, model.vision
    image, pixels = 3 * vision.image_size**2, 3 * vision.patch_size**2
    stem = stem_elements(VisionConfig(**vars(vision), hidden_size=h))

    def seen(words: int, patches: int) -> Pass:
        tokens = 1 + words + patches
        return Pass("", text, tokens, products, words, before=(stem if patches else 0) + tokens * h)  # the norm's input

    one = seen(text.max_length, vision.num_patches)
    words, patches = (own * n for n in masked(config.data.masking, text.max_length, vision.num_patches))
    told, built = words, patches
    if model.global_targets == "all":
        told, built = own * text.max_length, own * vision.num_patches
    passes, heads, gathered, labels = [], [], 0.0, 0.0
    # What the heads keep of a place: WordHead and `mim` 4 h, GlobalHead 8 h, of patches also the difference from the pixels.
    if use.mlm:
        heads.append(_words(words, 4 * h, h, text.vocab_size, size))
    if use.gmlm:
        heads.append(_words(told, 8 * h, h, text.vocab_size, size))
    for weight, places, inside in ((use.mim, patches, 4 * h), (use.gmim, built, 8 * h)):
        if weight:
            heads.append(Behind(places * (inside * size + pixels * FP32), 3 * FP32 * own * image))
    if heads:
        passes.append(replace(one, before=one.before + image, behind=tuple(heads)))
    if use.itm:
        passes.append(one)
    if use.contrast:
        compared = _contrast(model.contrast, own, products / config.data.micro_batches, h, 0)
        passes += [seen(text.max_length, 0), replace(seen(0, vision.num_patches), behind=(compared,))]
        gathered, labels = 2 * products * h * FP32, 2 * products * (_ID + FP32)
    return Step(tuple(passes), gathered, labels)


_STEPS: dict[str, Callable[[Any, RunConfig, Layout], Step]] = {"oclear": _oclear, "make": _make, "item": _item}


def _contrast(config: ContrastiveConfig, own: float, candidates: float, width: int, related: int) -> Behind:
    """Contrastive loss of `own` pairs: the joined candidates, logits and what is hidden of them, in each direction; at work either what
    decides that (`related` bytes for a pair and a candidate) or the gradients."""
    directions = 2 if config.symmetric else 1
    kept = directions * (FP32 * candidates * width + (FP32 + 1) * own * candidates)
    return Behind(kept, max(related * own * candidates, 2 * FP32 * own * candidates + FP32 * candidates * width))


def _words(count: float, inside: int, width: int, vocab_size: int, size: int) -> Behind:
    """A head of so many masked words: `inside` numbers of each, and its logits; at work their gradients and that of the last layer."""
    return Behind(
        count * (inside * size + vocab_size * FP32), count * 2 * vocab_size * FP32 + width * vocab_size * size
    )


def reaches(passes: tuple[Pass, ...], towers: nn.Module) -> dict[str, int]:
    """Of each tower how many layers backward goes through, counted from the top; one more than there are where it reaches what lies
    below them, 0 where it goes through none."""
    found: dict[str, int] = {}
    for one in passes:
        below = any(found[name] for name in one.inputs)
        found[one.tower] = one.shape.num_layers + 1 if below else reach(towers.get_submodule(one.tower))
    return found


def reach(tower: nn.Module) -> int:
    """See reaches; of a tower alone."""
    return max((below_top(name, tower) for name, p in tower.named_parameters() if p.requires_grad), default=0)


def working(shape: TransformerShape, tokens: int, layout: Layout, size: int) -> float:
    """Numbers for a token that the backward of a layer holds: gradients of the MLP's inside and of the stream, and what it computes again."""
    once = 2 * shape.fc1_size / layout.tensor_parallel + 2 * shape.hidden_size
    again = {
        "none": 0.0,
        "selective": _maps(shape, tokens, layout),
        "full": _layer_elements(shape, tokens, layout, size),
    }
    return once + again[layout.recompute]


def block_elements(shape: TransformerShape, tokens: int, layout: Layout, size: int, reach: int) -> float:
    """Numbers of `size` bytes that a tower keeps of one sequence for its backward (reach: see reaches), on one rank, up to the final norm."""
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
