"""Padding that is cut off, and masks that are left out where nothing is padded, change no loss and no gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.data.masking import MaskConfig
from models.batch import WIDTH, Batch
from models.heads.class_parallel import ClassHeadConfig, ClassParallelHead
from models.item import Item, ItemConfig, ItemTowers, ItemWeights, PatchConfig, StreamConfig
from models.make import Make, MakeConfig, MakeTowers
from models.oclear import Oclear, OclearConfig, OclearTowers
from models.shape import TransformerShape
from models.text import TextConfig
from models.vision import VisionConfig
from tests.pool import layout, ranks
from tests.twins import IMAGE, PATCH, VOCAB, products

ROOM = 40  # tokens that a text may have; those of tests.twins have LENGTH at most
SMALL: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**SMALL, "vocab_size": VOCAB, "max_length": ROOM}
VISION = VisionConfig(**SMALL, image_size=IMAGE, patch_size=PATCH)
HEAD = ClassHeadConfig(num_classes=5, embedding_dim=32)
METHODS: dict[str, Any] = {
    "oclear": OclearConfig(vision=VISION, text=TextConfig(**TEXT, post_norm=True), embedding_dim=32),
    "oclear, causal text that sees padding": OclearConfig(
        vision=VISION, text=TextConfig(**TEXT, causal=True, mask_padding=False), embedding_dim=32
    ),
    "oclear, text that sees padding": OclearConfig(
        vision=VISION, text=TextConfig(**TEXT, mask_padding=False), embedding_dim=32
    ),
    "make": MakeConfig(
        vision=VISION,
        text=TextConfig(**TEXT, pooling="class"),
        query=TextConfig(**TEXT, pooling="mean"),
        fusion=TransformerShape(**SMALL),
        embedding_dim=32,
        num_keywords=9,
        product_keywords=3,
    ),
    "make, words hidden, last position of the query": MakeConfig(
        vision=VISION,
        text=TextConfig(**TEXT, pooling="mean"),
        query=TextConfig(**TEXT, pooling="last"),
        fusion=TransformerShape(**SMALL),
        embedding_dim=32,
        hide_words=True,
        num_keywords=9,
        product_keywords=3,
    ),
    "item": ItemConfig(
        vision=PatchConfig(image_size=IMAGE, patch_size=PATCH),
        text=StreamConfig(**TEXT),
        weights=ItemWeights(contrast=0.5),
    ),
    "item, everything told": ItemConfig(
        vision=PatchConfig(image_size=IMAGE, patch_size=PATCH), text=StreamConfig(**TEXT), global_targets="all"
    ),
}
MASKS = {"mixed": MaskConfig(word_rate=0.4), "titles hidden": MaskConfig(one_heavy=True, heavy_word_rate=1.0)}


def roomy(batch: Batch) -> Batch:
    """The batch with its texts padded to ROOM, as a store gives them."""
    wide = {}
    for name in ("document_tokens", "masked_tokens", "masked_words", "other_tokens", "query_tokens"):
        tokens = getattr(batch, name)
        wide[name] = torch.nn.functional.pad(tokens, (0, ROOM - tokens.shape[1]))
    return replace(batch, **wide)


def full(batch: Batch) -> Batch:
    """The batch with texts that have no padding at all."""
    document = batch.document_tokens.masked_fill(batch.document_tokens == 0, 7)
    masked = torch.where(batch.masked_words, batch.masked_tokens, document)
    return replace(batch, document_tokens=document, masked_tokens=masked, other_tokens=document.flip(0))


def results(config: Any, batch: Batch, mesh: Any) -> tuple[list[Tensor], set[str]]:
    """Loss, embeddings and all gradients from the same weights, and what attention was told: masks or none."""
    from models.transformer import MegatronBuilder, SdpaCore

    torch.manual_seed(0)
    builder = MegatronBuilder(mesh.groups)
    method: Any
    if isinstance(config, OclearConfig):
        head = ClassParallelHead(HEAD, mesh.row_group, mesh.dp, dtype=torch.float64)
        batch = replace(batch, query_labels=batch.query_labels.clamp_min(0))
        method = Oclear(config, OclearTowers(config, builder).double(), head, mesh.dp)
        ((loss, _),) = method.losses([batch])
    else:
        make, towers = (Make, MakeTowers) if isinstance(config, MakeConfig) else (Item, ItemTowers)
        method = make(config, towers(config, builder).double(), None, mesh.dp)
        loss, _ = method.loss(batch)
    told: set[str] = set()
    for core in method.towers.modules():
        if isinstance(core, SdpaCore):
            core.register_forward_pre_hook(lambda _, given: told.add("none" if given[3] is None else "mask"))
    loss, _ = next(iter(method.losses([batch])))
    loss.backward()
    with torch.no_grad():
        vectors = method.embed_document(batch)
    zero = torch.zeros(())
    return [loss.detach(), vectors, *(zero if p.grad is None else p.grad for p in method.towers.parameters())], told


def check(name: str, tensor_parallel: int) -> None:
    config = METHODS[name]
    with layout(tensor_parallel) as mesh:
        for masks, settings in MASKS.items():
            batch = roomy(products(5, 3, settings))
            known = batch.with_lengths(0)
            assert known.trimmed("document").document_tokens.shape[1] == WIDTH < ROOM
            compare(results(config, batch, mesh)[0], results(config, known, mesh)[0], f"{name}, {masks}")
        batch = full(products(5, 3))
        wanted, found = results(config, batch, mesh), results(config, batch.with_lengths(0), mesh)
        compare(wanted[0], found[0], f"{name}, nothing padded")


def compare(wanted: list[Tensor], found: list[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        largest = max(float(a.abs().max()), 1e-3)
        assert float((a - b).abs().max()) <= 1e-12 * max(1.0, largest), f"{what}: tensor {i}"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("world", [1, 2])
def test_trimmed_equals_untrimmed(name: str, world: int) -> None:
    ranks(world).run(check, name, world)
