"""Floating-point operations of a training step, from shapes alone; for `shelfmark estimate`, the meters and the benchmark of the towers.

Counted: matrix products and convolutions, a multiplication and an addition being two operations, as torch.utils.flop_counter counts them.
Model FLOPs: what the mathematics needs. What is computed again to save memory (attention, recomputation, tiles of the head) does not count, so a
utilisation made of them compares between systems. Nor does padding: what texts cost follows from their own lengths (`StepFlops`).
Source: Narayanan et al. 2021 (arXiv 2104.04473), by part instead of in one formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.config import RunConfig
from harness.data.loader import TextTokens
from harness.data.masking import MaskConfig
from models.heads.contrastive import ContrastiveConfig
from models.item import ItemConfig
from models.make import MakeConfig
from models.oclear import OclearConfig
from models.shape import TransformerShape
from models.text import TextConfig
from models.vision import VisionConfig


@dataclass(frozen=True)
class Work:
    """Operations of a part, forward and backward."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Work:
        return Work(self.forward * times, self.backward * times)

    @property
    def total(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward


def linear(rows: float, inputs: int, outputs: int, input_grad: bool = True) -> Work:
    """[rows, inputs] by [inputs, outputs]; without `input_grad` the backward has no gradient of the inputs, as at an image."""
    product = 2.0 * rows * inputs * outputs
    return Work(product, product * (2 if input_grad else 1))


def attention(queries: int, keys: int, width: int) -> Work:
    """Scores and weighted sum of all heads together; a causal mask saves nothing here."""
    return Work(4.0 * queries * keys * width, 8.0 * queries * keys * width)


def block(shape: TransformerShape, tokens: int) -> Work:
    """The transformer on one sequence."""
    h = shape.hidden_size
    one = linear(tokens, h, 3 * h) + attention(tokens, tokens, h) + linear(tokens, h, h)
    one += linear(tokens, h, shape.fc1_size) + linear(tokens, shape.mlp_size, h)
    return one * shape.num_layers


def stem(config: VisionConfig) -> Work:
    """From pixels to patches, of one image."""
    if not config.stem_channels:
        return linear(config.num_patches, 3 * config.patch_size**2, config.hidden_size, input_grad=False)
    total, side, before = Work(), config.image_size, 3
    for stage, (width, blocks) in enumerate(zip(config.stem_channels, config.stem_blocks, strict=True)):
        side //= 2
        total += linear(side**2, 9 * before, width, input_grad=stage > 0)
        total += linear(side**2, 9 * width, width) * (2 * blocks)
        before = width
    return total + linear(side**2, before, config.hidden_size)


def vision(config: VisionConfig) -> Work:
    """The image tower on one image. Left out: the one query of attention pooling, which serves a whole batch."""
    tokens, h = vision_tokens(config), config.hidden_size
    total = patches(config)
    if config.pooling == "attention":
        total += linear(tokens, h, 2 * h) + attention(1, tokens, h) + linear(1, h, h)
        total += linear(1, h, config.fc1_size) + linear(1, config.mlp_size, h)
    return total + linear(1, h, config.projection_dim)


def patches(config: VisionConfig) -> Work:
    """The image tower on one image up to its patches' final states, which is all that masked patches ask for."""
    return stem(config) + block(config, vision_tokens(config))


def vision_tokens(config: VisionConfig) -> int:
    """Tokens of one image: patches, class token and registers."""
    return config.num_prefix + config.num_patches


def text(config: TextConfig, tokens: int = 0) -> Work:
    """The text tower on one text of `tokens` tokens; 0: of max_length."""
    return block(config, tokens or config.max_length) + linear(1, config.hidden_size, config.projection_dim)


def class_head(samples: float, rows: float, width: int) -> Work:
    """Cosines of all samples with all active rows."""
    return linear(samples, width, 1) * rows


def active_rows(num_classes: int, sample_rate: float, samples: int) -> float:
    """Expected number of classes that take part in a step: those drawn, and of the others the positives, taken as distinct."""
    return sample_rate * num_classes + (1 - sample_rate) * min(samples, num_classes)


def _oclear(model: OclearConfig, config: RunConfig, num_classes: int) -> dict[str, Work]:
    queries, documents = config.data.queries_per_step, config.data.documents_per_step
    if model.objective == "contrastive":
        documents = queries
    h, words, slots = model.vision.hidden_size, model.text.max_length, model.concept_slots
    cross = Work()
    for context, width in ((words, model.text.hidden_size), (model.vision.num_patches, h)):
        cross += linear(slots, h, h) * 2 + linear(context, width, 2 * h) + attention(slots, context, h)
    transform = linear(1, h, 2 * h) + linear(1, 2 * h, h) + linear(1, h, model.embedding_dim)
    samples = queries + documents
    if model.objective == "contrastive":
        head = linear(queries, model.embedding_dim, documents)
    else:
        active = active_rows(num_classes, config.head.sample_rate, samples)
        head = class_head(samples, active, model.embedding_dim)
    return {
        "vision": vision(model.vision) * samples,
        "text": text(model.text) * documents,
        "fusion": (cross + linear(1, 2 * h, 1)) * documents,
        "transforms": transform * samples,
        "head": head,
    }


def masked(config: MaskConfig, words: int, patches: int) -> tuple[float, float]:
    """Masked words and patches to expect in a document with room for so many: rate x max_length and the mean rate x patches, as if titles
    filled their room with ordinary pieces (padding is never masked, so there are fewer); with one_heavy the mean of its two ways."""
    rate, share = config.word_rate, sum(config.patch_rates) / 2
    if config.one_heavy:
        rate, share = (rate + config.heavy_word_rate) / 2, share / 2
    return rate * words, share * patches


def contrast(config: ContrastiveConfig, pairs: float, candidates: float, width: int) -> Work:
    """Cosines of the pairs with all candidates: of one direction, or of both."""
    return linear(pairs, width, 1) * (candidates * (2 if config.symmetric else 1))


def word_head(words: float, width: int, vocab_size: int) -> Work:
    """models.masking.WordHead on so many masked words."""
    return linear(words, width, width) + linear(words, width, vocab_size)


def cross_modal(model: MakeConfig) -> Work:
    """MAKE's fusion transformer on one product, with the linear layers before it."""
    words, seen, h = model.text.max_length, model.vision.num_patches, model.fusion.hidden_size
    before = linear(words, model.text.hidden_size, h) + linear(seen, model.vision.hidden_size, h)
    return before + block(model.fusion, 1 + words + seen)


def _make(model: MakeConfig, config: RunConfig, num_classes: int) -> dict[str, Work]:
    products, use, d, h = config.data.documents_per_step, model.weights, model.embedding_dim, model.fusion.hidden_size
    batch = products / config.data.micro_batches
    words, _ = masked(config.data.masking, model.text.max_length, model.vision.num_patches)
    parts = {
        "query": (text(model.query) + linear(1, model.query.projection_dim or model.query.hidden_size, d)) * products,
        "vision": vision(model.vision) * products,
        "text": text(model.text) * products,
        "fusion": cross_modal(model) * products,
    }
    project = linear(1, model.text.projection_dim or model.text.hidden_size, d) + linear(1, h, d)
    project += linear(1, model.vision.pooled_size, d)
    if model.modalities == "learned":
        project += linear(1, 3 * d, d) + linear(1, d, 3)
    parts["projections"] = project * products
    if use.qic:
        parts["qic"] = contrast(model.qic, products, batch + model.memory_bank, d)
    if use.qim:
        search = Work(linear(products, d, 1).forward) * batch  # for the hardest negatives, without gradients
        parts["qim"] = search + (linear(1, 3 * d, d) + linear(1, d, 1)) * (2 * products)
    if use.query_image:
        parts["query_image"] = contrast(model.qic, products, batch, d)
    if use.keywords:
        parts["keywords"] = linear(products, d, model.num_keywords)
    if use.mlm:
        again = cross_modal(model)
        if not model.hide_words:  # else the products' own pass has seen the masked title
            again += block(model.text, model.text.max_length)
        parts["mlm"] = (again + word_head(words, h, model.text.vocab_size)) * products
    if use.mpm:
        chosen = model.mpm_patches * products
        heads = linear(chosen, h, d) + linear(chosen, 3 * model.vision.patch_size**2, d, input_grad=False)
        heads += contrast(model.mpm, chosen, model.mpm_patches * batch, d)
        parts["mpm"] = (patches(model.vision) + cross_modal(model)) * products + heads
    return parts


def _item(model: ItemConfig, config: RunConfig, num_classes: int) -> dict[str, Work]:
    products, use, h = config.data.documents_per_step, model.weights, model.text.hidden_size
    image = VisionConfig(**vars(model.vision), hidden_size=h)
    length, tiles = model.text.max_length, image.num_patches
    one = (stem(image) + block(model.text, 1 + length + tiles)) * products
    words, seen = (products * n for n in masked(config.data.masking, length, tiles))
    pixels, parts = 3 * image.patch_size**2, {}
    told, built = words, seen
    if model.global_targets == "all":
        told, built = products * length, products * tiles

    def global_head(places: float, outputs: int) -> Work:
        return linear(places, h, 2 * h) + linear(places, 2 * h, h) + linear(places, h, outputs)

    if use.mlm or use.mim or use.gmlm or use.gmim:
        parts["masked"] = one
    if use.mlm:
        parts["mlm"] = word_head(words, h, model.text.vocab_size)
    if use.gmlm:
        parts["gmlm"] = global_head(told, model.text.vocab_size)
    if use.mim:
        parts["mim"] = linear(seen, h, h) + linear(seen, h, pixels)
    if use.gmim:
        parts["gmim"] = global_head(built, pixels)
    if use.itm:
        parts["itm"] = one + linear(products, h, 1)
    if use.contrast:
        apart = (stem(image) + block(model.text, 1 + tiles) + block(model.text, 1 + length)) * products
        parts["contrast"] = apart + contrast(model.contrast, products, products / config.data.micro_batches, h)
    return parts


# method -> the parts of its step over all ranks, from (its configuration, the run's, classes)
PARTS: dict[str, Callable[[Any, RunConfig, int], dict[str, Work]]] = {"oclear": _oclear, "make": _make, "item": _item}


def step_parts(config: RunConfig, num_classes: int) -> dict[str, Work]:
    """Model FLOPs of one optimizer step over all ranks, by part of the method, with texts of max_length tokens; of a vocabulary or keyword
    table of size 0 none."""
    return PARTS[config.method](config.model, config, num_classes)


def flops_per_step(config: RunConfig, num_classes: int) -> float:
    """Model FLOPs of one optimizer step, forward and backward, over all ranks, with texts of max_length tokens."""
    return sum(part.total for part in step_parts(config, num_classes).values())


def with_length(config: RunConfig, tower: str, tokens: int) -> RunConfig:
    """The recipe with texts of `tokens` tokens in the tower text (documents) or query (MAKE's)."""
    model = replace(config.model, **{tower: replace(getattr(config.model, tower), max_length=tokens)})
    return replace(config, model=model)


@dataclass(frozen=True)
class StepFlops:
    """Model FLOPs of one optimizer step by the texts that are in it: all that its formulas say of a text's length is a polynomial of degree 2.

    Args:
        fixed: over all ranks, of all but the texts' tokens.
        factors: of each of the sums in TextTokens.
    """

    fixed: float
    factors: tuple[float, ...]

    @classmethod
    def of(cls, config: RunConfig, num_classes: int, documents: int) -> StepFlops:
        """For steps of so many documents over all ranks, each, in MAKE, with a text query. ITEm's other titles count as long as the own."""
        towers = [tower for tower in ("text", "query") if hasattr(config.model, tower)]
        empty, factors = config, []
        for tower in towers:
            empty = with_length(empty, tower, 0)
        fixed = flops_per_step(empty, num_classes)
        for tower in towers:
            n = getattr(config.model, tower).max_length
            once, twice = (flops_per_step(with_length(empty, tower, t), num_classes) - fixed for t in (n, 2 * n))
            square = (twice - 2 * once) / (2 * n**2)
            factors += [(once / n - square * n) / documents, square / documents]
        return cls(fixed, tuple(factors))

    def texts(self, tokens: TextTokens) -> float:
        """What texts cost beyond `fixed`."""
        return sum(factor * count for factor, count in zip(self.factors, tokens, strict=False))


# Part of the device's name -> dense peak in TFLOP/s of (bf16 tensor cores, fp32 without them), from NVIDIA's data sheets. The first that fits counts.
_PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250, 75),
    "H200": (989, 67),
    "GH200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "A30": (165, 10.3),
    "L40S": (362, 91.6),
    "L4": (121, 30.3),
    "A10": (125, 31.2),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of `device` in `precision` (of train.precision) by its data sheet; None for a CPU and for GPUs that are not in the table.

    A CPU has no such figure: its clock depends on the instructions and on what else runs, so a utilisation would mislead.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # whole words: "A100-SXM4-80GB" is an A100, "L40S" is no L4
    words = name.replace("-", " ").split()
    for key, (bf16, fp32) in _PEAKS.items():
        if all(word in words for word in key.split()):
            # tensor cores multiply TF32 at half the rate of bf16, on all of these
            return 1e12 * {"bf16": bf16, "tf32": bf16 / 2}.get(precision, fp32)
    return None


def utilisation(flops: float, seconds: float, ranks: int, device: torch.device, precision: str) -> dict[str, float]:
    """{"speed/model_flops_utilisation": share of the ranks' peak} for `flops` over all ranks in `seconds`; empty where either is not known."""
    peak = peak_flops(device, precision)
    return {"speed/model_flops_utilisation": flops / (seconds * ranks * peak)} if peak and flops and seconds > 0 else {}
